"""Every backend on a real GPU against a float32 product there: value, gradient, packs, formats, blocks, ragged edges.

Small weights, so that the 50-odd cases take two minutes, most of it compiling (make gpu-check).
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import api, config
from pallas_kernels.nf4_matmul.triton import scratch
from tests.kernels.weights import dequantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: the kernels run in the interpreter only"),
]

UNIT_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
KERNELS = [backend for backend in nf4_matmul.BACKENDS if backend != "auto"]

# rows, dtype, shape [O, I], block size, format, double quantization
CASES = {
    "1 row": (1, "bfloat16", (1024, 2048), 64, "nf4", True),
    "a few rows": (17, "float16", (1024, 2048), 64, "nf4", True),
    "some rows": (100, "bfloat16", (1024, 2048), 64, "nf4", True),
    "training rows": (2048, "bfloat16", (1024, 2048), 64, "nf4", True),
    "ragged training rows": (1111, "float16", (1024, 2048), 64, "nf4", False),
    "Llama-7B's down projection": (300, "bfloat16", (4096, 11008), 64, "nf4", True),
    "fp4": (33, "bfloat16", (512, 1024), 64, "fp4", True),
    "int4": (256, "float16", (512, 1024), 64, "int4", True),
    "blocks of 32": (65, "bfloat16", (512, 1024), 32, "nf4", True),
    "blocks of 128": (130, "bfloat16", (512, 1024), 128, "nf4", True),
    "blocks of 256": (16, "float16", (512, 1024), 256, "nf4", True),
    "out-features that fill no tile": (50, "bfloat16", (330, 448), 64, "nf4", True),
    "blocks that cross rows": (50, "bfloat16", (65, 67), 64, "nf4", True),
}


def quantized(shape, block_size=64, format="nf4", double_quant=True, seed=0) -> qj.QuantizedTensor:
    return qj.quantize(jax.random.normal(jax.random.key(seed), shape), format, block_size, double_quant)


def codec_of(q: qj.QuantizedTensor, backend: str, dtype: str) -> nf4_matmul.Codec:
    """The codec with that backend, which must be here and take the weight; else the test is skipped with the reason."""
    codec = q.codec._replace(backend=backend)
    if backend == "mosaic" and str(jax.devices()[0].compute_capability) != "9.0":
        pytest.skip("the Mosaic kernels are for Hopper")
    if backend in ("triton", "scratch") and importlib.util.find_spec("jax_triton") is None:
        pytest.fail("jax-triton is missing: pip install jax-triton==0.4.1")
    if (refusal := api.refusal(codec, jnp.dtype(dtype))) is not None:
        pytest.skip(f"refused: {refusal}")
    return codec


@functools.partial(jax.jit, static_argnums=2)
def exact_and_bound(left: jax.Array, w: jax.Array, contract: int) -> tuple[jax.Array, jax.Array]:
    """Errors of the terms are independent: six standard deviations of three roundings, and the result's own."""
    exact = nf4_matmul.dense_matmul(left.astype(jnp.float32), w, contract)
    magnitude = jnp.sqrt(nf4_matmul.dense_matmul(left.astype(jnp.float32) ** 2, w**2, contract))
    return exact, UNIT_ROUNDOFF[left.dtype.name] * (6 * 3**0.5 * magnitude + jnp.abs(exact))


def check(found: jax.Array, left: jax.Array, w: jax.Array, contract: int) -> None:
    exact, bound = exact_and_bound(left, w, contract)
    assert found.dtype == left.dtype
    assert np.all(np.abs(np.asarray(found, np.float32) - np.asarray(exact)) <= np.asarray(bound))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_value_and_gradient(backend, name):
    rows, dtype, shape, block_size, format, double_quant = CASES[name]
    rows = min(rows, config.FEW_ROWS) if backend == "triton" else rows  # more are scratch's
    q = quantized(shape, block_size, format, double_quant)
    codec = codec_of(q, backend, dtype)
    keys = jax.random.split(jax.random.key(1), 2)
    x, dy = (jax.random.normal(key, (rows, shape[axis]), dtype) for key, axis in zip(keys, (1, 0), strict=True))

    @jax.jit
    def both(x, dy, packed):
        y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, packed, codec), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy, q.packed)
    w = qj.dequantize(q, jnp.float32)
    check(y, x, w, 1)
    check(dx, dy, w, 0)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_pack_of_adapters_in_a_scan_over_layers(backend):
    """vmap over 3 adapters of 20 rows (triton: 5), 2 stacked layers, gradient of the whole: against "xla" there."""
    layers = [quantized((512, 512), seed=seed) for seed in (0, 1)]
    codec = codec_of(layers[0], backend, "bfloat16")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(q.packed for q in layers))
    x = jax.random.normal(jax.random.key(2), (3, 5 if backend == "triton" else 20, 512), "bfloat16")

    def gradient(codec):
        def loss(x, packed):
            y, _ = jax.lax.scan(lambda x, p: (nf4_matmul.matmul(x, p, codec) / 16, None), x, packed)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return np.asarray(jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(x, stacked), np.float32)

    expected = gradient(codec._replace(backend="xla"))
    np.testing.assert_allclose(gradient(codec), expected, rtol=0, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_weights_that_share_a_launch(backend, rows):
    """Queries, keys and values, their sums in parts: right, and the same bits whatever order programs end in."""
    weights = [quantized((out, 2048), seed=seed) for seed, out in enumerate((2048, 512, 512))]
    codecs = tuple(codec_of(q, backend, "bfloat16") for q in weights)
    packed = tuple(q.packed for q in weights)
    x = jax.random.normal(jax.random.key(1), (rows, 2048), "bfloat16")
    product = jax.jit(lambda x, packed: api.matmul_joined(x, packed, codecs))

    y = product(x, packed)

    check(y, x, jnp.concatenate([qj.dequantize(q, jnp.float32) for q in weights]), 1)
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(product(x, packed)), np.asarray(y))


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("name", ["1 row", "fp4", "int4", "blocks of 256", "blocks that cross rows"])
def test_the_scratch_is_exact_to_the_bit(name, dtype):
    _, _, shape, block_size, format, double_quant = CASES[name]
    q = quantized(shape, block_size, format, double_quant)
    codec = codec_of(q, "scratch", dtype)
    found = jax.jit(lambda packed: scratch.dequantize(packed, codec, jnp.dtype(dtype)))(q.packed)
    expected = dequantized(q.packed, codec, dtype)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))
