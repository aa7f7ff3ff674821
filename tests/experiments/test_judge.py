"""The command `judge` as a user runs it: kills, Ctrl-C, resuming, costs, keys, and tournament on its file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.judge_server import JudgeServer, Reaction, by_words, judging

KEY = "sk-aVerySecretWord"
SYSTEMS = {"a": "one two three four", "b": "one two three", "c": "one"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    write(
        folder / "q.jsonl",
        [{"question_id": i, "text": f"Q{i}?", "category": "math" if i < 3 else "x"} for i in range(10)],
    )
    for name, text in SYSTEMS.items():
        write(folder / f"{name}.jsonl", [{"question_id": i, "text": text, "model_id": name} for i in range(10)])
    write(folder / "few.jsonl", [{"question_id": 3, "text": "x"}])
    write(folder / "other.jsonl", [{"question_id": 99, "text": "x"}])
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(b'{"question_id": 1, "text": "na\xefve"}\n')
    (folder / "notes.jsonl").write_text("my notes")
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(folder: Path, url: str, out: str, *more: str, answers: str = "abc") -> list[str]:
    given = [f"--answers={folder}/{name}.jsonl" for name in answers]
    flags = [
        f"--questions={folder}/q.jsonl",
        *given,
        f"--base_url={url}",
        f"--out={folder}/{out}",
        "--judge_model=words",
    ]
    return ["experiments.judge", *flags, "--benchmark=mine", "--backoff=0.01", *more]


@pytest.fixture(scope="module")
def results(folder, run_commands) -> dict:
    """One round of commands: a whole run, the same again, tables of it, and mistakes."""

    def behaviour(_: int, request: dict) -> Reaction:
        if request["model"] == "garbage":
            return Reaction("Who can say?")
        if request["model"] == "poor" and "Q7?" in request["messages"][1]["content"]:
            return Reaction(status=400, body=b'{"error": {"message": "too long"}}')
        if request["model"] == "nobody":
            return Reaction(status=404, body=b'{"error": {"message": "no model nobody"}}')
        return Reaction(by_words(request))

    with judging(behaviour) as server:
        url, remote = server.base_url, "https://judge.invalid/v1"
        commands = {
            "whole": command(folder, url, "v.jsonl"),
            "again": command(folder, url, "v.jsonl"),
            "relative": command(folder, url, "r.jsonl", "--protocol=relative", "--baseline=c"),
            "garbage": command(folder, url, "g.jsonl", "--judge_model=garbage", "--protocol=relative", answers="ab"),
            "poor": command(folder, url, "p.jsonl", "--judge_model=poor", answers="ab"),
            "tournament": [
                "experiments.tournament",
                f"--verdicts={folder}/v.jsonl",
                "--orderings=5",
                f"--out={folder}/t",
            ],
            "points": [
                *("experiments.tournament", f"--verdicts={folder}/r.jsonl", "--protocol=relative", "--reference=c"),
                f"--out={folder}/tr",
            ],
            "agreement": ["experiments.agreement", f"--first={folder}/v.jsonl", f"--second={folder}/v.jsonl"],
            "dry": command(folder, remote, "dry.jsonl", "--dry_run", "--price_input=10", "--price_output=30"),
            "dear": command(folder, url, "d.jsonl", "--max_cost=0.1", "--price_input=10", "--price_output=30"),
            "cheap": command(
                folder, url, "d.jsonl", "--max_cost=9", "--price_input=10", "--price_output=30", "--max_questions=2"
            ),
            "unpriced": command(folder, url, "n.jsonl", "--max_cost=1"),
            "no key": command(folder, remote, "n.jsonl", "--key_env=NO_SUCH_KEY"),
            "other judge": command(folder, url, "v.jsonl", "--judge_model=other"),
            "nobody": command(folder, url, "n.jsonl", "--judge_model=nobody"),
            "notes": command(folder, url, "notes.jsonl"),
            "few": command(folder, url, "n.jsonl", f"--answers={folder}/few.jsonl"),
            "other questions": command(folder, url, "n.jsonl", f"--answers={folder}/other.jsonl"),
            "empty": command(folder, url, "n.jsonl", f"--answers={folder}/empty.jsonl"),
            "latin": command(folder, url, "n.jsonl", f"--answers={folder}/latin.jsonl"),
            "one": command(folder, url, "n.jsonl", answers="a"),
            "twice": command(folder, url, "n.jsonl", answers="aa"),
            "baseline": command(folder, url, "n.jsonl", "--baseline=gpt"),
            "out": command(folder, url, "n.csv"),
        }
        found = dict(zip(commands, run_commands(list(commands.values())), strict=True))
    return found | {"requests": server.requests, "headers": server.headers}


def test_a_whole_run(results, folder) -> None:
    assert results["whole"]["status"] == 0, results["whole"]["err"]
    rows = read(folder / "v.jsonl")
    assert len(rows) == 3 * 2 * 10 and Counter(row["score"] for row in rows) == {1: 30, 2: 30}
    assert all(len(SYSTEMS[row["first"]]) > len(SYSTEMS[row["second"]]) for row in rows if row["score"] == 1)
    assert "3 pairs of systems on 10 questions, threeclass, orders both: 60 comparisons" in results["whole"]["out"]
    assert "first answer preferred: 50.0%" in results["whole"]["out"]
    assert [line.split() for line in results["whole"]["out"].splitlines()[4:6]] == [
        ["a", "b", "10", "0", "0", "0"],
        ["b", "a", "0", "10", "0", "0"],
    ]


def test_the_same_again_asks_for_nothing(results, folder) -> None:
    assert results["again"]["status"] == 0
    assert "resuming: 60 verdicts are there, 0 are left" in results["again"]["out"]
    assert sum(request["model"] == "words" for request in results["requests"]) == 60 + 40 + 12


def test_tournament_and_agreement_read_the_file(results, folder) -> None:
    for name in ("tournament", "points", "agreement"):
        assert results[name]["status"] == 0, results[name]["err"]
    elo = json.loads((folder / "t" / "elo.json").read_text())
    assert list(elo) == ["a", "b", "c"] and elo["a"]["games"] == 40
    points = json.loads((folder / "tr" / "relative.json").read_text())
    assert set(points) == {"a", "b"} and (folder / "t" / "categories.csv").exists()
    steady = [
        line for line in results["agreement"]["out"].splitlines() if line.startswith("same in both orders, first")
    ]
    assert steady[0].split()[-5:] == ["100.0%", "88.6%", "to", "100.0%", "30"]


def test_unparsed_verdicts_are_kept_and_failures_told(results, folder) -> None:
    garbage = read(folder / "g.jsonl")
    assert results["garbage"]["status"] == 0 and "unparsed: 20 of 20" in results["garbage"]["out"]
    assert {(*row["score"], row["text"]) for row in garbage} == {(-1, -1, "Who can say?")}
    assert not (folder / "g.errors.jsonl").exists()
    assert results["poor"]["status"] == 2 and len(read(folder / "p.jsonl")) == 18
    assert "error: 2 of 20 comparisons failed, the first: HTTP 400" in results["poor"]["err"].splitlines()[-1]
    failed = read(folder / "p.errors.jsonl")
    assert [row["item_id"] for row in failed] == [7, 7] and "too long" in failed[0]["error"]


def test_costs_are_known_before_anything_is_sent(results, folder) -> None:
    assert results["dry"]["status"] == 0 and not (folder / "dry.jsonl").exists()
    assert "60 requests" in results["dry"]["out"] and "USD" in results["dry"]["out"] and "Q0?" in results["dry"]["out"]
    assert results["dear"]["status"] == 2 and "above --max_cost=0.1; nothing was sent" in results["dear"]["err"]
    assert results["cheap"]["status"] == 0 and len(read(folder / "d.jsonl")) == 12


@pytest.mark.parametrize(
    "name, words",
    [
        ("unpriced", "--price_input and --price_output"),
        ("no key", "the environment variable NO_SUCH_KEY is not set"),
        ("other judge", "judge is 'words' there and 'other' here"),
        ("nobody", "no model nobody; check --base_url and --judge_model"),
        ("notes", "notes.jsonl is no file of verdicts"),
        ("few", "few: no answer to question 0 (9 of 10 missing); --partial"),
        ("other questions", "other answers question 99, which the file of questions has not"),
        ("empty", "empty.jsonl is empty (0 bytes)"),
        ("latin", "latin.jsonl, line 1: not UTF-8"),
        ("one", "at least two: repeat --answers=FILE"),
        ("twice", "two files of answers are of a; name them apart"),
        ("baseline", "--baseline=gpt: no such system; the answers are of a, b, c"),
        ("out", "expected a file of verdicts, FILE.jsonl"),
    ],
)
def test_mistakes_are_one_line(results, folder, name, words) -> None:
    last = results[name]["err"].splitlines()[-1]
    assert results[name]["status"] == 2 and last.startswith("error: ") and words in last
    assert "Traceback" not in results[name]["err"] and (folder / "notes.jsonl").read_text() == "my notes"


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    module, *flags = arguments
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | environment,
    )


def wait_for(server: JudgeServer, requests: int) -> None:
    end = time.monotonic() + 60
    while len(server.requests) < requests and time.monotonic() < end:
        time.sleep(0.005)
    assert len(server.requests) >= requests


def asked(server: JudgeServer) -> Counter[str]:
    return Counter(request["messages"][1]["content"] for request in server.requests)


def test_a_killed_run_goes_on_and_pays_only_for_what_was_on_its_way_twice(folder) -> None:
    concurrency = 4
    with judging(lambda _, request: Reaction(by_words(request), seconds=0.02)) as server:
        arguments = command(
            folder, server.base_url, "killed.jsonl", f"--concurrency={concurrency}", "--key_env=THE_KEY"
        )
        for requests in (15, 35):
            process = start(arguments, THE_KEY=KEY)
            wait_for(server, requests)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        with open(folder / "killed.jsonl", "ab") as file:
            file.write(b'{"benchmark": "mine", "fir')  # the line that a crash of the machine leaves
        process = start(arguments, THE_KEY=KEY)
        out, err = process.communicate()
    assert process.returncode == 0 and "resuming:" in out and "a half-written last line (26 bytes) was cut off" in err
    rows = read(folder / "killed.jsonl")
    keys = [(row["item_id"], row["first"], row["second"]) for row in rows]
    assert len(keys) == len(set(keys)) == 60 and set(asked(server).values()) <= {1, 2, 3}
    assert 60 <= len(server.requests) <= 60 + 2 * concurrency
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in out + err and not any(
        KEY in path.read_text("latin-1") for path in folder.iterdir() if path.is_file()
    )


def test_ctrl_c_saves_what_is_on_its_way(folder) -> None:
    with judging(lambda _, request: Reaction(by_words(request), seconds=0.3)) as server:
        arguments = command(folder, server.base_url, "stopped.jsonl", "--concurrency=4")
        # a key for other servers is not given to one on this machine
        process = start(arguments, OPENAI_API_KEY=KEY)
        wait_for(server, 12)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        sent = len(server.requests)
        assert process.returncode == 130 and err.splitlines()[-2].startswith("interrupted; run the same command again")
        assert "requests on their way" in out + err and len(read(folder / "stopped.jsonl")) == sent < 40
        process = start(arguments)
        process.communicate()
    assert process.returncode == 0 and len(server.requests) == 60 == len(read(folder / "stopped.jsonl"))
    assert not any("authorization" in headers for headers in server.headers)


def test_a_second_ctrl_c_ends_it_at_once(folder) -> None:
    with judging(lambda _, request: Reaction(by_words(request), seconds=90)) as server:
        process = start(command(folder, server.base_url, "left.jsonl"))
        wait_for(server, 8)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        process.communicate(timeout=60)  # sooner than the first answer
        assert process.returncode == 130
