"""The 8-bit forms of the product: their definition in float64, their contract on both backends, what they round off."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Codec, Packed, config, fp8
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.nf4_matmul.triton import backend as triton_backend
from pallas_kernels.nf4_matmul.triton import fp8_backend as triton_fp8_backend

H200 = config.Gpu("NVIDIA H200", 90, 132)
A100 = config.Gpu("NVIDIA A100-SXM4-80GB", 80, 108)
EIGHT_BIT = ("fp8", "fp8_row")
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}

# shape [O, I] and block size; the last four go the plain way
SHAPES = {
    "whole tiles": ((128, 128), 64),
    "a ragged edge": ((70, 192), 64),
    "blocks of 32": ((64, 96), 32),
    "blocks of 256": ((64, 512), 256),
    "an odd number of rows": ((33, 64), 64),
    "blocks that cross rows": ((32, 96), 64),
    "a short last run": ((48, 100), 32),
    "an odd number of weights": ((7, 33), 64),
}
FUSED = list(SHAPES)[:4]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """An H200 whose kernels run in the interpreter; the list has (kernel, shape of the activations) of every launch."""
    pytest.importorskip("triton")
    from tests.kernels import interpreter

    seen: list[tuple[str, tuple[int, ...]]] = []

    def forward(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
        shape = Shape(*codec.shape)
        tiles = triton_fp8_backend.heuristic(x.shape[0], shape, codec.block_size, H200._replace(cores=1))

        def compute(x, packed):
            seen.append((f"{codec.compute} forward", x.shape))
            return interpreter.matmul_fp8(x, Packed(*packed), codec, tiles)

        out = jax.ShapeDtypeStruct((x.shape[0], shape.out_features), jnp.float32)
        return jax.pure_callback(compute, out, x, packed).astype(x.dtype)

    def backward(dy: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
        seen.append(("backward", dy.shape))
        return nf4_matmul.dense_matmul(dy, nf4_matmul.dequantize(packed, codec, dy.dtype), contract=0)

    def full_forward(*_):
        raise AssertionError("the 16-bit kernel was launched")

    monkeypatch.setattr(triton_backend, "current_gpu", lambda: H200)
    monkeypatch.setattr(triton_fp8_backend, "forward", forward)
    monkeypatch.setattr(triton_backend, "backward", backward)
    monkeypatch.setattr(triton_backend, "forward", full_forward)
    return seen


def weight(name: str, format: str = "nf4", double_quant: bool = True) -> qj.QuantizedTensor:
    shape, block_size = SHAPES[name]
    values = np.random.default_rng(0).normal(size=shape)
    return qj.quantize(jnp.asarray(values, jnp.float32), format, block_size, double_quant)


def normal(*shape: int, dtype: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def by_definition(x: jax.Array, q: qj.QuantizedTensor, compute: str) -> tuple[np.ndarray, np.ndarray]:
    """(y, the sum of the terms' magnitudes), float64 [M, O]: run by run as fp8.py's head says it, in numpy."""
    x32 = np.asarray(x, np.float32)
    entries, factor = fp8.table8(q.codec.table)
    ones = q.codec._replace(table=tuple(range(16)), compute="full")
    unit = q.packed._replace(absmax=jnp.ones(q.absmax.size, jnp.float32), nested_absmax=None, offset=None)
    codes = np.asarray(nf4_matmul.dequantize(unit, ones, jnp.float32)).astype(int)
    sixteen = q.codec._replace(table=(1.0,) * 16, compute="full")
    absmax = np.asarray(nf4_matmul.dequantize(q.packed, sixteen, jnp.float32), np.float64)
    w8 = entries.astype(np.float64)[codes]
    y, magnitude = np.zeros((len(x32), q.shape[0])), np.zeros((len(x32), q.shape[0]))
    run = min(64, q.block_size)
    for begin in range(0, q.shape[1], run):
        part = slice(begin, begin + run)
        scaled_together = x32 if compute == "fp8_row" else x32[:, part]
        amax = np.abs(scaled_together).max(axis=1, keepdims=True)
        scale = np.where(amax > 0, amax * np.float32(1 / 448), np.float32(1))
        terms = (scale * rounded(x32[:, part] / scale))[:, None, :] * (absmax[:, part] * w8[:, part] / factor)[None]
        y += terms.sum(-1)
        magnitude += np.abs(terms).sum(-1)
    return y, magnitude


def check(found: jax.Array, x: jax.Array, q: qj.QuantizedTensor, compute: str) -> None:
    """found is the definition's value but for float32 sums and the result's rounding."""
    assert found.dtype == x.dtype
    expected, magnitude = by_definition(x.reshape(-1, x.shape[-1]), q, compute)
    error = np.abs(np.asarray(found, np.float64).reshape(expected.shape) - expected)
    assert np.all(error <= UNIT_ROUNDOFF[x.dtype.name] * np.abs(expected) + 2.0**-21 * magnitude)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_value_and_gradient(compute, backend, name, dtype, launches):
    q = weight(name)
    codec = q.codec._replace(backend=backend, compute=compute)
    x, dy = normal(2, 5, q.shape[1], dtype=dtype, seed=1), normal(2, 5, q.shape[0], dtype=dtype, seed=2)
    y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, q.packed, codec), x)
    (dx,) = jax.block_until_ready(pullback(dy))
    check(y, x, q, compute)
    _, full = jax.vjp(lambda x: nf4_matmul.matmul(x, q.packed, q.codec), x)
    np.testing.assert_array_equal(dx, full(dy)[0])  # the gradient of the full product
    is_fused = backend == "triton" and name in FUSED and dtype != "float32"
    assert nf4_matmul.path(codec, dtype) == ("triton" if is_fused else "xla")
    expected = [(f"{compute} forward", (10, q.shape[1])), ("backward", (10, q.shape[0]))]
    assert launches == (expected if is_fused else [])


@pytest.mark.parametrize(("format", "double_quant"), [("fp4", True), ("int4", True), ("nf4", False)])
@pytest.mark.parametrize("rows", [1, 17, 150])
@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_formats_and_row_counts(compute, backend, rows, format, double_quant, launches):
    q = weight("a ragged edge", format, double_quant)
    x = normal(rows, q.shape[1], dtype="bfloat16", seed=1)
    check(nf4_matmul.matmul(x, q.packed, q.codec._replace(backend=backend, compute=compute)), x, q, compute)
    assert len(launches) == (backend == "triton")


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_a_pack_of_adapters_is_one_product_of_all_their_rows(compute, backend, launches):
    q = weight("whole tiles")
    codec = q.codec._replace(backend=backend, compute=compute)
    x = normal(3, 4, 128, dtype="bfloat16", seed=1)
    together = jax.block_until_ready(jax.jit(jax.vmap(lambda x: nf4_matmul.matmul(x, q.packed, codec)))(x))
    check(together, x, q, compute)
    assert launches == ([(f"{compute} forward", (12, 128))] if backend == "triton" else [])


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_only_packed_arrays_are_kept_for_the_backward_pass(compute, backend, launches, capsys):
    q = weight("whole tiles")
    codec = q.codec._replace(backend=backend, compute=compute)
    x = normal(4, 128, dtype="bfloat16", seed=1)
    print_saved_residuals(lambda x, packed: nf4_matmul.matmul(x, packed, codec), x, q.packed)
    kept = capsys.readouterr().out.splitlines()
    assert kept and all("from the argument packed" in line for line in kept), kept


@pytest.mark.parametrize("backend", ["xla", "triton"])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_no_rows(compute, backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "current_gpu", lambda: H200)
    q = weight("whole tiles")
    x = jnp.zeros((0, 128), jnp.bfloat16)
    assert nf4_matmul.matmul(x, q.packed, q.codec._replace(backend=backend, compute=compute)).shape == (0, 128)


@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_full_is_the_default_and_others_reach_the_tensor(compute):
    q = weight("whole tiles")
    assert q.codec.compute == "full"
    x = normal(4, 128, dtype="float32", seed=1)
    eight_bit = dataclasses.replace(q, compute=compute)
    check(qj.matmul(x, eight_bit), x, q, compute)
    assert not np.allclose(qj.matmul(x, q), qj.matmul(x, eight_bit), rtol=1e-3)


@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_mistakes_are_named(compute, monkeypatch):
    q = weight("whole tiles")
    x = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="compute is 'int8', expected one of full, fp8, fp8_row"):
        nf4_matmul.matmul(x, q.packed, q.codec._replace(compute="int8"))
    message = f"'mosaic' has no kernel for compute \"{compute}\": set backend to triton or xla"
    with pytest.raises(ValueError, match=message):
        nf4_matmul.matmul(x, q.packed, q.codec._replace(backend="mosaic", compute=compute))
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match='backend "triton" needs an NVIDIA GPU, this process computes on cpu'):
            nf4_matmul.matmul(x, q.packed, q.codec._replace(backend="triton", compute=compute))
    monkeypatch.setattr(triton_backend, "current_gpu", lambda: A100)
    reason = triton_fp8_backend.unsupported((128, 128), 64, jnp.bfloat16)
    assert reason == "NVIDIA A100-SXM4-80GB has compute capability 8.0: the 8-bit kernel is for 8.9 and 9.0"
    codec = q.codec._replace(backend="triton", compute=compute)
    assert nf4_matmul.path(codec, jnp.bfloat16) == "xla"
    x = normal(2, 128, dtype="bfloat16", seed=1)
    check(nf4_matmul.matmul(x, q.packed, codec), x, q, compute)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 4090", "NVIDIA H200"])
@pytest.mark.parametrize(("compute", "scales"), [("fp8", 2), ("fp8_row", 1)])  # of a row of 128 in-features
def test_the_whole_op_is_lowered_for_a_gpu_that_is_not_here(compute, scales, gpu, rows):
    triton_lib = pytest.importorskip("jax_triton.triton_lib")
    if triton_lib.triton_kernel_call_lib is None:
        pytest.skip("lowering needs jax-cuda13-plugin (pip install --no-deps jax-cuda13-plugin)")
    q = weight("whole tiles")
    codec = q.codec._replace(backend="triton", compute=compute)
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=100, platform="gpu")

    def pack_gradient(x, packed):
        def loss(x):
            return jnp.sum(nf4_matmul.matmul(x, packed, codec).astype(jnp.float32) ** 2)

        return jax.vmap(jax.grad(loss))(x)

    x = jax.ShapeDtypeStruct((2, rows, 128), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(pack_gradient).trace(x, q.packed).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 2  # forward and backward, each once for the whole pack
    assert f"tensor<{2 * rows}x128xf8E4M3FN>" in text and f"tensor<{scales}x{2 * rows}xf32>" in text  # x, its scales
    assert "tensor<128x128x" not in text  # no W anywhere


def test_rows_of_zeros_and_tiny_values_stay_finite():
    x = jnp.zeros((4, 128)).at[1, 3].set(1e-44).at[2, 70].set(2e-38).at[3].set(3e38)
    values, scales = fp8.quantize(x, 64)
    back = np.asarray(values, np.float64) * np.repeat(np.asarray(scales, np.float64), 64, axis=1)
    assert np.all(np.isfinite(back))
    np.testing.assert_allclose(back, np.asarray(x, np.float64), rtol=2.0**-4, atol=2e-39)
    assert np.all(back[0] == 0) and np.all(np.asarray(scales) > 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compute", EIGHT_BIT)
def test_what_is_not_finite_is_not_hidden(compute, bad):
    q = weight("whole tiles")
    x = normal(3, 128, dtype="bfloat16", seed=1).at[1, 5].set(bad)
    y = np.asarray(nf4_matmul.matmul(x, q.packed, q.codec._replace(compute=compute)), np.float32)
    assert np.all(np.isnan(y[1])) and np.all(np.isfinite(y[[0, 2]]))


def test_values_of_x_are_rounded_to_the_nearest():
    x = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32) * 10
    x[:, ::64] = 448  # so that scales are 1
    values, scales = jax.jit(fp8.quantize, static_argnums=1)(np.clip(x, -448, 448), 64)
    np.testing.assert_allclose(scales, 1, rtol=1e-7)
    np.testing.assert_array_equal(np.asarray(values, np.float64), rounded(np.clip(x, -448, 448)))


@pytest.mark.parametrize(("format", "largest", "error"), [("nf4", 448, 0.0159), ("fp4", 240, 0.0), ("int4", 448, 0.0)])
def test_the_table_is_scaled_to_the_least_error(format, largest, error):
    table = qj.quantize(jnp.ones((2, 64)), format).codec.table
    entries, factor = fp8.table8(table)
    exact = np.asarray(table, np.float64)
    values = entries.astype(np.float64)
    assert np.abs(values).max() == largest
    found = np.sqrt(np.mean((values / factor - exact) ** 2) / np.mean(exact**2))
    assert found == pytest.approx(error, abs=1e-4)
    two = rounded((exact * 256).astype(np.float32)) / 256
    assert np.sqrt(np.mean((two - exact) ** 2) / np.mean(exact**2)) > found + 0.003  # a power of two leaves more


@pytest.mark.parametrize(
    ("times", "runs", "rows"),
    [
        (1e3, (0.0245, 0.0257), (0.0259, 0.0271)),
        (1e4, (0.0245, 0.0257), (0.0265, 0.0278)),
        (1e5, (0.0385, 0.0405), (0.12, 0.13)),
        (1e6, (0.235, 0.240), (0.94, 0.97)),
    ],
)
def test_what_a_row_loses_beside_one_large_value(times, runs, rows):
    """Error of the other values, root mean square over theirs: 64 share the large one's scale, or all 1,024 do."""
    x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    x[:, 77] = times
    others = np.arange(1024) != 77
    for run, (low, high) in ((64, runs), (1024, rows)):
        values, scales = fp8.quantize(x, run)
        back = np.asarray(values, np.float64) * np.repeat(np.asarray(scales, np.float64), run, axis=1)
        assert low < np.sqrt(np.mean(np.square(back - x)[:, others]) / np.mean(np.square(x[:, others]))) < high, run


ACTIVATIONS = {
    "normal": lambda rng, x: x,
    "eight features of 1,024 fifty times as large": lambda rng, x: x * np.where(np.arange(1024) % 128 == 5, 50, 1),
    "one value a row a thousand times as large": lambda rng, x: x * np.where(np.arange(1024) == 77, 1000, 1),
    "Student's t, 3 degrees of freedom": lambda rng, x: rng.standard_t(3, x.shape),
}


@pytest.mark.parametrize(
    ("format", "activations", "fp8", "fp8_row"),
    [
        ("nf4", "normal", (0.0315, 0.0328), (0.0325, 0.0338)),
        ("fp4", "normal", (0.0245, 0.0257), (0.0259, 0.0271)),
        ("int4", "normal", (0.0245, 0.0257), (0.0259, 0.0271)),
        ("nf4", "eight features of 1,024 fifty times as large", (0.0195, 0.0225), (0.0265, 0.0295)),
        ("fp4", "eight features of 1,024 fifty times as large", (0.0052, 0.0061), (0.0188, 0.0208)),
        ("int4", "eight features of 1,024 fifty times as large", (0.0052, 0.0061), (0.0188, 0.0208)),
        ("nf4", "one value a row a thousand times as large", (0.0185, 0.0210), (0.0185, 0.0210)),
        ("fp4", "one value a row a thousand times as large", (0.0004, 0.0012), (0.0004, 0.0012)),
        ("nf4", "Student's t, 3 degrees of freedom", (0.0280, 0.0305), (0.0305, 0.0330)),
        ("int4", "Student's t, 3 degrees of freedom", (0.0205, 0.0225), (0.0237, 0.0259)),
    ],
)
def test_error_against_the_full_product(format, activations, fp8, fp8_row):
    """Root mean square of the difference over that of the full product, W normal [512, 1024], x [256, 1024].

    A value that stands out of its run (or row) is the one that sets the scale: it becomes 448, exactly.
    """
    rng = np.random.default_rng(0)
    q = qj.quantize(jnp.asarray(rng.normal(size=(512, 1024)), jnp.float32), format)
    x = jnp.asarray(ACTIVATIONS[activations](rng, rng.normal(size=(256, 1024))), jnp.float32)
    full = nf4_matmul.matmul(x, q.packed, q.codec)
    for compute, (low, high) in zip(EIGHT_BIT, (fp8, fp8_row), strict=True):
        eight_bit = nf4_matmul.matmul(x, q.packed, q.codec._replace(compute=compute))
        error = float(jnp.sqrt(jnp.mean(jnp.square(eight_bit - full)) / jnp.mean(jnp.square(full))))
        assert low < error < high, compute
