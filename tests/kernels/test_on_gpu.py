"""The Triton and Mosaic kernels on a real GPU, against XLA's float32 product there (make gpu-check)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import fp8, triton_fp8_backend
from pallas_kernels.nf4_matmul.mosaic_hopper import HOPPER
from pallas_kernels.nf4_matmul.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: the kernels run in the interpreter only"),
]

UNIT_ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100, 300, 2048])
@pytest.mark.parametrize("name", ["tinyllama-1b/key_value", "tinyllama-1b/down", "llama-7b/gate_up"])
def test_value_and_gradient(name, rows, dtype, backend):
    if backend == "mosaic" and not jax.devices()[0].device_kind.removeprefix("NVIDIA ").startswith(HOPPER):
        pytest.skip("the Mosaic kernels are for Hopper")
    shape = SHAPES[name]
    keys = jax.random.split(jax.random.key(rows), 3)
    q = qj.quantize(jax.random.normal(keys[0], tuple(shape)))
    codec = q.codec._replace(backend=backend)
    x = jax.random.normal(keys[1], (rows, shape.in_features), dtype)
    dy = jax.random.normal(keys[2], (rows, shape.out_features), dtype)
    y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, q.packed, codec), x)
    (dx,) = pullback(dy)
    w = qj.dequantize(q, jnp.float32)
    for found, left, contract in ((y, x, 1), (dx, dy, 0)):
        exact = nf4_matmul.dense_matmul(left.astype(jnp.float32), w, contract)
        magnitude = jnp.sqrt(nf4_matmul.dense_matmul(left.astype(jnp.float32) ** 2, w**2, contract))
        # errors of the terms are independent: six standard deviations of three roundings, and the result's own
        bound = UNIT_ROUNDOFF[dtype] * (6 * 3**0.5 * magnitude + jnp.abs(exact))
        assert found.dtype == dtype
        assert np.all(np.abs(np.asarray(found, np.float32) - np.asarray(exact)) <= np.asarray(bound))


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("rows", [1, 17, 100, 300, 2048])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("name", ["tinyllama-1b/key_value", "llama-7b/gate_up"])
@pytest.mark.parametrize("compute", ["fp8", "fp8_row"])
def test_8_bit_value(compute, name, block_size, rows, dtype):
    """Against the emulation of the same roundings: what is left are sums, which 8-bit tensor cores may keep shorter."""
    shape = SHAPES[name]
    if reason := triton_fp8_backend.unsupported(shape, block_size, jnp.dtype(dtype)):
        pytest.skip(reason)
    keys = jax.random.split(jax.random.key(rows), 2)
    q = qj.quantize(jax.random.normal(keys[0], tuple(shape)), block_size=block_size)
    x = jax.random.normal(keys[1], (rows, shape.in_features), dtype)
    codec = q.codec._replace(backend="triton", compute=compute)
    found = nf4_matmul.matmul(x, q.packed, codec)
    exact = fp8.forward(x.astype(jnp.float32), q.packed, codec)
    magnitude = nf4_matmul.dense_matmul(jnp.abs(x).astype(jnp.float32), jnp.abs(qj.dequantize(q, jnp.float32)), 1)
    error = np.abs(np.asarray(found, np.float32) - np.asarray(exact))
    assert found.dtype == dtype
    assert np.all(error <= 2 * UNIT_ROUNDOFF[dtype] * np.abs(np.asarray(exact)) + 2.0**-11 * np.asarray(magnitude))
    assert np.sqrt(np.mean(error**2)) < 0.004 * np.sqrt(np.mean(np.square(exact)))
