"""The Mosaic kernels in Mosaic's interpreter on the CPU, against the dequantized weight.

The interpreter runs copies, barriers and the three warpgroups of a program, and finds races among them. It computes
wgmma at once: what a wait for wgmma orders is not seen here. It has no inline PTX: values are looked up by selects, and
test_mosaic_decode.py compares the two.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

import qlora_jax as qj
from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Codec, Packed, config, dequantize
from pallas_kernels.nf4_matmul.mosaic import hopper as mosaic_hopper
from tests.kernels.weights import whole_numbers

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# shape, block size, whether scales are nested, rows, dtype
CASES = {
    "one tile": ((256, 256), 64, False, 128, jnp.bfloat16),
    "rows that fill no tile": ((256, 256), 64, True, 130, jnp.float16),
    "few rows, more out": ((512, 256), 128, True, 3, jnp.bfloat16),
    "more in": ((256, 768), 64, True, 128, jnp.bfloat16),
    "blocks as wide as a program of the backward pass": ((256, 512), 256, True, 128, jnp.bfloat16),
    "blocks of several programs": ((256, 1024), 512, False, 128, jnp.bfloat16),
}


def matmul(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> np.ndarray:
    """y or dx as float32; the interpreter's state outlives a failure and is cleared first."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    kernel = mosaic_hopper.forward if op == "forward" else mosaic_hopper.backward
    found = jax.jit(lambda x, packed: kernel(x, packed, codec, INTERPRET))(x, packed)
    found = np.asarray(found, np.float32)
    assert not interpret_pallas_call.get_races().races_found
    return found


@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case, op):
    """No rounding but the result's: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, dtype = CASES[case]
    assert mosaic_hopper.unsupported(shape, block_size, dtype) is None
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    w = np.asarray(dequantize(packed, codec, jnp.float32))
    w = w.T if op == "forward" else w
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (rows, w.shape[0])), dtype)

    found = matmul(op, x, packed, codec)

    expected = np.asarray(jnp.asarray(np.asarray(x, np.float32) @ w, dtype), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("op", config.OPS)
def test_only_weights_and_the_result_are_rounded(op):
    rng = np.random.default_rng(0)
    q = qj.quantize(jnp.asarray(rng.normal(size=(256, 256)), jnp.float32))
    rounded = tuple(float(value) for value in np.asarray(q.codec.table, np.float32).astype(jnp.bfloat16))
    w = np.asarray(dequantize(q.packed, q.codec._replace(table=rounded), jnp.bfloat16), np.float64)
    w = w.T if op == "forward" else w
    x = jnp.asarray(rng.normal(size=(128, 256)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ w

    found = matmul(op, x, q.packed, q.codec)

    sum_error = 256 * 2.0**-24 * (np.abs(np.asarray(x, np.float64)) @ np.abs(w))
    assert np.all(np.abs(found - exact) <= 2.0**-8 * (np.abs(exact) + sum_error) + sum_error)


def test_a_scale_that_is_not_finite_is_not_hidden():
    rng = np.random.default_rng(0)
    q = qj.quantize(jnp.asarray(rng.normal(size=(256, 256)), jnp.float32), double_quant=False)
    spoiled = q.packed._replace(absmax=q.packed.absmax.at[7].set(jnp.nan))  # of row 1, its last block
    found = matmul("forward", jnp.asarray(rng.normal(size=(128, 256)), jnp.bfloat16), spoiled, q.codec)
    assert np.isnan(found[:, 1]).all() and np.isfinite(np.delete(found, 1, axis=1)).all()


def test_behind_the_dispatch_and_its_gradient(monkeypatch):
    """What a train step calls: matmul with backend "mosaic", forward and backward."""
    q = qj.quantize(jnp.asarray(np.random.default_rng(2).normal(size=(256, 256)), jnp.float32))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 256)), jnp.bfloat16)
    for op in config.OPS:
        kernel = getattr(mosaic_hopper, op)
        monkeypatch.setattr(mosaic_hopper, op, functools.partial(kernel, interpret=INTERPRET))

    def gradient(backend):
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        codec = q.codec._replace(backend=backend)
        loss = lambda x: jnp.sum(nf4_matmul.matmul(x, q.packed, codec).astype(jnp.float32) ** 2)  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(x), np.float32)

    assert nf4_matmul.path(q.codec._replace(backend="mosaic"), x.dtype) == "mosaic"
    assert nf4_matmul.path(q.codec._replace(backend="mosaic"), jnp.float32) == "xla"
    expected = gradient("xla")
    np.testing.assert_allclose(gradient("mosaic"), expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_without_a_hopper_it_says_so():
    q = qj.quantize(jnp.ones((256, 256)))
    with pytest.raises(RuntimeError, match="Hopper"):
        nf4_matmul.matmul(jnp.ones((1, 256), jnp.bfloat16), q.packed, q.codec._replace(backend="mosaic"))
