"""Several data sets in one run: their formats, their shares of what is drawn, and what a run remembers of them."""

import json
from collections import Counter

import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.feed.load import load_data
from qlora_jax.feed.orders import Shares
from qlora_jax.feed.packing import PackedBatches
from tests.chat_templates import TWO_TURNS
from tests.feed.test_load import chat_tokenizer, config


def write(folder, name, count, length=1):
    rows = [{"input": f"{name} {number}", "output": "a" * (length + number % 3)} for number in range(count)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def paths(tmp_path):
    return [write(tmp_path, "big", 90), write(tmp_path, "small", 10, 9)]


def load(tokenizer, path, B=5, **changes):
    return load_data(config(**({"path": path, "eval_examples": 0} | changes)), tokenizer, B, 259)


def drawn(batches, first, last):
    """How often each set's examples come in the batches of some steps, by file and by example."""
    places = []
    for step in range(first, last):
        for part in batches.describe(step).split("; "):
            name, _, numbers = part.partition(", line")
            numbers = numbers.removeprefix("s").split(", ")
            places += [(name.rpartition("/")[2], int(number)) for number in numbers]
    return Counter(name for name, _ in places), Counter(places)


def test_without_weights_every_example_comes_once_an_epoch(paths, byte_tokenizer):
    data = load(byte_tokenizer, ",".join(paths))
    sets, examples = drawn(data.batches, 0, 20)
    assert sets == {"big.jsonl": 90, "small.jsonl": 10} and set(examples.values()) == {1}
    assert data.report[:2] == [
        f"data: {paths[0]} (input-output): 90 rows, 90 examples",
        f"data: {paths[1]} (input-output): 10 rows, 10 examples",
    ]
    assert f"data: 10.0% of the examples drawn are of {paths[1]}: each of its 10 once an epoch" in data.report
    assert "data: train on 100 examples" in "\n".join(data.report)
    assert load(byte_tokenizer, paths).inputs == load(byte_tokenizer, tuple(paths)).inputs == data.inputs


@pytest.mark.parametrize("grouped", [True, False])
def test_shares_of_the_examples_drawn(paths, byte_tokenizer, grouped):
    data = load(byte_tokenizer, ",".join(paths), weights=("0.6", 0.4), group_by_length=grouped)
    for epoch in range(4):
        sets, examples = drawn(data.batches, 20 * epoch, 20 * epoch + 20)
        assert sets == {"big.jsonl": 60, "small.jsonl": 40}
        assert {count for (name, _), count in examples.items() if name == "small.jsonl"} == {4}
        assert epoch or {count for (name, _), count in examples.items() if name == "big.jsonl"} == {1}
    _, three = drawn(data.batches, 0, 60)  # 180 of the big one: all of them twice before one comes again
    assert Counter(three.values()) == {2: 90, 12: 10}
    assert f"data: 40.0% of the examples drawn are of {paths[1]}: each of its 10 4.00 times on average an epoch" in (
        data.report
    )
    assert [source["share"] for source in data.sources] == [0.6, 0.4]


def test_batches_are_a_function_of_seed_and_step(paths, byte_tokenizer):
    def batches(**changes):
        return load(byte_tokenizer, ",".join(paths), weights=(1, 3), **changes).batches

    one, other = batches(), batches()
    for step in (37, 3, 0, 21):  # in any order, as a run that goes on asks
        assert np.array_equal(one.batch(step)["tokens"], other.batch(step)["tokens"])
    assert not np.array_equal(one.batch(3)["tokens"], batches(seed=1).batch(3)["tokens"])
    longest = max(len(example) for example in one.examples)
    assert any(len(one.examples[int(i)]) == longest for i in one._indices(0))


def test_the_longest_comes_first_even_of_a_small_share(tmp_path, byte_tokenizer):
    paths = [write(tmp_path, "a", 40), write(tmp_path, "b", 40, 6)]
    with open(paths[1], "a") as file:
        file.write(json.dumps({"input": "b", "output": "a" * 15}) + "\n")
    for seed in range(5):
        batches = load(byte_tokenizer, ",".join(paths), weights=(0.95, 0.05), seed=seed).batches
        assert "b.jsonl, line" in batches.describe(0) and " 41" in batches.describe(0)


def test_packed_rows_have_the_shares_too(tmp_path, byte_tokenizer):
    paths = [write(tmp_path, "short", 300), write(tmp_path, "long", 100, 12)]
    data = load(byte_tokenizer, ",".join(paths), B=4, weights=(0.5, 0.5), packing=True, pack_length=64)
    batches = data.batches
    assert isinstance(batches, PackedBatches)
    sets, examples = drawn(batches, 0, batches.steps_per_epoch * 10)
    assert abs(sets["short.jsonl"] / sum(sets.values()) - 0.5) < 0.03
    assert len(examples) == 400 and max(examples.values()) <= 60
    for row in range(batches.plan.rows):
        assert len({batches.examples[int(i)].where.split(",")[0] for i in batches.plan.of_row(row)}) == 1
    again = load(byte_tokenizer, ",".join(paths), B=4, weights=(5, 5), packing=True, pack_length=64).batches
    assert np.array_equal(again.batch(77)["tokens"], batches.batch(77)["tokens"])


def test_each_set_has_its_format(paths, tmp_path, golden):
    tokenizer = chat_tokenizer(tmp_path, golden)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": TWO_TURNS[:2]}) + "\n" for _ in range(3)))
    lengths = {"max_source_len": 64, "max_target_len": 64, "eval_examples": 0}
    both = f"{paths[1]},{chats}"
    given = load_data(config(path=both, format="input-output,messages", **lengths), tokenizer, 2, 500)
    found = load_data(config(path=both, format="auto", **lengths), tokenizer, 2, 500)
    assert given.inputs["data.path"].content == found.inputs["data.path"].content
    assert [source["format"] for source in found.sources] == ["input-output", "messages"]
    assert f"data: {chats} (messages, found from its rows): 3 rows, 3 examples" in found.report
    texts = {tokenizer.decode(example.tokens)[:5] for example in found.batches.examples}
    assert "user\n" in texts and "small" in texts  # the chats alone are in the template
    # the held-out set is read in the format at its place, or in its own
    held = config(path=both, format="input-output,messages", eval_path=str(chats), **lengths)
    assert len(load_data(held, tokenizer, 2, 500).heldout) == 3


def test_held_out_examples_of_several_sets(paths, byte_tokenizer):
    data = load(byte_tokenizer, ",".join(paths), eval_path=",".join(paths), eval_examples=7)
    assert Counter(example.where.rpartition("/")[2].split(",")[0] for example in data.heldout) == {
        "big.jsonl": 7, "small.jsonl": 7,
    }  # fmt: skip
    data = load(byte_tokenizer, ",".join(paths), eval_examples=20, weights=(1, 1))
    held = {example.where for example in data.heldout}
    assert len(held) == 20
    _, examples = drawn(data.batches, 0, 64)
    assert not {f"{paths[name == 'small.jsonl']}, line {number}" for name, number in examples} & held


def test_what_changed_is_named(paths, byte_tokenizer):
    before = load(byte_tokenizer, ",".join(paths)).inputs["data.path"]
    assert [name for name, _ in before.parts] == [paths[0], "the tokenizer", paths[1]]
    turned = load(byte_tokenizer, ",".join(paths[::-1])).inputs["data.path"]
    assert turned.content != before.content
    assert load(byte_tokenizer, ",".join(paths), weights=(1, 2)).inputs["data.path"] == before  # the config says these
    with open(paths[1], "a") as file:
        file.write('{"input": "x", "output": "y"}\n')
    after = load(byte_tokenizer, ",".join(paths)).inputs["data.path"]
    assert after.content != before.content
    changed = [a[0] for a, b in zip(before.parts, after.parts, strict=True) if a != b]
    assert changed == [paths[1]]


def test_one_set_is_read_again_when_another_changes(paths, byte_tokenizer):
    load(byte_tokenizer, ",".join(paths))
    with open(paths[1], "a") as file:
        file.write('{"input": "x", "output": "y"}\n')
    kept = [line.split(" in ")[0] for line in load(byte_tokenizer, ",".join(paths)).report[-2:]]
    assert kept == ["data: tokens read from what is kept", "data: tokens kept"]


def test_the_first_rows_alone(paths, byte_tokenizer):
    with open(paths[0], "a") as file:
        file.write("{ not read\n")
    data = load(byte_tokenizer, ",".join(paths), max_rows=20)
    assert [source["rows"] for source in data.sources] == [20, 10]
    assert data.report[1] == "data: at most 20 rows are read, by data.max_rows"
    assert [source["examples"] for source in load(byte_tokenizer, paths[1], max_examples=4).sources] == [4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (0.7,)}, r"data.weights has 1 weights and data.path 2 data sets \(.*big.jsonl, .*\); give one"),
        ({"weights": (0.7, 0)}, "data.weights has 0, expected numbers above 0, as 0.7,0.3"),
        ({"weights": ("0.7", "x")}, "data.weights has 'x', expected numbers"),
        ({"weights": (float("nan"), 1)}, "data.weights has nan"),
        ({"weights": (1, 1e-9)}, "data.weights: .*small.jsonl would have none of the 100 examples of an epoch; make"),
        ({"format": "alpaca,dolly,text"}, "data.format has 3 formats .* and data.path 2 data sets"),
        ({"format": "input-output,alpacca"}, "unknown data.format 'alpacca'"),
        ({"max_rows": -1}, "data.max_rows is -1"),
    ],
)
def test_settings_that_do_not_fit(paths, byte_tokenizer, changes, message):
    with pytest.raises(InputError, match=message):
        load(byte_tokenizer, ",".join(paths), **changes)


def test_a_set_of_which_all_is_held_out():
    shares = Shares(np.array([0, 0]), (0.5, 0.5), ("a", "b"))
    with pytest.raises(InputError, match="data.weights: b has no example to train on: all are held out"):
        shares.groups()
