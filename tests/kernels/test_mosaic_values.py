"""The Mosaic kernels in Mosaic's interpreter on the CPU, against the dequantized weight.

The interpreter runs copies, barriers and the three warpgroups of a program, and finds races among them. It computes
wgmma at once: what a wait for wgmma orders is not seen here. It has no registers and no inline PTX: a warpgroup's
operand is computed by plain JAX and put into shared memory, and sums are stored as what they are. What a GPU does in
their place is test_mosaic_fragments.py's and test_mosaic_hopper_compile.py's. A copy to both programs of a cluster is
two copies here.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import nf4_matmul
from pallas_kernels.nf4_matmul import Codec, Packed, config
from pallas_kernels.nf4_matmul.mosaic import hopper as mosaic_hopper
from tests.kernels.weights import dequantized, random_weight, whole_numbers

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# shape, block size, whether scales are nested, rows, dtype
CASES = {
    "two tiles that the rows do not fill": ((256, 512), 64, True, 300, jnp.float16),
    "17 rows, more out": ((512, 256), 128, True, 17, jnp.bfloat16),
    "a whole tile, blocks as wide as a program of the backward pass": ((256, 512), 256, False, 128, jnp.bfloat16),
    "blocks of several programs": ((256, 1024), 512, True, 20, jnp.bfloat16),
}


@pytest.fixture
def interpreter(monkeypatch):
    """Its state outlives a failure and is cleared first; what it saw of races counts."""
    monkeypatch.setattr(callback, "io_callback_impl", call_at_once)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    yield
    assert not interpret_pallas_call.get_races().races_found


def call_at_once(*arguments, callback, **_):
    """JAX puts each argument on its device first, whence the interpreter takes it back: half of the time of a test."""
    return jax.tree.map(np.asarray, callback(*[int(x) if is_whole(x) else x for x in arguments]))


def is_whole(x) -> bool:
    return np.ndim(x) == 0 and np.issubdtype(x.dtype, np.integer)


@pytest.mark.quick_compile  # nothing is rounded
@pytest.mark.parametrize("op", config.OPS)
@pytest.mark.parametrize("case", CASES)
def test_whole_numbers_come_out_exactly(case, op, interpreter):
    """No rounding but the result's: one wrong index of codes, scales, x or y and this fails."""
    shape, block_size, nested, rows, dtype = CASES[case]
    assert mosaic_hopper.unsupported(shape, block_size, dtype) is None
    packed, codec = whole_numbers(shape, block_size, nested, seed=len(case))
    w = dequantized(packed, codec)
    w = w.T if op == "forward" else w
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (rows, w.shape[0])), dtype)

    kernel = getattr(mosaic_hopper, op)
    found = jax.jit(lambda x, packed: kernel(x, packed, codec, INTERPRET))(x, packed)

    expected = np.asarray(jnp.asarray(np.asarray(x, np.float32) @ w, dtype), np.float32)
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def test_a_scale_that_is_not_finite_is_not_hidden(interpreter):
    packed, codec = random_weight((256, 256), double_quant=False)
    spoiled = packed._replace(absmax=packed.absmax.at[7].set(jnp.nan))  # of row 1, its last block
    x = jnp.asarray(np.random.default_rng(0).normal(size=(128, 256)), jnp.bfloat16)
    found = jax.jit(lambda x, packed: mosaic_hopper.forward(x, packed, codec, INTERPRET))(x, spoiled)
    found = np.asarray(found, np.float32)
    assert np.isnan(found[:, 1]).all() and np.isfinite(np.delete(found, 1, axis=1)).all()


def test_behind_the_dispatch_only_weights_and_the_result_are_rounded(monkeypatch, interpreter):
    """What a train step calls: matmul with backend "mosaic", and its gradient."""
    for op in config.OPS:
        monkeypatch.setattr(mosaic_hopper, op, functools.partial(getattr(mosaic_hopper, op), interpret=INTERPRET))
    packed, codec = random_weight((256, 256))
    codec = codec._replace(backend="mosaic")
    rng = np.random.default_rng(3)
    x, dy = (jnp.asarray(rng.normal(size=(2, 5, 256)), jnp.bfloat16) for _ in range(2))
    for op in config.OPS:
        assert nf4_matmul.path(codec, x.dtype, op, 10) == "mosaic"
        assert nf4_matmul.path(codec, jnp.float32, op, 10) == "xla"

    @jax.jit
    def both(x, dy, packed):
        y, pullback = jax.vjp(lambda x: nf4_matmul.matmul(x, packed, codec), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy, packed)
    w = in_two_parts(packed, codec)
    for found, left, right in ((y, x, w.T), (dx, dy, w)):
        left = np.asarray(left, np.float64)
        exact, sum_error = left @ right, 256 * 2.0**-24 * (np.abs(left) @ np.abs(right))
        error = np.abs(np.asarray(found, np.float64) - exact)
        assert np.all(error <= 2.0**-8 * (np.abs(exact) + sum_error) + sum_error)


def in_two_parts(packed: Packed, codec: Codec) -> np.ndarray:
    """W of the rounded table and of scales that are sums of two bfloat16, rounded once, in float64."""
    rounded = tuple(float(value) for value in np.asarray(codec.table, np.float32).astype(jnp.bfloat16))
    nested = np.repeat(np.asarray(packed.nested_absmax), 256)[: packed.absmax.size]
    scales = np.asarray(codec.absmax_map, np.float32)[np.asarray(packed.absmax)] * nested + np.asarray(packed.offset)
    hi = scales.astype(jnp.bfloat16).astype(np.float32)
    scales = hi + (scales - hi).astype(jnp.bfloat16).astype(np.float32)
    plain = Packed(packed.codes, jnp.asarray(scales), None, None)
    return dequantized(plain, codec._replace(table=rounded), jnp.bfloat16).astype(np.float64)


def test_without_a_hopper_it_says_so():
    packed, codec = random_weight((256, 256))
    with pytest.raises(RuntimeError, match="Hopper"):
        nf4_matmul.matmul(jnp.ones((1, 256), jnp.bfloat16), packed, codec._replace(backend="mosaic"))
