"""Readers of verdicts, and the relative protocol, on files made in the owners' forms."""

import json
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.relative import find_reference, relative
from qlora_jax.evaluate.tournament.verdicts import Verdict, read_verdicts, select

HEADER = "benchmark,first,second,item_id,score\n"
CHIP = "13b-chip2-vicuna-generations-topp0.9-temp0.7"


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rating(item: int, first: str, second: str, score: object) -> dict:
    return {"question_id": item, "answer1_id": first, "answer2_id": second, "score": score, "text": "9 8\n..."}


@pytest.fixture
def ratings(tmp_path) -> Path:
    """Two relative files, the names of both backwards, with ChatGPT's answers beside them."""
    folder = tmp_path / "ratings"
    g1, g2 = ({"answer_id": f"g{i}", "model_id": "gpt-3.5-turbo:20230327", "question_id": i} for i in (1, 2))
    jsonl(tmp_path / "generations" / "answer_gpt35.jsonl", [g1, g2])
    rows = [rating(1, "g1", "c1", [8.0, 4.0]), rating(2, "g2", "c2", [8.0, 6])]
    jsonl(folder / f"{CHIP}-vs-gpt-3.5-gpt4-reviewer.jsonl", rows)
    rows = [rating(1, "c1", "g1", [5.5, 9.0]), rating(2, "c2", "g2", [-1, -1])]
    jsonl(folder / f"gpt-3.5-vs-{CHIP}-gpt4-reviewer.jsonl", rows)
    return folder


def test_answer_ids_decide_who_came_first(ratings) -> None:
    read = read_verdicts(ratings)
    assert read.notes == []
    assert [(v.first, v.second, v.item, v.score) for v in read.verdicts] == [
        ("gpt-3.5", "13b-chip2", "1", (8.0, 4.0)),
        ("gpt-3.5", "13b-chip2", "2", (8.0, 6.0)),
        ("13b-chip2", "gpt-3.5", "1", (5.5, 9.0)),
        ("13b-chip2", "gpt-3.5", "2", -1),
    ]
    assert {(v.benchmark, v.protocol) for v in read.verdicts} == {("vicuna", "relative")}


def test_relative_score_pools_both_orders(ratings) -> None:
    verdicts = select(read_verdicts(ratings).verdicts, "relative", "vicuna")
    found = relative(verdicts, find_reference(verdicts))
    assert list(found) == ["13b-chip2"]
    chip = found["13b-chip2"]
    assert chip.percent == pytest.approx(100 * (4 + 6 + 5.5) / (8 + 8 + 9))
    # resamples of two items: both the first, both the second, or one of each
    assert (chip.low, chip.high) == pytest.approx((100 * 9.5 / 17, 100 * 6 / 8))
    assert (chip.verdicts, chip.unparsed, chip.orders) == (3, 1, 2)
    with pytest.raises(InputError, match="expected bard among the systems 13b-chip2, gpt-3.5"):
        find_reference(verdicts, "bard")


def test_draws_without_a_point_of_the_reference_are_left_out() -> None:
    """Two items, one of them without a point: a fourth of the draws has nothing to divide by."""
    scores = {"1": (8.0, 0.0), "2": (8.0, 4.0)}
    verdicts = [Verdict("b", "x", "gpt-3.5", item, score, "relative") for item, score in scores.items()]
    found = relative(verdicts, "gpt-3.5")["x"]
    assert (found.percent, found.low, found.high) == (400, 200, 400)


def test_relative_order_that_cannot_be_known_is_an_error(ratings) -> None:
    answers = ratings.parent / "generations" / "answer_gpt35.jsonl"
    moved = answers.rename(ratings.parent / "elsewhere.jsonl")
    with pytest.raises(InputError, match="may give the order backwards.*--answers=FILE"):
        read_verdicts(ratings)
    assert len(read_verdicts(ratings, [moved]).verdicts) == 4


def test_ids_that_contradict_each_other_are_an_error(ratings) -> None:
    jsonl(ratings / "a-vs-gpt-3.5.jsonl", [rating(1, "g1", "x", 1), rating(2, "y", "g2", 1)])
    with pytest.raises(InputError, match="in some rows"):
        read_verdicts(ratings)


def test_three_class_order_by_name_is_noted(tmp_path) -> None:
    file = tmp_path / "7b-guanaco-oa-generations-x-vs-13b-guanaco-oa-generations-x-gpt-4-reviewer-threeclass.jsonl"
    jsonl(file, [rating(1, "a", "b", 3), rating(2, "c", "d", -1)])
    read = read_verdicts(file)
    assert [(v.benchmark, v.first, v.second, v.score) for v in read.verdicts] == [
        ("oa", "7b-guanaco", "13b-guanaco", 3),
        ("oa", "7b-guanaco", "13b-guanaco", -1),
    ]
    assert len(read.notes) == 1 and "7b-guanaco is taken as first" in read.notes[0]


@pytest.mark.parametrize(
    "name, systems",
    [
        ("gpt-4-oa-generations-vs-vicuna-13b-oa-generations-gpt-4-reviewer-threeclass", ("gpt-4", "vicuna-13b")),
        (
            "13b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-answer-bard-gpt-4-reviewer-threeclass",
            ("13b-guanaco", "bard"),
        ),
        ("7b-flan-oa-generations-topp0.9-beam1-vs-gpt-3.5-oa-generations-gpt-4-reviewer", ("7b-flan", "gpt-3.5")),
    ],
)
def test_systems_of_released_names(tmp_path, name, systems) -> None:
    jsonl(tmp_path / f"{name}.jsonl", [rating(1, "a", "b", 1)])
    (verdict,) = read_verdicts(tmp_path).verdicts
    assert (verdict.first, verdict.second) == systems


def test_csv_and_judge_files_of_a_folder(tmp_path) -> None:
    (tmp_path / "a.csv").write_text(HEADER + "oa,x,y,q1,1\noa,y,x,q1,-1\n")
    judged = {
        "benchmark": "oa",
        "first": "x",
        "second": "z",
        "question_id": 7,
        "score": 2,
        "judge": "j",
        "category": "math",
    }
    jsonl(tmp_path / "b.jsonl", [judged])
    jsonl(tmp_path / "questions.jsonl", [{"question_id": 7, "text": "?"}])
    (tmp_path / "notes.txt").write_text("no data")
    read = read_verdicts(tmp_path)
    assert [(v.first, v.second, v.item, v.score, v.judge, v.category) for v in read.verdicts] == [
        ("x", "y", "q1", 1, "", ""),
        ("y", "x", "q1", -1, "", ""),
        ("x", "z", "7", 2, "j", "math"),
    ]
    assert read.notes == ["questions.jsonl: passed over, not a file of verdicts"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "v.csv is empty"),
        (HEADER, "v.csv has no rows"),
        ("a,b\n1,2\n", "v.csv: found the columns a, b; expected benchmark, first, second, item_id, score"),
        (HEADER + "oa,x,y,q,1\noa,x,y,q,4\n", "v.csv, line 3: score '4'; expected 1 .first wins., 2"),
        (HEADER + "oa,x,y,q,nan\n", "line 2: score 'nan'"),
        (HEADER + "oa,x,y,q,\n", "line 2: score ''"),
        (HEADER + "oa,x,,q,1\n", "line 2: second missing"),
        (HEADER + "oa,x,x,q,1\n", "line 2: first and second are both 'x'"),
        (HEADER + "oa,x,y,q\n", "line 2: 4 fields, expected 5"),
    ],
)
def test_broken_csv_is_one_clear_line(tmp_path, text, words) -> None:
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_verdicts(tmp_path / "v.csv")


@pytest.mark.parametrize("score", [[1], [1, "x"], [1, -2], 3, None, True, [1, float("inf")]])
def test_broken_relative_score_is_named_with_its_line(tmp_path, score) -> None:
    row = {"benchmark": "oa", "first": "x", "second": "y", "item_id": 1}
    jsonl(tmp_path / "v.jsonl", [row | {"score": [8, 9]}, row | {"score": score}])
    with pytest.raises(InputError, match="v.jsonl, line 2: score .*expected a pair of points"):
        read_verdicts(tmp_path / "v.jsonl")


def test_what_is_not_there_is_listed(tmp_path) -> None:
    (tmp_path / "v.csv").write_text(HEADER + "oa,x,y,q,1\nvicuna,x,y,q,2\noa,y,x,q,1\n")
    verdicts = read_verdicts(tmp_path).verdicts
    assert [v.score for v in select(verdicts, "threeclass", "vicuna")] == [2]
    with pytest.raises(InputError, match=r"--benchmark=mt: .* oa \(2 games\), vicuna \(1 games\)"):
        select(verdicts, "threeclass", "mt")
    with pytest.raises(InputError, match="choose one with --benchmark"):
        select(verdicts, "threeclass", None)
    with pytest.raises(InputError, match=r"no relative verdicts; found threeclass \(3 games\)"):
        select(verdicts, "relative", None)
    with pytest.raises(InputError, match="expected one of threeclass, relative"):
        select(verdicts, "pairwise", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no file of verdicts"):
        read_verdicts(tmp_path / "empty")


def test_released_files(shared_data) -> None:
    """Row counts as the folder's README has them, and both orders of 13b-chip2 against ChatGPT."""
    assert len(read_verdicts(shared_data / "oa_bench" / "pairwise_gpt4.csv").verdicts) == 40_026
    rated = read_verdicts(shared_data / "vicuna_bench" / "ratings").verdicts
    assert len(rated) == 240
    chip = relative(select(rated, "relative", "vicuna"), "gpt-3.5")["13b-chip2"]
    assert chip.verdicts == 160 and chip.orders == 2 and chip.low < chip.percent < chip.high < 80
