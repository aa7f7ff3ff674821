"""Timing: the forms compute the same in every round, take turns, and what a call costs once is in no figure."""

import re

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
    values = {name: jax.block_until_ready(run(np.int32(3))) for name, (run, _) in forms.items()}
    assert list(values) == ["xla", "dense"]
    for output, dense in zip(values["xla"], values["dense"], strict=True):
        np.testing.assert_allclose(output, dense, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(*values["dense"])  # each copy is another weight


@pytest.mark.parametrize("form", ["xla", "dense"])
def test_every_round_computes_every_product(form):
    """The compiled loop holds a product for each copy, and the work on packed weights: nothing went before it."""
    run = measure.forms(case("forward"), CODEC, copies=3, backends=("xla",))[form][0]
    text = run.func.lower(*run.args, np.int32(2)).compile().as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    body = computations[re.search(r"while\(.*body=%?([\w.\-]+)", text).group(1)]
    called = re.findall(r"calls=%?([\w.\-]+)", body)
    inside = body + "".join(computations.get(name, "") for name in called)
    assert len(re.findall(r"= f32\[3,64\]\S* (?:dot|custom-call)\(", inside)) == 3
    assert form == "dense" or re.search(r"u8\[\d+\]", body)


def test_bytes_are_those_of_the_packed_weight_and_the_activations():
    forms = measure.forms(case("forward"), CODEC, copies=1, backends=("xla",))
    activations = 3 * (64 + 128) * 4
    assert forms["dense"][1] == 64 * 128 * 4 + activations
    assert forms["xla"][1] == 64 * 128 // 2 + 128 + 4 + 4 + activations  # codes, scales, nested scale, offset


def test_forms_take_turns_and_what_a_call_costs_is_left_out(monkeypatch):
    """A clock on which a call takes 100 s and a round of "a" 4 s, of "b" 0.001 s."""
    now, turns = [0.0], []

    def run(name, seconds):
        def rounds_of(rounds):
            turns.append((name, int(rounds)))
            now[0] += 100 + seconds * int(rounds)

        return rounds_of

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    found = measure.interleaved({"a": run("a", 4.0), "b": run("b", 0.001)}, repeats=2, copies=2)
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(0.0005, rel=1e-6)}
    assert turns[4:] == 2 * [("a", 3), ("a", 1), ("b", 3), ("b", 1)]


def test_a_form_that_fails_says_why_and_the_others_run():
    def broken(rounds):
        raise RuntimeError("out of registers\nand more")

    running, failing = measure.split_failing({"a": lambda rounds: jnp.ones(1), "b": broken})
    assert list(running) == ["a"] and failing == {"b": "RuntimeError: out of registers"}
