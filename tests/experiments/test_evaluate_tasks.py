"""`evaluate` with MMLU and with lm-eval's tasks, as a user runs it: results, a kill and what follows, mistakes."""

import importlib.util
import json
import math
import re
import sys
from functools import partial
from types import SimpleNamespace

import jinja2
import pytest
import yaml

from experiments.support import mmlu_task
from experiments.support.harness_task import check_extra, load_tasks
from qlora_jax.data.prompts import alpaca_prompt
from qlora_jax.errors import InputError
from tests.conftest import REPOSITORY
from tests.evaluate.mmlu.mmlu_files import COUNTS, SUBJECTS, write_checkpoint, write_owners_folder

pytestmark = pytest.mark.quick_compile

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs the extra eval", allow_module_level=True)

TEXT = "The quick brown fox jumps over the lazy dog."
TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answering": """
task: answering
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
    "broken": "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/absent.jsonl}}\n"
    "test_split: test\noutput_type: generate_until\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_checkpoint(folder / "model", context=256)
    write_owners_folder(folder / "mmlu")
    (folder / "text.txt").write_text(TEXT)
    (folder / "yaml").mkdir()
    for name, text in TASKS.items():
        (folder / "yaml" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    asked = [{"question": f"What is {n}?", "choices": ["this", "that thing", "no"], "answer": n % 3} for n in range(6)]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n")
    (folder / "rolling.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands, tmp_path_factory):
    """Name -> result of each command; all run in one process, one after the other."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr("lm_eval.evaluator.TaskManager", None)  # all tasks are in the folder: the harness's own are not read
    mmlu, harness = ["--task=mmlu", f"--mmlu_data={folder}/mmlu"], ["--task=lm-eval", f"--include_path={folder}/yaml"]
    out = f"--out={folder}/out"
    commands = {
        "mmlu": [*mmlu, "--shots=1", f"{out}/mmlu.json"],
        "again": [*mmlu, "--shots=1", f"{out}/mmlu.json"],
        "other shots": [*mmlu, "--shots=0", f"{out}/mmlu.json"],
        "harness": [*harness, "--tasks=choice,rolling,answering", f"{out}/harness.json"],
        "perplexity": ["--task=perplexity", f"--text={folder}/text.txt", f"{out}/perplexity.json"],
        "no data": ["--task=mmlu"],
        "no tasks": ["--task=lm-eval"],
        "broken task": [*harness, "--tasks=broken"],
        "no folder": ["--task=lm-eval", "--include_path=/absent", "--tasks=choice"],
        "context": [*mmlu, "--context=1"],
    }
    command = ["experiments.evaluate", f"--model={folder}/model", "--quant=nf4"]
    found = run_commands([[*command, *flags] for flags in commands.values()])
    patch.undo()
    return dict(zip(commands, found, strict=True))


def test_mmlu(results, folder):
    assert results["mmlu"]["status"] == 0, results["mmlu"]["err"]
    written = json.loads((folder / "out" / "mmlu.json").read_text())
    assert (written["task"], written["quant"], written["questions"]) == ("mmlu", "nf4", 3 * COUNTS["test"])
    assert set(written["subjects"]) == set(SUBJECTS) and list(written["categories"]) == ["STEM", "humanities", "other"]
    shares = [subject["accuracy"] for subject in written["subjects"].values()]
    assert written["accuracy_subjects"] == pytest.approx(sum(shares) / 3)
    rows = [json.loads(line) for line in (folder / "out" / "mmlu.questions.jsonl").read_text().splitlines()[1:]]
    assert sorted(row["question"] for row in rows) == list(range(12))
    assert sum(row["chosen"] == row["answer"] for row in rows) == written["correct"]
    lines = results["mmlu"]["out"].splitlines()
    assert lines[0].split() == ["subject", "category", "accuracy", "95%", "from", "to", "questions"]
    assert lines[-2].startswith("mean over questions") and lines[-2].endswith("12")


def test_answers_that_are_there_are_not_asked_again(results, folder):
    assert "12 answers are already in" in results["again"]["err"]
    assert results["again"]["out"] == results["mmlu"]["out"]


def test_harness(results, folder):
    assert results["harness"]["status"] == 0, results["harness"]["err"]
    written = json.loads((folder / "out" / "harness.json").read_text())
    found = written["results"]
    assert set(found) == {"choice", "rolling", "answering"} and written["n-samples"]["choice"]["effective"] == 6
    assert found["choice"]["acc,none"] in [n / 6 for n in range(7)]
    assert found["answering"]["exact_match,none"] == 0
    perplexity = json.loads((folder / "out" / "perplexity.json").read_text())
    nats = perplexity["nll_per_token"] * perplexity["tokens"]
    words = len(re.split(r"\s+", TEXT))  # as the harness counts them
    assert found["rolling"]["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / len(TEXT)), rel=1e-4)
    header, first, *_ = results["harness"]["out"][results["harness"]["out"].index("task  ") :].splitlines()
    assert header.split() == ["task", "metric", "filter", "value", "standard", "error"]
    assert first.split()[:4] == ["choice", "acc", "none", f"{found['choice']['acc,none']:.4f}"]
    assert "byte_perplexity" in results["harness"]["out"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("other shots", ["made with other settings", "shots: 1 there, 0 here"]),
        ("no data", ["--task=mmlu takes --mmlu_data=DIR"]),
        ("no tasks", ["--task=lm-eval takes --tasks=NAME"]),
        ("broken task", ["--tasks=broken cannot be loaded", "absent.jsonl"]),
        ("no folder", ["--include_path=/absent: no such folder"]),
        ("context", ["context is 1; expected at least 2"]),
    ],
)
def test_mistakes_are_one_line(results, name, named, assert_one_line_error):
    assert_one_line_error(results[name], named)


@pytest.mark.parametrize("logits", [[1, 2, 3, math.nan], [1, 2, math.inf, 3], [1, 2, 3], ["1", 2, 3, 4], None])
def test_recorded_answers_that_are_none(logits):
    """The largest of numbers with NaN among them is whichever came first."""
    good = {"question": 0, "logits": [0.5, 2, -1.0, 0.0]}
    assert mmlu_task._known(SimpleNamespace(path="a.jsonl", lines=[good]), 2) == {0: good["logits"]}
    with pytest.raises(InputError, match="a.jsonl has a line that is no answer"):
        mmlu_task._known(SimpleNamespace(path="a.jsonl", lines=[good, {"question": 1, "logits": logits}]), 2)


def test_unknown_tasks(folder, monkeypatch):
    import lm_eval.tasks

    own = partial(lm_eval.tasks.TaskManager, include_path=folder / "yaml", include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: own())  # the harness's own take seconds to list
    with pytest.raises(InputError, match="unknown task 'choices'; did you mean choice"):
        load_tasks(["rolling", "choices"], str(folder / "yaml"))


def test_a_group_of_ones_own_may_have_members_of_the_harness(tmp_path, monkeypatch):
    """So the harness's own tasks are read for it, and for no task that stands alone."""
    import lm_eval.tasks

    (tmp_path / "group.yaml").write_text("group: mine\ntask:\n  - arc_easy\n")
    (tmp_path / "task.yaml").write_text("task: alone\n")
    manager, read = lm_eval.tasks.TaskManager, []

    def own(include_path, include_defaults=True):
        read.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    for name, expected, said in (
        ("mine", [False, True], "unknown task 'arc_easy' in the group 'mine'"),  # the harness's own, left out here
        ("alone", [False], "--tasks=alone cannot be loaded"),
    ):
        read.clear()
        with pytest.raises(InputError, match=said):
            load_tasks([name], str(tmp_path))
        assert read == expected


def test_the_quickstarts_task_asks_what_the_adapter_learned():
    task = yaml.safe_load((REPOSITORY / "assets" / "lm_eval" / "embedded_instructions.yaml").read_text())
    file = REPOSITORY / task["dataset_kwargs"]["data_files"]["test"]
    rows = json.loads(file.read_text())
    assert len(rows) == 200 and any(not row["input"] for row in rows)
    for row in rows:
        assert jinja2.Template(task["doc_to_text"]).render(**row) == alpaca_prompt(row["instruction"], row["input"])


def test_without_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"needs EleutherAI's harness .*: pip install 'qlora_jax\[eval\]'"):
        check_extra()
