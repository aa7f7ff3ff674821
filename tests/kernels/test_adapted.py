"""Packed products with B beside W are those of W and B apart: the form for GPUs, computed here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import adapted, reference
from pallas_kernels.nf4_matmul.operands import dequantize
from qlora_jax.quant.codebooks import absmax_map
from qlora_jax.quant.tensor import quantize
from tests.random_arrays import random_normal

I, R, M = 64, 4, 6  # noqa: E741


@pytest.mark.parametrize("heights", [(48, 48, 48), (96, 32, 32), (128,)])
def test_b_beside_w_is_both_apart(heights):
    weights = [quantize(random_normal(k, (O, I))) for k, O in enumerate(heights)]  # noqa: E741
    packed, codecs = tuple(w.packed for w in weights), tuple(w.codec for w in weights)
    b = tuple(random_normal(10 + k, (O, R)) for k, O in enumerate(heights))  # noqa: E741
    x, low_rank = random_normal(20, (M, I)), random_normal(21, (len(heights), M, R))
    dy = random_normal(22, (M, sum(heights)))
    dense = [np.asarray(dequantize(*pair, jnp.dtype(jnp.float32))) for pair in zip(packed, codecs, strict=True)]
    expected = np.concatenate([x @ w.T + lr @ v.T for w, lr, v in zip(dense, low_rank, b, strict=True)], axis=1)
    for forward in (adapted._forward_apart, adapted._forward_together):
        np.testing.assert_allclose(forward(x, low_rank, b, packed, codecs), expected, rtol=1e-4, atol=1e-4)
    parts = np.split(np.asarray(dy), np.cumsum(heights)[:-1], axis=1)
    dx = sum(part @ w for part, w in zip(parts, dense, strict=True))
    d_low_rank = np.stack([part @ np.asarray(v) for part, v in zip(parts, b, strict=True)])
    for backward in (adapted._backward_apart, adapted._backward_together):
        found = backward(dy, low_rank, b, packed, codecs)
        np.testing.assert_allclose(found[0], dx, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], d_low_rank, rtol=1e-4, atol=1e-4)


def test_a_gpus_program_has_one_product_where_y_is_wider_than_x_and_a_packs_has_none_with_b_beside_w():
    w = quantize(random_normal(0, (128, I)))
    b = random_normal(1, (128, R))
    x, low_rank = random_normal(2, (3, M, I)), random_normal(3, (3, 1, M, R))
    one = lambda x, low_rank, b: adapted._adapted(x, low_rank, (b,), (w.packed,), (w.codec,))  # noqa: E731

    def products(function, *arguments):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        return [line.split(" : ")[-1] for line in lowered.splitlines() if "dot_general" in line]

    assert [f"tensor<128x{I + R}xf32>" in line for line in products(one, x[0], low_rank[0], b)] == [True]
    pack = products(jax.vmap(one), x, low_rank, jnp.stack([b, b, b]))
    assert len(pack) == 2 and not any(f"x{I + R}xf32" in line for line in pack)


@pytest.mark.parametrize("form", ["a choice", "nothing"])
def test_what_keeps_a_scales_product_and_sum_apart_on_gpus(form):
    """The compiler contracts the plain form: a quarter of all scales differ in the last bit."""
    table = np.asarray(absmax_map(), np.float32)
    rng = np.random.default_rng(0)
    codes, offset = rng.integers(0, 256, 1 << 14).astype(np.uint8), np.float32(0.0371)
    nested = np.repeat(rng.uniform(0.01, 3, 64).astype(np.float32), 256)
    form_of = {"a choice": reference.rounded_product, "nothing": lambda mapped, nested, largest: mapped * nested}[form]
    largest = float(table.max())
    found = jax.jit(lambda c, n, o: form_of(jnp.asarray(table)[c.astype(jnp.int32)], n, largest) + o)(
        codes, nested, offset
    )
    differ = float((np.asarray(found) != table[codes] * nested + offset).mean())
    assert differ == 0 if form == "a choice" else differ > 0.1
