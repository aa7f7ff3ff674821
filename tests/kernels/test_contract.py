"""One contract for every backend: value, gradient and packs against the reference, on shapes fit and unfit for kernels.

The Triton kernels run in Triton's interpreter, assembly included, behind the dispatch, the custom gradient and vmap
(the Mosaic kernels in theirs: test_mosaic_values.py). "triton" has a kernel for forward products of up to 16 rows; all
others of it go the way of "scratch".
"""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from pallas_kernels import gpu as gpu_module
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Codec, Packed, api, config
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import few_rows, scratch
from tests.kernels.weights import dequantized, random_weight

GPU = config.Gpu("a GPU", 86, 1)
BACKENDS = ("xla", "triton", "scratch")
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}

# shape [O, I], block size, x's dtype; the last three the kernel for few rows refuses
SHAPES = {
    "whole tiles": ((128, 128), 64, "bfloat16"),
    "a ragged edge": ((70, 192), 64, "float16"),
    "blocks of 32": ((64, 96), 32, "bfloat16"),
    "blocks of 256": ((64, 256), 256, "float16"),
    "an odd number of rows": ((33, 64), 64, "bfloat16"),
    "blocks that cross rows": ((32, 96), 64, "float16"),
    "an odd number of weights": ((7, 33), 64, "bfloat16"),
}
DECODED = list(SHAPES)[:4]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels in the interpreter; the list has (kernel, shape of the activations or of W) of every launch."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter

    seen = []

    def forward(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
        tiles = config.heuristic(Shape(*codec.shape), codec.block_size, GPU)

        def compute(x, packed):
            seen.append(("forward", x.shape))
            return interpreter.matmul(x, [Packed(*packed)], [codec], tiles)

        out = jax.ShapeDtypeStruct((x.shape[0], codec.shape[0]), jnp.float32)
        return jax.pure_callback(compute, out, x, packed).astype(x.dtype)

    def dequantize(packed: Packed, codec: Codec, dtype: jnp.dtype) -> jax.Array:
        def compute(packed):
            seen.append(("dequantize", codec.shape))
            return interpreter.dequantize(Packed(*packed), codec, dtype)

        return jax.pure_callback(compute, jax.ShapeDtypeStruct(codec.shape, dtype), packed)

    monkeypatch.setattr(few_rows, "forward", forward)
    monkeypatch.setattr(scratch, "dequantize", dequantize)
    return seen


def weight(name: str, format: str = "nf4", double_quant: bool = True, seed: int = 0) -> tuple[Packed, Codec]:
    return random_weight(*SHAPES[name][:2], format, double_quant, seed)


def normal(*shape: int, dtype: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def check(found: jax.Array, x: jax.Array, w: np.ndarray) -> None:
    """found = x w within three roundings to x's dtype of every term, float32 sums, and the result's rounding."""
    unit, x64, w = UNIT_ROUNDOFF[x.dtype.name], np.asarray(x, np.float64), w.astype(np.float64)
    exact, magnitude = x64 @ w, np.abs(x64) @ np.abs(w)
    bound = (3 * unit + 2.0**-24 * np.sqrt(w.shape[0])) * magnitude + unit * np.abs(exact)
    assert found.dtype == x.dtype
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


def value_and_gradient(packed: Packed, codec: Codec, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    @jax.jit
    def both(x, dy, packed):
        y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, packed, codec), x)
        return y, pullback(dy)[0]

    return jax.block_until_ready(both(x, dy, packed))


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient(name, launches):
    (packed, codec), (shape, _, dtype) = weight(name), SHAPES[name]
    w = dequantized(packed, codec)
    x, dy = normal(2, 5, shape[1], dtype=dtype, seed=1), normal(2, 5, shape[0], dtype=dtype, seed=2)
    forward, dequantize = ("forward", (10, shape[1])), ("dequantize", shape)
    launched = {
        "xla": [],
        "scratch": [dequantize, dequantize],
        "triton": [dequantize, forward] if name in DECODED else [dequantize],  # what it refuses forward takes xla
    }
    values = {}
    for backend in BACKENDS:
        launches.clear()
        values[backend], dx = value_and_gradient(packed, codec._replace(backend=backend), x, dy)
        check(values[backend], x, w.T)
        check(dx, dy, w)
        assert sorted(launches) == launched[backend]
    assert np.array_equal(values["scratch"], values["xla"])  # its W is that of "xla" bit for bit


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_goes_without_kernels(backend, launches):
    packed, codec = weight("whole tiles")
    w = dequantized(packed, codec)
    x, dy = normal(3, 128, dtype="float32", seed=1), normal(3, 128, dtype="float32", seed=2)
    y, dx = value_and_gradient(packed, codec._replace(backend=backend), x, dy)
    check(y, x, w.T)
    check(dx, dy, w)
    assert not launches


@pytest.mark.parametrize(("rows", "format", "double_quant"), [(1, "fp4", True), (16, "nf4", False), (17, "int4", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_formats_and_row_counts(backend, rows, format, double_quant, launches, caplog):
    api._say_many_rows.cache_clear()
    packed, codec = weight("a ragged edge", format, double_quant)
    w = dequantized(packed, codec)
    x = normal(rows, codec.shape[1], dtype="bfloat16", seed=1)
    with caplog.at_level(logging.WARNING):
        y = jax.jit(lambda x: nf4_matmul.matmul(x, packed, codec._replace(backend=backend)))(x)
    check(y, x, w.T)
    is_few = backend == "triton" and rows <= 16
    assert launches == ([] if backend == "xla" else [("forward", x.shape) if is_few else ("dequantize", codec.shape)])
    is_said = "triton is for forward products of up to 16 rows; the others take scratch" in caplog.text
    assert is_said == (backend == "triton" and rows == 17)


@pytest.mark.parametrize(("backend", "adapters"), [("xla", 4), ("scratch", 4), ("triton", 4), ("triton", 6)])
def test_a_pack_of_adapters_is_one_product_of_all_their_rows(backend, adapters, launches):
    """Of 12 rows, or of 18: too many for "triton", though it takes each adapter's 3."""
    packed, codec = weight("whole tiles")
    x = normal(adapters, 3, 128, dtype="bfloat16", seed=1)
    way = "scratch" if (backend, adapters) == ("triton", 6) else backend

    def loss(x, backend):
        return jnp.sum(nf4_matmul.matmul(x, packed, codec._replace(backend=backend)).astype(jnp.float32) ** 2)

    one = jax.value_and_grad(loss)
    together = jax.block_until_ready(jax.jit(jax.vmap(lambda x: one(x, backend)))(x))
    dequantize = ("dequantize", codec.shape)
    expected = {"xla": [], "scratch": [dequantize, dequantize], "triton": [dequantize, ("forward", (12, 128))]}
    assert sorted(launches) == expected[way]
    alone = jax.jit(lambda x: one(x, way))
    for k in range(adapters):
        value, gradient = alone(x[k])
        np.testing.assert_allclose(together[0][k], value, rtol=1e-3)
        found, expected = (np.asarray(g, np.float32) for g in (together[1][k], gradient))
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_differ_are_taken_one_by_one(backend, launches):
    (first, codec), (second, _) = (weight("whole tiles", seed=seed) for seed in (3, 4))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    x = normal(5, 128, dtype="bfloat16", seed=1)
    found = jax.jit(jax.vmap(lambda packed: nf4_matmul.matmul(x, packed, codec._replace(backend=backend))))(stacked)
    for y, packed in zip(found, (first, second), strict=True):
        check(y, x, dequantized(packed, codec).T)


def test_only_packed_arrays_are_kept_for_the_backward_pass(launches, capsys):
    packed, codec = weight("whole tiles")
    x = normal(4, 128, dtype="bfloat16", seed=1)
    for backend in BACKENDS:
        way = codec._replace(backend=backend)
        print_saved_residuals(lambda x, packed, way=way: nf4_matmul.matmul(x, packed, way), x, packed)
        kept = capsys.readouterr().out.splitlines()
        assert kept and all("from the argument packed" in line for line in kept), kept


@pytest.mark.parametrize(("rows", "bad"), [(1, np.inf), (17, np.nan)])  # decoded in the product, or before it
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_hidden(backend, bad, rows, launches):
    """A scale spoils its row of W: a column of y, and the dx of its block. A value of x or dy spoils its row."""
    packed, codec = weight("whole tiles", double_quant=False)
    codec, spoiled = codec._replace(backend=backend), packed._replace(absmax=packed.absmax.at[7].set(bad))
    x, dy = normal(rows, 128, dtype="bfloat16", seed=1), normal(rows, 128, dtype="bfloat16", seed=2)

    def finite(packed, x, dy):
        return [np.isfinite(np.asarray(found, np.float32)) for found in value_and_gradient(packed, codec, x, dy)]

    y, dx = finite(spoiled, x, dy)
    assert not y[:, 3].any() and np.delete(y, 3, axis=1).all()
    assert not dx[:, 64:].any() and dx[:, :64].all()
    y, dx = finite(packed, x.at[0, 100].set(bad), dy.at[0, 5].set(bad))
    assert not y[0].any() and y[1:].all()
    assert not dx[0].any() and dx[1:].all()


def test_no_rows():
    packed, codec = weight("whole tiles")
    x = jnp.zeros((0, 128), jnp.bfloat16)
    for backend in BACKENDS:
        assert nf4_matmul.matmul(x, packed, codec._replace(backend=backend)).shape == (0, 128)


def test_xla_is_the_default_and_a_refusal_is_said(caplog):
    _, codec = weight("blocks that cross rows")
    assert codec.backend == "xla"
    api._say_refused.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert nf4_matmul.path(codec._replace(backend="triton"), jnp.bfloat16, "forward", 1) == "xla"
    assert [r.getMessage() for r in caplog.records] == [
        "nf4_matmul: the weight [32, 96] takes backend xla instead of triton: "
        "I is 96, no multiple of the block size 64: blocks cross rows"
    ]


def test_mistakes_are_named():
    packed, codec = weight("whole tiles")
    x = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of auto, xla, triton, scratch, mosaic"):
        nf4_matmul.matmul(x, packed, codec._replace(backend="cuda"))
    with pytest.raises(ValueError, match="x has 17 rows, this kernel takes up to 16: call scratch.forward"):
        few_rows.forward(jnp.zeros((17, 128), jnp.bfloat16), packed, codec)
    if jax.default_backend() == "cpu":
        pytest.importorskip("triton")
        for backend in ("triton", "scratch"):
            message = f'backend "{backend}" needs an NVIDIA GPU, this process computes on cpu'
            with pytest.raises(RuntimeError, match=message):
                nf4_matmul.matmul(x, packed, codec._replace(backend=backend))


@pytest.mark.parametrize("backend", ["triton", "scratch"])
def test_missing_packages_are_named(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    packed, codec = weight("whole tiles")
    with pytest.raises(ImportError, match=f'"{backend}" needs jax-triton .*: pip install jax-triton'):
        nf4_matmul.matmul(jnp.zeros((2, 128), jnp.bfloat16), packed, codec._replace(backend=backend))


@pytest.mark.parametrize(
    ("gpu", "backend", "rows", "kernels"),
    [
        ("NVIDIA A100-SXM4-80GB", "triton", 8, ("nf4_matmul_forward", "nf4_dequantize")),
        ("NVIDIA GeForce RTX 4090", "triton", 9, ("nf4_dequantize", "nf4_dequantize")),
        ("NVIDIA H200", "scratch", 1, ("nf4_dequantize", "nf4_dequantize")),
    ],
)
def test_the_whole_op_is_lowered_for_a_gpu_that_is_not_here(gpu, backend, rows, kernels):
    pytest.importorskip("triton")
    triton_lib = gpu_module.load_jax_triton(backend).triton_lib
    if triton_lib.triton_kernel_call_lib is None:
        pytest.skip("lowering needs jax-cuda13-plugin (pip install --no-deps jax-cuda13-plugin)")
    packed, codec = weight("a ragged edge")
    codec = codec._replace(backend=backend)
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=100, platform="gpu")

    def pack_gradient(x, packed):
        def loss(x):
            return jnp.sum(nf4_matmul.matmul(x, packed, codec).astype(jnp.float32) ** 2)

        return jax.vmap(jax.grad(loss))(x)

    x = jax.ShapeDtypeStruct((2, rows, 192), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(pack_gradient).trace(x, packed).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("triton_kernel_call") == 2  # forward and backward, each once for the whole pack
    assert f"tensor<{2 * rows}x192xbf16>" in text
    assert text.count("-> tensor<70x192xbf16>") == kernels.count("nf4_dequantize")  # where W is written in 16 bits
