"""The command `agreement`: a judge's CSV against people's annotations, and mistakes in one line."""

import json
from itertools import permutations
from pathlib import Path

import pytest

HEADER = "benchmark,first,second,item_id,score\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both rank a over b over c; of item 1 people think the other way, and the first two annotators tie on item 2."""
    folder = tmp_path_factory.mktemp("agreement")
    pairs = list(permutations("abc", 2))
    judged = [f"oa,{x},{y},{i},{1 if x < y else 2}\n" for i in range(6) for x, y in pairs]
    (folder / "judge.csv").write_text(HEADER + "".join(judged))
    people = ["question_id,system_1,system_2,annotator,verdict\n"]
    for item in range(6):
        for x, y in [("a", "b"), ("a", "c"), ("b", "c")]:
            words = {1: [y, y, y], 2: ["tie", "Tie", "1"]}.get(item, [x, "first", "1"])
            people += [f"{item},{x},{y},p{number},{word}\n" for number, word in enumerate(words)]
    (folder / "people.csv").write_text("".join(people))
    (folder / "word.csv").write_text("question,first,second,annotator,verdict\n1,a,b,p,better\n")
    (folder / "other.csv").write_text(HEADER + "oa,a,b,77,1\n")
    (folder / "vicuna.csv").write_text(HEADER + "vicuna,a,b,1,1\n")
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands) -> dict:
    judge = f"--first={folder}/judge.csv"
    commands = {
        "people": [judge, f"--second={folder}/people.csv", "--self=a", f"--out={folder}/out"],
        "word": [judge, f"--second={folder}/word.csv"],
        "other": [judge, f"--second={folder}/other.csv"],
        "vicuna": [judge, f"--second={folder}/vicuna.csv"],
        "absent": [judge, f"--second={folder}/absent.csv"],
        "self": [judge, f"--second={folder}/people.csv", "--self=z"],
        "out": [judge, f"--second={folder}/people.csv", f"--out={folder}/judge.csv"],
    }
    return dict(zip(commands, run_commands([["experiments.agreement", *c] for c in commands.values()]), strict=True))


def test_figures(results, folder) -> None:
    assert results["people"]["status"] == 0, results["people"]
    found = json.loads((folder / "out" / "agreement.json").read_text())
    assert found["system_level"]["kendall_tau"] == found["system_level"]["spearman_r"] == pytest.approx(1)
    examples = found["example_level"]
    assert examples["examples"] == 18 and examples["equal"]["share"] == pytest.approx(12 / 18)
    assert examples["within_second"] < examples["within_first"] == pytest.approx(1)
    assert found["first"]["verdicts"] == 36 and found["second"]["verdicts"] == 54
    assert found["first"]["position_bias"]["share"] == 0.5
    assert found["first"]["both_orders"]["share"] == 1 and found["second"]["both_orders"]["share"] is None
    own = found["self_preference"]
    assert own["first"] == 1 and own["second"] == pytest.approx((4 + 2 / 3) / 6)
    for words in ("Kendall tau, systems", "Fleiss kappa, examples", "first answer preferred", "self-preference of a"):
        assert words in results["people"]["out"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("word", ["word.csv, line 2: score 'better'", "1 (first wins)"]),
        ("other", ["share no example"]),
        ("vicuna", ["different benchmarks, oa, vicuna"]),
        ("absent", ["absent.csv: no such file"]),
        ("self", ["--self=z"]),
        ("out", ["judge.csv is a file; expected a folder"]),
    ],
)
def test_mistakes_are_one_line(results, assert_one_line_error, name, words) -> None:
    assert_one_line_error(results[name], words)
