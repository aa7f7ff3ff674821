"""The op: its packed layout, products and gradients against float64, and what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import qlora_jax as qj
from pallas_kernels.nf4_matmul import dequantize, unpack
from qlora_jax.quant.tensor import QuantizedTensor
from tests.kernels.weights import dequantized, random_weight

SHAPES = [(64, 96), (7, 33), (96, 86)]  # blocks in rows; an odd count; blocks that cross rows and a short last one


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight(shape: tuple[int, int], double_quant: bool = True) -> QuantizedTensor:
    packed, codec = random_weight(shape, double_quant=double_quant)
    return QuantizedTensor(*packed, shape=shape, format="nf4", block_size=codec.block_size)


def by_definition(q: QuantizedTensor) -> np.ndarray:
    """float64 [O, I], one value at a time as the layout says it."""
    codec = q.codec
    n, half = codec.shape[0] * codec.shape[1], q.codes.shape[0]
    codes, absmax = np.asarray(q.codes), np.asarray(q.absmax)
    if q.double_quant:
        nested = np.asarray(q.nested_absmax)[np.arange(len(absmax)) // 256]
        absmax = np.float32(codec.absmax_map)[absmax] * nested + np.asarray(q.offset)
    values = [
        codec.table[codes[j] & 15 if j < half else codes[j - half] >> 4] * float(absmax[j // codec.block_size])
        for j in range(n)
    ]
    return np.asarray(values).reshape(codec.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_layout(shape, double_quant):
    """Byte j holds value j low and value j + ceil(n / 2) high; runs of block_size values share a scale."""
    q = weight(shape, double_quant)
    found = np.asarray(jax.jit(lambda packed: dequantize(packed, q.codec, jnp.dtype("float32")))(q.packed))
    np.testing.assert_allclose(found, by_definition(q), rtol=2e-7, atol=0)
    np.testing.assert_array_equal(found, dequantized(q.packed, q.codec))  # what the kernels' tests compare with


def test_both_ways_of_scaling_agree():
    """Where no block crosses the middle the halves are scaled apart: the values must not differ."""
    w = normal(8, 64)
    fast = qj.quantize(jnp.asarray(w), block_size=64, double_quant=False)
    nine_rows = np.concatenate([w, np.ones((1, 64), np.float32)])
    crossing = qj.quantize(jnp.asarray(nine_rows), block_size=64, double_quant=False)
    np.testing.assert_array_equal(qj.dequantize(fast, jnp.float32), qj.dequantize(crossing, jnp.float32)[:8])


def test_unpack():
    codes = jnp.asarray([0x21, 0x43, 0x75], jnp.uint8)
    assert unpack(codes, 6).tolist() == [1, 3, 5, 2, 4, 7]
    assert unpack(codes, 5).tolist() == [1, 3, 5, 2, 4]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_product_and_gradient(shape, dtype, tolerance):
    O, I = shape
    q = weight(shape)
    w = dequantized(q.packed, q.codec).astype(np.float64)
    x, dy = jnp.asarray(normal(2, 5, I, seed=1), dtype), jnp.asarray(normal(2, 5, O, seed=2), dtype)

    @jax.jit
    def both(x, dy, q):
        y, pullback = jax.vjp(lambda x: qj.matmul(x, q), x)
        return y, pullback(dy)[0]

    y, dx = both(x, dy, q)
    assert y.dtype == dx.dtype == dtype
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    for found, expected in ((y, x64 @ w.T), (dx, dy64 @ w)):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


def test_vmap_over_x():
    q = weight((24, 40))
    x = jnp.asarray(normal(3, 4, 40, seed=1))
    both = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(qj.matmul(x, q))))
    alone = jax.jit(both)
    for found, *apart in zip(jax.jit(jax.vmap(both))(x), *map(alone, x), strict=True):
        np.testing.assert_allclose(found, np.stack(apart), rtol=1e-4, atol=1e-4)


def test_wrong_feature_count():
    q = weight((8, 32))
    with pytest.raises(ValueError, match=r"x has 31 features, the weight \[out, in\] = \[8, 32\] takes 32"):
        qj.matmul(jnp.ones((2, 31)), q)


def test_residuals_are_the_packed_arrays(capsys):
    """Nothing of O * I floating-point values is kept for the backward pass."""
    O, I = 64, 96
    q = weight((O, I))
    print_saved_residuals(lambda x: jnp.sum(jnp.sin(qj.matmul(x, q))), jnp.ones((4, I), jnp.bfloat16))
    printed = capsys.readouterr().out
    _, pullback = jax.vjp(lambda x: qj.matmul(x, q), jnp.ones((4, I), jnp.bfloat16))
    kept = jax.tree.leaves(pullback)
    assert any(leaf.dtype == jnp.uint8 and leaf.size == O * I // 2 for leaf in kept)
    assert not any(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= O * I for leaf in kept)
    assert f"[{O},{I}]" not in printed and f"[{O * I}]" not in printed
    # the check itself can fail: the plain way keeps W
    _, plain = jax.vjp(lambda x: x @ qj.dequantize(q).T, jnp.ones((4, I), jnp.bfloat16))
    assert any(leaf.size == O * I for leaf in jax.tree.leaves(plain))
