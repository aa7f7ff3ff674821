"""One contract for every backend: value, gradient and packs against the reference, on shapes fit and unfit for kernels.

The Triton kernels run in Triton's interpreter, assembly included, behind the dispatch, the custom gradient and vmap
(the Mosaic kernels in theirs: test_mosaic_values.py).
"""

import functools
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Codec, Packed, config
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import backend as triton_backend
from pallas_kernels.nf4_matmul.triton import scratch

GPU = config.Gpu("a GPU", 86, 1)
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}

# shape [O, I] and block size; the last three go the general way
SHAPES = {
    "whole tiles": ((128, 128), 64),
    "a ragged edge": ((70, 192), 64),
    "blocks of 32": ((64, 96), 32),
    "blocks of 256": ((64, 256), 256),
    "an odd number of rows": ((33, 64), 64),
    "blocks that cross rows": ((32, 96), 64),
    "an odd number of weights": ((7, 33), 64),
}
FUSED = list(SHAPES)[:4]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels in the interpreter; the list has (op, shape of the activations or of W) of every launch."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter

    seen = []

    def launch(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
        shape = Shape(*codec.shape)
        tiles = config.heuristic(op, x.shape[0], shape, codec.block_size, GPU)

        def compute(x, packed):
            seen.append((op, x.shape))
            return interpreter.matmul(op, x, Packed(*packed), codec, tiles)

        columns = shape.out_features if op == "forward" else shape.in_features
        out = jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32)
        return jax.pure_callback(compute, out, x, packed).astype(x.dtype)

    def dequantize(packed: Packed, codec: Codec, dtype: jnp.dtype) -> jax.Array:
        def compute(packed):
            seen.append(("dequantize", codec.shape))
            return interpreter.dequantize(Packed(*packed), codec, dtype)

        return jax.pure_callback(compute, jax.ShapeDtypeStruct(codec.shape, dtype), packed)

    for op in config.OPS:
        monkeypatch.setattr(triton_backend, op, functools.partial(launch, op))
    monkeypatch.setattr(scratch, "dequantize", dequantize)
    return seen


def weight(name: str, format: str = "nf4", double_quant: bool = True) -> qj.QuantizedTensor:
    shape, block_size = SHAPES[name]
    values = np.random.default_rng(0).normal(size=shape)
    return qj.quantize(jnp.asarray(values, jnp.float32), format, block_size, double_quant)


def normal(*shape: int, dtype: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def check(found: jax.Array, x: jax.Array, w: np.ndarray) -> None:
    """found = x w within three roundings to x's dtype of every term, float32 sums, and the result's rounding."""
    unit, x64 = UNIT_ROUNDOFF[x.dtype.name], np.asarray(x, np.float64)
    exact, magnitude = x64 @ w, np.abs(x64) @ np.abs(w)
    bound = (3 * unit + 2.0**-24 * np.sqrt(w.shape[0])) * magnitude + unit * np.abs(exact)
    assert found.dtype == x.dtype
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_value_and_gradient(backend, name, dtype, launches):
    q = weight(name)
    codec = q.codec._replace(backend=backend)
    x, dy = normal(2, 5, q.shape[1], dtype=dtype, seed=1), normal(2, 5, q.shape[0], dtype=dtype, seed=2)
    y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, q.packed, codec), x)
    (dx,) = jax.block_until_ready(pullback(dy))
    w = np.asarray(qj.dequantize(q, jnp.float32), np.float64)
    check(y, x, w.T)
    check(dx, dy, w)
    is_fused = backend == "triton" and name in FUSED and dtype != "float32"
    is_scratch = backend == "scratch" and dtype != "float32"
    assert nf4_matmul.path(codec, dtype) == (backend if is_fused or is_scratch else "xla")
    if is_scratch:
        assert launches == [("dequantize", q.shape)] * 2
        assert np.array_equal(y, nf4_matmul.matmul(x, q.packed, q.codec))  # W is that of "xla" bit for bit
    else:
        assert launches == ([("forward", (10, q.shape[1])), ("backward", (10, q.shape[0]))] if is_fused else [])


@pytest.mark.parametrize(("format", "double_quant"), [("fp4", True), ("int4", True), ("nf4", False)])
@pytest.mark.parametrize("rows", [1, 17, 150])
@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_formats_and_row_counts(backend, rows, format, double_quant, launches):
    q = weight("a ragged edge", format, double_quant)
    x = normal(rows, q.shape[1], dtype="bfloat16", seed=1)
    y = nf4_matmul.matmul(x, q.packed, q.codec._replace(backend=backend))
    check(y, x, np.asarray(qj.dequantize(q, jnp.float32), np.float64).T)


@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_a_pack_of_adapters_is_one_product_of_all_their_rows(backend, launches):
    q = weight("whole tiles")
    codec = q.codec._replace(backend=backend)
    x = normal(3, 4, 128, dtype="bfloat16", seed=1)

    def loss(x):
        return jnp.sum(nf4_matmul.matmul(x, q.packed, codec).astype(jnp.float32) ** 2)

    together = jax.block_until_ready(jax.jit(jax.vmap(jax.value_and_grad(loss)))(x))
    once = {"triton": [("forward", (12, 128)), ("backward", (12, 128))], "scratch": [("dequantize", (128, 128))] * 2}
    assert launches == once.get(backend, [])
    apart = [jax.value_and_grad(loss)(one) for one in x]
    for k, one in enumerate(apart):
        np.testing.assert_allclose(together[0][k], one[0], rtol=1e-3)
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (together[1][k], one[1])), rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_weights_that_differ_are_taken_one_by_one(backend, launches):
    shape, block_size = SHAPES["whole tiles"]
    qs = [qj.quantize(normal(*shape, dtype="float32", seed=seed), block_size=block_size) for seed in (3, 4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(q.packed for q in qs))
    codec = qs[0].codec._replace(backend=backend)
    x = normal(5, 128, dtype="bfloat16", seed=1)
    found = jax.vmap(lambda packed: nf4_matmul.matmul(x, packed, codec))(stacked)
    for y, q in zip(found, qs, strict=True):
        check(y, x, np.asarray(qj.dequantize(q, jnp.float32), np.float64).T)


@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_only_packed_arrays_are_kept_for_the_backward_pass(backend, launches, capsys):
    q = weight("whole tiles")
    codec = q.codec._replace(backend=backend)
    x = normal(4, 128, dtype="bfloat16", seed=1)
    print_saved_residuals(lambda x, packed: nf4_matmul.matmul(x, packed, codec), x, q.packed)
    kept = capsys.readouterr().out.splitlines()
    assert kept and all("from the argument packed" in line for line in kept), kept


@pytest.mark.parametrize(("rows", "bad"), [(1, np.inf), (40, np.nan)])  # sums are scaled, or weights
@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_what_is_not_finite_is_not_hidden(backend, bad, rows, launches):
    """A scale spoils its row of W: a column of y, and the dx of its block. A value of x or dy spoils its row."""
    q = weight("whole tiles", double_quant=False)
    codec, spoiled = q.codec._replace(backend=backend), q.packed._replace(absmax=q.packed.absmax.at[7].set(bad))
    x, dy = normal(rows, 128, dtype="bfloat16", seed=1), normal(rows, 128, dtype="bfloat16", seed=2)

    def both(x, dy, packed):
        y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, packed, codec), x)
        return [np.isfinite(np.asarray(found, np.float32)) for found in (y, *pullback(dy))]

    y, dx = both(x, dy, spoiled)
    assert not y[:, 3].any() and np.delete(y, 3, axis=1).all()
    assert not dx[:, 64:].any() and dx[:, :64].all()
    y, dx = both(x.at[0, 100].set(bad), dy.at[0, 5].set(bad), q.packed)
    assert not y[0].any() and y[1:].all()
    assert not dx[0].any() and dx[1:].all()


@pytest.mark.parametrize("backend", ["xla", "triton", "scratch"])
def test_no_rows(backend):
    q = weight("whole tiles")
    x = jnp.zeros((0, 128), jnp.bfloat16)
    assert nf4_matmul.matmul(x, q.packed, q.codec._replace(backend=backend)).shape == (0, 128)


def test_xla_is_the_default_and_a_refusal_is_said(caplog):
    q = weight("blocks that cross rows")
    assert q.codec.backend == "xla"
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert nf4_matmul.path(q.codec._replace(backend="triton"), jnp.bfloat16) == "xla"
    assert [r.getMessage() for r in caplog.records if "blocks cross rows" in r.getMessage()] in (
        [],  # said in an earlier test
        [
            "nf4_matmul: the weight [32, 96] takes backend xla instead of triton: "
            "I is 96, no multiple of the block size 64: blocks cross rows"
        ],
    )


def test_mistakes_are_named():
    q = weight("whole tiles")
    x = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of auto, xla, triton, scratch, mosaic"):
        nf4_matmul.matmul(x, q.packed, q.codec._replace(backend="cuda"))
    if jax.default_backend() == "cpu":
        pytest.importorskip("triton")
        for backend in ("triton", "scratch"):
            message = f'backend "{backend}" needs an NVIDIA GPU, this process computes on cpu'
            with pytest.raises(RuntimeError, match=message):
                nf4_matmul.matmul(x, q.packed, q.codec._replace(backend=backend))


@pytest.mark.parametrize("backend", ["triton", "scratch"])
def test_missing_packages_are_named(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    q = weight("whole tiles")
    with pytest.raises(ImportError, match=f'"{backend}" needs jax-triton .*: pip install jax-triton'):
        nf4_matmul.matmul(jnp.zeros((2, 128), jnp.bfloat16), q.packed, q.codec._replace(backend=backend))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA H200"])
@pytest.mark.parametrize("backend", ["triton", "scratch"])
def test_the_whole_op_is_lowered_for_a_gpu_that_is_not_here(backend, gpu, rows):
    pytest.importorskip("triton")
    triton_lib = triton_backend.load_jax_triton(backend).triton_lib
    if triton_lib.triton_kernel_call_lib is None:
        pytest.skip("lowering needs jax-cuda13-plugin (pip install --no-deps jax-cuda13-plugin)")
    q = weight("a ragged edge")
    codec = q.codec._replace(backend=backend)
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=100, platform="gpu")

    def pack_gradient(x, packed):
        def loss(x):
            return jnp.sum(nf4_matmul.matmul(x, packed, codec).astype(jnp.float32) ** 2)

        return jax.vmap(jax.grad(loss))(x)

    x = jax.ShapeDtypeStruct((2, rows, 192), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(pack_gradient).trace(x, q.packed).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("triton_kernel_call") == 2  # forward and backward, each once for the whole pack
    assert f"tensor<{2 * rows}x192xbf16>" in text
    assert ("tensor<70x192xbf16>" in text) == (backend == "scratch")  # else no 16-bit W anywhere
