"""Our own form on disk gives back the same arrays, and names what is damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.quant.native import from_native, part_of, to_native


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_round_trip(format, double_quant):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((7, 33)), jnp.float32)
    q = qj.quantize(w, format, 32, double_quant)
    again = from_native(to_native(q, "a.w"), "a.w")
    assert jax.tree.structure(again) == jax.tree.structure(q)
    for x, y in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax", "offset", "meta"])
def test_every_part_is_needed(part):
    tensors = to_native(qj.quantize(jnp.ones((4, 32)), "nf4", 32), "w")
    del tensors[f"w.{part}"]
    with pytest.raises(qj.InputError, match="^w"):
        from_native(tensors, "w")


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax"])
def test_misshapen_part(part):
    tensors = to_native(qj.quantize(jnp.ones((4, 32)), "nf4", 32), "w")
    tensors[f"w.{part}"] = np.zeros(5, tensors[f"w.{part}"].dtype)
    with pytest.raises(qj.InputError, match=f"w.{part} is .* with 5 values; expected"):
        from_native(tensors, "w")


def test_part_of():
    assert part_of("a.weight.codes") == "a.weight"
    assert part_of("a.weight") is None
