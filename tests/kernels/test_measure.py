"""Timing: the forms compute the same and take turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import Codec, config, measure
from pallas_kernels.nf4_matmul.shapes import Shape

CODEC = Codec((64, 128), 64, tuple(k / 8 - 1 for k in range(16)), tuple(k / 255 for k in range(256)))


def case(op: config.Op) -> measure.Case:
    return measure.Case(op, Shape(64, 128), rows=3, block_size=64, dtype="float32")


@pytest.mark.parametrize("op", config.OPS)
def test_all_forms_compute_the_same(op):
    forms = measure.forms(case(op), CODEC, copies=2, backends=("xla",))
    values = {name: jax.block_until_ready(run()) for name, (run, _) in forms.items()}
    assert list(values) == ["xla", "dense", "dequantize, dot"]
    for name, outputs in values.items():
        assert len(outputs) == 2
        for output, dense in zip(outputs, values["dense"], strict=True):
            np.testing.assert_allclose(output, dense, rtol=1e-5, atol=1e-5, err_msg=name)
    assert not np.array_equal(*values["dense"])  # each copy is another weight


def test_bytes_are_those_of_the_packed_weight_and_the_activations():
    forms = measure.forms(case("forward"), CODEC, copies=1, backends=("xla",))
    activations = 3 * (64 + 128) * 4
    assert forms["dense"][1] == 64 * 128 * 4 + activations
    assert forms["xla"][1] == 64 * 128 // 2 + 128 + 4 + 4 + activations  # codes, scales, nested scale, offset


def test_forms_take_turns():
    turns = []
    seconds = measure.interleaved({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=3, copies=1)
    assert turns == ["a", "b"] * 4  # the first turn compiles
    assert set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_a_form_that_fails_says_why_and_the_others_run():
    def broken():
        raise RuntimeError("out of registers\nand more")

    running, failing = measure.split_failing({"a": lambda: jnp.ones(1), "b": broken})
    assert list(running) == ["a"] and failing == {"b": "RuntimeError: out of registers"}
