"""The benchmark of the input pipeline: its rows are of the data set's form and not the data set's texts, and it counts
what there is."""

import json
from pathlib import Path

import pytest

from qlora_jax.bench import data as benchmark
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def config(tmp_path, monkeypatch):
    from configs.base import get_config

    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    rows = [{"input": f"one two three four {number}", "output": f"five six seven {number}"} for number in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    c = get_config()
    c.model.path = str(write_tiny_checkpoint(tmp_path / "model"))
    c.data.path, c.data.format, c.data.eval_examples = str(tmp_path / "rows.json"), "input-output", 0
    return c


def test_rows_have_the_words_of_the_set_in_another_order(config, tmp_path):
    path = benchmark.write_rows(config.data, 40, tmp_path / "many.jsonl")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len(rows) == 40 and all(set(row) == {"input", "output"} for row in rows)
    assert {tuple(sorted(row["input"].split())) for row in rows[:9]} == {
        tuple(sorted(f"one two three four {number}".split())) for number in range(9)
    }
    assert len({row["input"] for row in rows}) > 20


def test_what_is_counted(config):
    found = [benchmark.tokenize(config), *(benchmark.make(config, is_packed, 99) for is_packed in (False, True))]
    assert [result["examples"] for result in found] == [9, 9, 9]
    tokens = found[0]["tokens"]
    assert found[1]["steps"] == 1 and found[2]["steps"] == 1  # batches of 16: an epoch and a part of the next
    assert found[1]["tokens"] > tokens and found[2]["tokens"] > tokens
    for result in found:
        assert result["tokens_per_second"] == result["tokens"] / result["seconds"]
        assert 0 < result["memory_before"] <= result["memory_peak"] and result["bytes_kept"] > 5 * tokens
