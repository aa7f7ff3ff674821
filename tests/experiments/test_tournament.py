"""The command `tournament`: the contract's files, the paper's OA column, mistakes in one line."""

import json
from pathlib import Path

import pytest

HEADER = "benchmark,first,second,item_id,score\n"
# QLoRA, table 7, OpenAssistant benchmark judged by GPT-4
OA_COLUMN = {
    "gpt4": 1294,
    "gpt35": 1015,
    "65b-guanaco": 1008,
    "30b-guanaco": 1002,
    "vicuna-13b": 936,
    "13b-guanaco": 885,
    "7b-guanaco": 860,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    games = "".join(
        f"oa,a,b_1,{i},{1 + (i % 3 == 0)}\noa,b_1,c,{i},3\noa,c,a,{i},{2 - (i % 4 == 0)}\n" for i in range(8)
    )
    (folder / "v.csv").write_text(HEADER + games)
    (folder / "won.csv").write_text(HEADER + "oa,a,b,1,1\n")
    (folder / "two.csv").write_text(HEADER + "oa,a,b,1,1\nvicuna,a,b,1,1\n")
    (folder / "four.csv").write_text(HEADER + "oa,a,b,1,4\n")
    (folder / "latin.csv").write_bytes(HEADER.encode() + b"oa,na\xefve,b,1,1\n")
    (folder / "columns.csv").write_text("x,y\n1,2\n")
    (folder / "empty.csv").write_text("")
    (folder / "nothing").mkdir()
    row = {"benchmark": "oa", "first": "a", "second": "chatgpt", "item_id": 1}
    (folder / "r.jsonl").write_text("".join(json.dumps(row | {"score": s}) + "\n" for s in ([9, 10], [8, 10], -1)))
    questions = [{"question_id": i, "category": "math" if i < 4 else "coding"} for i in range(8)]
    (folder / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "other.jsonl").write_text(json.dumps({"question_id": 99, "category": "math"}) + "\n")
    judged = [row | {"score": [5, 10], "category": "math", "judge": "x"}, row | {"score": -1, "category": "math"}]
    judged.append({**row, "first": "chatgpt", "second": "a", "score": [8, 6], "category": "fermi", "judge": "x"})
    (folder / "j.jsonl").write_text("".join(json.dumps(line) + "\n" for line in judged))
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands) -> dict:
    commands = {
        "elo": [f"--verdicts={folder}/v.csv", "--k=16", "--orderings=50", f"--out={folder}/elo"],
        "again": [f"--verdicts={folder}/v.csv", "--k=16", "--orderings=50", f"--out={folder}/again"],
        "relative": [f"--verdicts={folder}/r.jsonl", "--protocol=relative", f"--out={folder}/relative"],
        "categories": [
            f"--verdicts={folder}/v.csv",
            "--orderings=1",
            f"--out={folder}/c",
            f"--questions={folder}/q.jsonl",
        ],
        "relative categories": [f"--verdicts={folder}/j.jsonl", "--protocol=relative", f"--out={folder}/rc"],
        "uncategorised": [f"--verdicts={folder}/v.csv", f"--questions={folder}/r.jsonl"],
        "unasked": [f"--verdicts={folder}/won.csv", f"--questions={folder}/other.jsonl"],
        "won": [f"--verdicts={folder}/won.csv", "--orderings=1", f"--out={folder}/won"],
        "absent": [f"--verdicts={folder}/absent.csv"],
        "columns": [f"--verdicts={folder}/columns.csv"],
        "empty": [f"--verdicts={folder}/empty.csv"],
        "latin": [f"--verdicts={folder}/latin.csv"],
        "four": [f"--verdicts={folder}/four.csv"],
        "nothing": [f"--verdicts={folder}/nothing"],
        "benchmark": [f"--verdicts={folder}/two.csv", "--benchmark=mt"],
        "several": [f"--verdicts={folder}/two.csv"],
        "protocol": [f"--verdicts={folder}/v.csv", "--protocol=relative"],
        "k": [f"--verdicts={folder}/v.csv", "--k=0"],
        "out": [f"--verdicts={folder}/v.csv", f"--out={folder}/v.csv"],
    }
    command = ["experiments.tournament", f"--out={folder}/wrong"]
    return dict(zip(commands, run_commands([[*command, *flags] for flags in commands.values()]), strict=True))


def test_elo_is_in_the_agreed_form(results, folder) -> None:
    assert results["elo"]["status"] == 0, results["elo"]
    written = json.loads((folder / "elo" / "elo.json").read_text())
    assert list(written) == ["a", "b_1", "c"]
    for rating in written.values():
        assert list(rating) == ["elo", "low", "high", "games"]
        assert rating["low"] <= rating["elo"] <= rating["high"] and rating["games"] == 16
    fitted = json.loads((folder / "elo" / "bradley_terry.json").read_text())
    assert list(fitted) == list(written) and fitted["a"] > fitted["b_1"] > fitted["c"]
    assert "K is an option" in results["elo"]["out"]


def test_tables_and_figures(results, folder) -> None:
    table = (folder / "elo" / "table.csv").read_text().splitlines()
    assert table[0].startswith("system,Elo,") and table[1].startswith("a,")
    assert r"b\_1 &" in (folder / "elo" / "table.tex").read_text()
    assert "| a |" in (folder / "elo" / "table.md").read_text()
    # a won 5 of its 8 games against b_1 and 6 against c; those two tied
    wins = [line.split(",") for line in (folder / "elo" / "wins.csv").read_text().splitlines()]
    assert wins[0] == ["system", "a", "b_1", "c"] and wins[1][1:] == ["", "0.6250", "0.7500"] and wins[2][3] == "0.5000"
    for name in ("elo", "wins"):
        assert (folder / "elo" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / "elo" / f"{name}.svg").read_text()
    for file in (folder / "elo").iterdir():
        assert file.read_bytes() == (folder / "again" / file.name).read_bytes(), file.name


def test_scores_by_category(results, folder) -> None:
    assert results["categories"]["status"] == results["relative categories"]["status"] == 0, results["categories"]
    table = {line.split(",")[0]: line.split(",")[1:] for line in (folder / "c" / "categories.csv").read_text().split()}
    # of items 0 to 3 a wins 1 and 2 against b_1 and 1 to 3 against c, of 4 to 7 three of each
    assert table["system"] == ["coding", "math"] and table["a"] == ["75.0", "62.5"]
    assert (folder / "c" / "categories.png").is_file() and not (folder / "elo" / "categories.csv").exists()
    assert (folder / "rc" / "categories.csv").read_text() == "system,fermi,math\na,75.0,50.0\n"
    assert "2 judges are pooled: (no name), x" in results["relative categories"]["out"]


def test_relative_is_in_the_agreed_form(results, folder) -> None:
    assert results["relative"]["status"] == 0, results["relative"]
    written = json.loads((folder / "relative" / "relative.json").read_text())
    assert written == {"a": {"percent": 85.0, "low": 85.0, "high": 85.0}}
    assert "judged in one order only" in results["relative"]["out"]
    assert (folder / "relative" / "relative.svg").is_file()


def test_an_unbeaten_system_has_no_fit(results, folder) -> None:
    assert "No Bradley-Terry fit" in results["won"]["out"]
    assert json.loads((folder / "won" / "bradley_terry.json").read_text()) == {"a": None, "b": None}


@pytest.mark.parametrize(
    "name, words",
    [
        ("absent", ["absent.csv: no such file"]),
        ("columns", ["columns.csv: found the columns x, y; expected benchmark, first"]),
        ("empty", ["empty.csv is empty"]),
        ("latin", ["latin.csv, line 2: not UTF-8"]),
        ("four", ["four.csv, line 2: score '4'"]),
        ("nothing", ["nothing has no file of verdicts"]),
        ("benchmark", ["--benchmark=mt", "oa (1 games), vicuna (1 games)"]),
        ("several", ["several benchmarks", "--benchmark"]),
        ("protocol", ["no relative verdicts", "--protocol"]),
        ("uncategorised", ["r.jsonl, line 1", "expected question_id and category"]),
        ("unasked", ["other.jsonl: no question 1, which was judged"]),
        ("k", ["--k=0.0: expected a positive number"]),
        ("out", ["v.csv is a file; expected a folder"]),
    ],
)
def test_mistakes_are_one_line(results, folder, assert_one_line_error, name, words) -> None:
    assert_one_line_error(results[name], words)
    assert not (folder / "wrong").exists()


def test_oa_column_of_the_paper(shared_data) -> None:
    from qlora_jax.evaluate.tournament.elo import elo
    from qlora_jax.evaluate.tournament.games import games_of
    from qlora_jax.evaluate.tournament.verdicts import read_verdicts, select

    verdicts = select(read_verdicts(shared_data / "oa_bench" / "pairwise_gpt4.csv").verdicts, "threeclass", "oa")
    ratings = elo(games_of(verdicts), k=32, orderings=4_000, seed=0)
    assert {name: rating.elo for name, rating in ratings.items()} == pytest.approx(OA_COLUMN, abs=3)
    assert list(ratings) == list(OA_COLUMN)
