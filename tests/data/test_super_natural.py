"""Super-NaturalInstructions: Tk-Instruct's prompt, a hundred instances of a task, from lists of tasks."""

import json
import re

import pytest

from qlora_jax.data.detect import find_format
from qlora_jax.data.examples import Lengths, tokenize_examples
from qlora_jax.data.formats import Text, format_rows
from qlora_jax.data.forms.super_natural import INSTANCES
from qlora_jax.data.read import data_files, read_rows
from qlora_jax.errors import InputError
from tests.data.super_natural_folder import a_task, write_folder

FORMAT = "super-natural-instructions"
PROMPT = """Definition: Say what the animal does.

 Positive Example 1 -
Input: the cat 0.
 Output: it reads 0!

 Positive Example 2 -
Input: the cat 1.
 Output: it reads 1!

Now complete the following example -
Input: bird 0.
Output: """


def lists(folder):
    return folder / "splits" / "default"


def test_prompts(tmp_path):
    folder = write_folder(tmp_path / "ni", {"train": [a_task(), a_task(1, examples=0)]})
    texts, left_out = format_rows(read_rows(str(lists(folder) / "train_tasks.txt")), FORMAT)
    assert len(texts) == 4 and left_out == 0
    assert texts[0].source == PROMPT and texts[0].target == "sings 0"
    without = "Definition: Say what the animal does.\n\nNow complete the following example -\nInput: bird 0.\nOutput: "
    assert texts[3].source == without and texts[3].shorter == ()
    assert len(texts[0].shorter) == 2 and texts[0].shorter[1] == without
    assert re.search(r"train_tasks.txt: train_1.json, line 1", texts[3].where)
    assert find_format(str(lists(folder) / "train_tasks.txt")) == FORMAT


def test_a_hundred_instances(tmp_path):
    """Of tasks that are trained on seeded ones, the same every time; of the owners' test tasks their first."""
    many = [a_task(INSTANCES + 50), a_task(INSTANCES + 50)]
    folder = write_folder(tmp_path / "ni", {"train": many, "test": many})
    drawn = [
        [text.source.rpartition("Input: ")[2] for text in format_rows(read_rows(str(lists(folder) / name)), FORMAT)[0]]
        for name in ("train_tasks.txt", "train_tasks.txt", "test_tasks.txt")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2 * INSTANCES == len({*drawn[0][:INSTANCES]}) * 2
    assert drawn[0][:INSTANCES] != drawn[0][INSTANCES:]  # each task draws its own
    assert drawn[2][:INSTANCES] == [f"bird {n}.\nOutput: " for n in range(INSTANCES)]


def test_rows_of_the_hub(tmp_path):
    rows = [{"task_name": "t", "id": "1", "definition": "Say it", "inputs": "a bird?", "targets": "it sings"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_format(str(tmp_path / "rows.jsonl")) == FORMAT
    (text,), _ = format_rows(read_rows(str(tmp_path / "rows.jsonl")), FORMAT)
    assert text.source == "Definition: Say it.\n\nNow complete the following example -\nInput: a bird?\nOutput: "
    assert text.target == "it sings"


def test_a_long_prompt_loses_examples_first(byte_tokenizer):
    sources = ["x" * 30, "x" * 20, "x" * 10]
    text = Text(sources[0], "y", "here", shorter=tuple(sources[1:]))
    for most, kept in ((0, 30), (31, 30), (30, 20), (21, 20), (11, 10), (8, 7)):  # one place is BOS's
        (example,), cut = tokenize_examples([text], byte_tokenizer, Lengths(most, 4))
        assert list(example.tokens).count(ord("x")) == kept and cut.sources == (kept == 7)


def test_what_is_wrong_is_said(tmp_path):
    folder = write_folder(tmp_path / "ni", {"train": [a_task()], "test": [a_task()]})
    with pytest.raises(InputError, match=r"name one of its lists of tasks: .*test_tasks.txt, .*train_tasks.txt"):
        data_files(str(folder))
    with (lists(folder) / "train_tasks.txt").open("a") as file:
        file.write("train_7\n")
    with pytest.raises(InputError, match=r"names a task whose file .*train_7.json is not there"):
        data_files(str(lists(folder) / "train_tasks.txt"))
    (lists(folder) / "test_tasks.txt").write_text("\n")
    with pytest.raises(InputError, match="names no tasks"):
        data_files(str(lists(folder) / "test_tasks.txt"))
    (tmp_path / "my_tasks.txt").write_text("one\n")
    with pytest.raises(InputError, match="there is no folder tasks beside it"):
        data_files(str(tmp_path / "my_tasks.txt"))
    task = a_task()
    task["Instances"][1]["output"] = []
    (tmp_path / "bad.json").write_text(json.dumps(task))
    with pytest.raises(InputError, match=r"bad.json, line 1: expected a list of texts in the field output, found a"):
        format_rows(read_rows(str(tmp_path / "bad.json")), FORMAT)
