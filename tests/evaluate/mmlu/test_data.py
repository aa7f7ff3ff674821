"""Every form of MMLU's data gives the same questions; broken ones are one clear line."""

import json
from collections import Counter

import pytest
from huggingface_hub import constants

from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu.data import load_questions
from qlora_jax.evaluate.mmlu.prompts import prompt_text
from qlora_jax.evaluate.mmlu.subjects import CATEGORIES, SUBCATEGORIES, category
from tests.evaluate.mmlu.mmlu_files import (
    COUNTS,
    SUBJECTS,
    rows,
    write_owners_folder,
    write_parquet_folder,
    write_prompts,
)
from tests.hub_server import SHA, TOKEN, HubHandler, serving


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    return write_owners_folder(tmp_path_factory.mktemp("mmlu") / "data")


def test_57_subjects_in_four_categories():
    assert len(SUBCATEGORIES) == 57 and len(CATEGORIES) == 4
    assert Counter(map(category, SUBCATEGORIES)) == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}


def test_owners_folder(owners):
    found = load_questions(str(owners), "test", 5)
    assert len(found.asked) == 3 * COUNTS["test"] and set(found.shots) == set(SUBJECTS)
    asked = [question for question in found.asked if question.subject == "college_physics"]
    for question, row in zip(asked, rows("college_physics", "test"), strict=True):
        assert (question.question, list(question.choices)) == (row["question"], row["choices"])
        assert question.answer == "ABCD"[row["answer"]]
    assert found == load_questions(str(owners.parent), "test", 5)  # data/ inside
    assert len(load_questions(str(owners), "val", 0).asked) == 3 * COUNTS["val"]


def test_parquet_folder_and_file(owners, tmp_path):
    folder = write_parquet_folder(tmp_path / "hub")
    assert load_questions(str(folder), "test", 5) == load_questions(str(owners), "test", 5)
    assert load_questions(str(folder), "val", 2) == load_questions(str(owners), "val", 2)
    file = str(folder / "all" / "test-00000-of-00001.parquet")
    assert load_questions(file, "test", 0).asked == load_questions(str(owners), "test", 0).asked
    with pytest.raises(InputError, match="has no dev questions for 5 shots: say --shots=0"):
        load_questions(file, "test", 5)


def test_hub(owners, tmp_path, monkeypatch):
    folder = write_parquet_folder(tmp_path / "hub")
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.parquet")}

    class Hub(HubHandler):
        requests: list[tuple[str, str]] = []

        def find(self, path):
            if not path.removeprefix("/api").startswith("/datasets/cais/mmlu"):
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            if path.startswith("/api/"):
                names = [{"rfilename": name} for name in [*files, "README.md", "auxiliary_train/train.parquet"]]
                return 200, {}, json.dumps({"id": "cais/mmlu", "sha": SHA, "siblings": names}).encode()
            name = path.split(f"/resolve/{SHA}/")[-1].split("/resolve/main/")[-1]
            return 200, {"X-Repo-Commit": SHA, "ETag": f'"{abs(hash(name)):x}"'}, files[name]

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with serving(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert load_questions("cais/mmlu", "test", 5) == load_questions(str(owners), "test", 5)
        with pytest.raises(InputError, match="owner/none: no local file, and no data set of that name"):
            load_questions("owner/none", "test", 5)
    assert load_questions("cais/mmlu", "test", 5).asked  # from the cache
    fetched = {path for path, _ in Hub.requests if "/resolve/" in path}
    assert all("/all/" in path for path in fetched)


def test_finished_prompts_are_the_prompts_that_we_write(owners, tmp_path):
    written = load_questions(str(write_prompts(tmp_path / "prompts.json")), "val", 0)
    ours = load_questions(str(owners), "val", 0)
    assert [(q.subject, q.answer, q.prompt) for q in written.asked] == [
        (q.subject, q.answer, prompt_text(q, [])) for q in ours.asked
    ]


def test_the_real_zero_shot_file(shared_data):
    found = load_questions(str(shared_data / "mmlu" / "zero_shot_mmlu_val.json"), "val", 0).asked
    assert len(found) == 1531 and {question.subject for question in found} == set(SUBCATEGORIES)
    counts = Counter(question.subject for question in found)
    assert (counts["professional_law"], counts["abstract_algebra"], counts["college_chemistry"]) == (170, 11, 8)
    assert Counter(question.answer for question in found) == {"A": 381, "B": 379, "C": 387, "D": 384}
    about = "The following are multiple choice questions (with answers) about  "
    for question in found:
        assert question.prompt.startswith(f"{about}{question.subject.replace('_', ' ')}.\n\n")


GOOD = {"subject": "anatomy", "question": "q", "choices": ["a", "b", "c", "d"], "answer": 2}
PROMPT = {"subject": "anatomy", "input": "q\nA. 1\nAnswer:", "output": "A"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        ([{**GOOD, "answer": 4}], "line 1: the answer is 4; expected A, B, C or D"),
        ([{**GOOD, "answer": True}], "the answer is True"),
        ([GOOD, {**GOOD, "choices": ["a", "b"]}], "line 2: 2 choices; expected 4"),
        ([{**GOOD, "choices": "abcd"}], "choices as a list"),
        ([{**GOOD, "subject": "../secrets"}], "'../secrets' is none of MMLU's 57 subjects"),
        ([{"subject": "anatomy", "question": "q"}], "no field choices, answer"),
        ([{**PROMPT, "input": "q"}], 'ends in "Answer:"'),
        ([{**PROMPT, "output": "E"}], "the answer is 'E'"),
        ([{**PROMPT, "input": "q\nAnswer: A\n\nq\nAnswer:"}], "row 1: a finished prompt with 1 shots; say --shots=1"),
    ],
)
def test_broken_files(tmp_path, content, named):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    with pytest.raises(InputError, match=named):
        load_questions(str(file), "val", 0)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("test/anatomy_test.csv", b"", "anatomy_test.csv is empty"),
        ("test/anatomy_test.csv", b"q,a,b,c,d,A\nq,a,b,c,A\n", "anatomy_test.csv, line 2: 5 fields; expected 6"),
        ("test/anatomy_test.csv", b"q,a,b,c,d,E\n", "line 1: the answer is 'E'"),
        ("test/anatomy_test.csv", b'q,a,"b,c,d,A\n', "anatomy_test.csv, line 1: unexpected end of data"),
        ("test/anatomy_test.csv", b"na\xefve,a,b,c,d,A\n", "line 1: not UTF-8"),
        ("test/astrology_test.csv", b"q,a,b,c,d,A\n", "'astrology' is none of MMLU's 57 subjects"),
        ("dev/anatomy_dev.csv", b"q,a,b,c,d,A\n", "1 dev questions of anatomy for 5 shots; ask for fewer"),
        ("dev/anatomy_dev.csv", None, "anatomy_dev.csv cannot be read"),
    ],
)
def test_broken_folders(tmp_path, name, content, named):
    folder = write_owners_folder(tmp_path / "data")
    if name.startswith("test/astrology"):
        (folder / "dev" / "astrology_dev.csv").write_bytes(content)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=named):
        load_questions(str(folder), "test", 5)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="is no folder of MMLU: expected test/SUBJECT_test.csv"):
        load_questions(str(tmp_path), "test", 0)
    with pytest.raises(InputError, match="unknown split 'train' of MMLU; known: test, val, dev"):
        load_questions(str(tmp_path), "train", 0)
    with pytest.raises(InputError, match="no such file"):
        load_questions(str(tmp_path / "absent.json"), "test", 0)
