"""The command `evaluate_types`: the paper's tables are listed anywhere; what is there is not measured again."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from absl.flags import FLAGS

from configs.sweeps import paper_types
from qlora_jax.errors import InputError
from qlora_jax.evaluate.by_type import Table, cells, score
from qlora_jax.io.write import QUANTS
from qlora_jax.models.known import known_config

FILE = """
from qlora_jax.evaluate.by_type import Table
def tables():
    return (Table("Ours", ("assets/tiny_llama", "owner/name"), ("nf4+dq", "int8"), ("--task=perplexity",)),)
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(*flags) -> status, stdout; with `evaluate` in place of the real one, by the arguments that it gets."""
    (tmp_path / "tables.py").write_text(FILE)
    (tmp_path / "text.txt").write_text("Once upon a time")

    command = importlib.import_module("experiments.evaluate_types")

    def make(*arguments: str, evaluate=None) -> tuple[int, str]:
        flags = ["evaluate_types", f"--tables={tmp_path / 'tables.py'}", *arguments]
        monkeypatch.setattr(sys, "argv", flags)
        monkeypatch.setattr(command, "evaluate", evaluate)
        FLAGS.unparse_flags()
        FLAGS(flags)
        return command.main(), capsys.readouterr().out

    yield make
    # commands that other tests call in this process have flags of the same names
    FLAGS.remove_flag_values([flag.name for flag in FLAGS.flags_by_module_dict()[command.__name__]])
    del sys.modules[command.__name__]


def test_the_papers_tables():
    """As many as its docstring says, of models whose sizes are known here and in types that evaluate has."""
    tables = paper_types.tables()
    counts = [len(cells(table)) for table in tables]
    assert counts == [80, 12, 40, 8] and f"evaluations {sum(counts)}" in paper_types.__doc__
    for table in tables:
        assert set(table.quants) <= {"none", *QUANTS}
        assert all(known_config(model) is not None for model in table.models)


def test_a_dry_run(run):
    status, out = run("--dry_run")
    assert status == 0 and "Ours: 2 models * 2 types = 4" in out and "evaluations: 4" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["owner/name"] == ["?", "?"]
    four, eight = map(float, rows["assets/tiny_llama"])
    assert 0 < four < eight


def test_what_is_missing_is_run_and_failures_are_told(run, tmp_path):
    asked: list[list[str]] = []

    def evaluate(arguments: list[str]) -> int:
        asked.append(arguments)
        if "--model=owner/name" in arguments and len(asked) < 5:
            return 2
        out = Path(next(word.partition("=")[2] for word in arguments if word.startswith("--out=")))
        out.write_text(json.dumps({"perplexity": 3.0 if "--quant=int8" in arguments else 4.0}))
        return 0

    flags = [f"--workdir={tmp_path / 'out'}", f"--text={tmp_path / 'text.txt'}", "--also=--batch_size=4"]
    status, out = run(*flags, evaluate=evaluate)
    assert status == 3 and len(asked) == 4 and "(1 of 2)" in out
    assert {"--task=perplexity", "--batch_size=4", f"--text={tmp_path / 'text.txt'}"} <= set(asked[0])
    status, out = run(*flags, evaluate=evaluate)
    assert status == 0 and len(asked) == 6
    assert out.splitlines()[-4].split() == ["owner/name", "4.0000", "3.0000"]
    assert out.splitlines()[-3].split() == ["mean", "4.0000", "3.0000"]
    assert len(json.loads((tmp_path / "out" / "tables.json").read_text())["Ours"]) == 4
    (tmp_path / "text.txt").write_text("another text")
    run(*flags, evaluate=evaluate)
    assert len(asked) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "missing flag --workdir"),
        (("--workdir=runs/no",), "measures perplexity: give one of --text=FILE and --tokens"),
        (("--workdir=runs/no", "--text=no.txt"), "--text=no.txt: no such file"),
        (("--only=Theirs",), "--only=Theirs: no such table; there are Ours"),
    ],
)
def test_what_is_refused(run, flags, message):
    with pytest.raises(InputError, match=message):
        run(*flags)


def test_scores():
    found = {"results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "b": {"acc,none": 0.7}}}
    assert score("lm-eval", found) == pytest.approx(0.6)
    assert score("mmlu", {"accuracy_subjects": 0.25}) == 0.25
    with pytest.raises(InputError, match="has no number to show"):
        score("lm-eval", {"results": {}})
    with pytest.raises(InputError, match="expected a --task="):
        cells(Table("T", ("m",), ("nf4",), ()))
    with pytest.raises(InputError, match="names a model or a type twice"):
        cells(Table("T", ("m", "m"), ("nf4",), ("--task=mmlu",)))
