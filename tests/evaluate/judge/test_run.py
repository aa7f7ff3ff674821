"""Judging against a server on this machine that misbehaves: what is repeated, what is not, and what stays on disk."""

import asyncio
import email.utils
import json
import time

import pytest

from qlora_jax.errors import InputError
from qlora_jax.evaluate.judge.client import Endpoint, Patience, completions_url, is_local
from qlora_jax.evaluate.judge.pairs import Answers, Question, compare
from qlora_jax.evaluate.judge.prompts import PROMPTS, REVIEWERS, read_prompts
from qlora_jax.evaluate.judge.run import Judging, Outcome, finished, judge_all
from qlora_jax.evaluate.judge.store import VerdictFile
from tests.judge_server import Behaviour, Reaction, by_words, judging, verdict, well_behaved

KEY = "sk-aVerySecretWord"
PATIENCE = Patience(timeout=3, retries=3, backoff=0.01, longest=2.0)
HTTP_DATE = email.utils.formatdate(time.time() - 60, usegmt=True)  # in the past: no wait


def comparisons(n: int):
    questions = [Question(i, f"What is {i}?", "") for i in range(n)]
    texts = {"a": "one two three", "b": "one two"}
    return compare(questions, [Answers(name, {str(i): text for i in range(n)}) for name, text in texts.items()])


def judged_by(judge: str = "words", protocol: str = "threeclass") -> Judging:
    return Judging(judge, protocol, "any", read_prompts(PROMPTS[protocol], REVIEWERS))


def run(path, behaviour: Behaviour, n=2, concurrency=2, max_failures=20, patience=PATIENCE, protocol="threeclass"):
    """(outcome, server, rows on disk) of judging n questions in both orders."""
    asked = comparisons(n)
    with judging(behaviour) as server, VerdictFile(path) as file:
        url = completions_url(server.base_url)
        outcome: Outcome = asyncio.run(
            judge_all(judged_by(protocol=protocol), asked, file, url, KEY, patience, concurrency, max_failures)
        )
    return outcome, server, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def once(reaction: Reaction) -> Behaviour:
    """The first request goes wrong, the others are answered."""
    return lambda number, request: reaction if number == 0 else Reaction(by_words(request))


@pytest.mark.parametrize(
    "reaction",
    [
        Reaction(status=429),
        Reaction(status=429, headers={"Retry-After": HTTP_DATE}),
        Reaction(status=429, headers={"Retry-After": "soon"}),
        Reaction(status=500, body=b"<html>oops</html>"),
        Reaction(status=503, headers={"Retry-After": "0.05"}),
        Reaction("1", sent=20),  # the connection closes in the middle of the body
        Reaction(body=b'{"choices": [{"mess'),
        Reaction(body=b'{"choices": []}'),
        Reaction(body=b'["a list"]'),
        Reaction(body=b'{"error": {"message": "overloaded"}}'),
        Reaction(body=b'{"choices": [{"message": {"content": 5}}]}'),
        Reaction(body=b"[" * 100_000),
        Reaction(body=b"\xff\xfe"),
        Reaction(body=b""),
        Reaction("1", seconds=4),  # over the time limit
        Reaction(reset=True),
    ],
    ids=lambda reaction: repr(reaction)[:60],
)
def test_what_may_pass_is_tried_again(tmp_path, reaction) -> None:
    outcome, server, rows = run(tmp_path / "v.jsonl", once(reaction))
    assert outcome.fatal is None and not outcome.failures and outcome.repeated == 1
    assert len(server.requests) == 5 and len(rows) == 4
    assert {(row["first"], row["score"]) for row in rows} == {("a", 1), ("b", 2)}
    assert all((row["prompt_tokens"], row["completion_tokens"]) == (100, 10) for row in rows)


def test_retry_after_holds_back_all_requests(tmp_path) -> None:
    late = once(Reaction(status=429, headers={"Retry-After": "0.4"}))
    _, server, rows = run(tmp_path / "v.jsonl", late, n=4, concurrency=1)
    assert server.times[1] - server.times[0] >= 0.4 and len(rows) == 8

    def second_is_late(number: int, request: dict) -> Reaction:
        return (
            Reaction(status=429, headers={"Retry-After": "0.4"})
            if number == 0
            else Reaction(by_words(request), seconds=0.05)
        )

    _, server, rows = run(tmp_path / "w.jsonl", second_is_late, n=4, concurrency=2)
    begun = [moment - server.times[0] for moment in server.times]
    assert len(rows) == 8 and sum(moment < 0.39 for moment in begun) == 2  # both of the first, then none for 0.4 s


def test_waits_double(tmp_path, monkeypatch) -> None:
    asked_for, sleep = [], Endpoint._sleep

    async def noted(endpoint: Endpoint, seconds: float) -> None:
        asked_for.extend([seconds] if seconds > 0 else [])
        await sleep(endpoint, seconds)

    monkeypatch.setattr(Endpoint, "_sleep", noted)
    patience = Patience(timeout=3, retries=3, backoff=0.1, longest=9)
    outcome, server, _ = run(
        tmp_path / "v.jsonl", lambda *_: Reaction(status=500), 1, 1, max_failures=1, patience=patience
    )
    waited = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(asked_for) == len(waited) == 3
    assert all(0.05 * 2**i <= seconds <= 0.1 * 2**i for i, seconds in enumerate(asked_for)), asked_for
    assert all(here >= seconds - 0.01 for here, seconds in zip(waited, asked_for, strict=True)), (waited, asked_for)
    assert "HTTP 500" in str(outcome.fatal)


def test_a_limit_then_an_error_that_is_kept_and_the_run_goes_on(tmp_path) -> None:
    def behaviour(_: int, request: dict) -> Reaction:
        text = request["messages"][1]["content"]
        if "What is 1?" in text:
            return Reaction(status=500, body=json.dumps({"error": {"message": f"{KEY}\n\x1b[31mred"}}).encode())
        if "What is 2?" in text:
            return Reaction(status=400, body=b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
        if "What is 3?" in text:
            return Reaction(status=429, headers={"Retry-After": "3600"})
        return Reaction(by_words(request))

    outcome, server, rows = run(tmp_path / "v.jsonl", behaviour, n=6, concurrency=3)
    assert outcome.fatal is None and len(rows) == 6 and len(outcome.failures) == 6
    reasons = {comparison.question.item: reason for comparison, reason in outcome.failures}
    assert reasons[1].endswith("[key] [31mred, 4 times")  # one line, no escape, no key
    assert "HTTP 400" in reasons[2] and "too long" in reasons[2] and "asked to wait 3600 s" in reasons[3]
    assert len(server.requests) == 6 + 2 * 4 + 2 + 2


@pytest.mark.parametrize(
    "reaction, words",
    [
        (Reaction(status=401, body=f"Incorrect key: {KEY}".encode()), "HTTP 401"),
        (Reaction(status=403), "HTTP 403"),
        (Reaction(status=404, body=b'{"error": {"message": "no model words"}}'), "no model words; check --base_url"),
        (Reaction(status=302, headers={"Location": "http://localhost:1/"}), "HTTP 302"),
        (Reaction(status=429, body=b'{"error": {"message": "no money", "code": "insufficient_quota"}}'), "no money"),
    ],
)
def test_what_no_request_can_pass_ends_the_run(tmp_path, reaction, words) -> None:
    outcome, server, rows = run(tmp_path / "v.jsonl", lambda *_: reaction, n=20, concurrency=2)
    assert words in str(outcome.fatal) and KEY not in str(outcome.fatal) and not rows
    assert len(server.requests) <= 2


def test_a_key_that_is_revoked_loses_nothing(tmp_path) -> None:
    def revoked(number: int, request: dict) -> Reaction:
        return Reaction(status=401) if number == 5 else Reaction(by_words(request))

    outcome, server, rows = run(tmp_path / "v.jsonl", revoked, n=20, concurrency=3)
    assert "HTTP 401" in str(outcome.fatal) and len(rows) == len(server.requests) - 1 < 10


def test_a_server_that_is_gone_ends_the_run(tmp_path) -> None:
    patience = Patience(timeout=1, retries=1, backoff=0.001, longest=1)
    outcome, server, _ = run(
        tmp_path / "v.jsonl", lambda *_: Reaction(reset=True), n=50, max_failures=5, patience=patience
    )
    assert "5 requests in a row have failed" in str(outcome.fatal) and len(server.requests) <= 14


def test_failures_with_successes_between_do_not_end_the_run(tmp_path) -> None:
    def every_other(number: int, request: dict) -> Reaction:
        return Reaction(status=400) if number % 2 else Reaction(by_words(request))

    outcome, _, rows = run(tmp_path / "v.jsonl", every_other, n=5, concurrency=1, max_failures=2)
    assert outcome.fatal is None and (len(rows), len(outcome.failures)) == (5, 5)


def test_concurrency_is_bounded_and_the_key_is_only_in_its_header(tmp_path) -> None:
    def slow(_: int, request: dict) -> Reaction:
        return Reaction(by_words(request), seconds=0.02)

    _, server, rows = run(tmp_path / "v.jsonl", slow, n=10, concurrency=4)
    assert len(rows) == 20 and 2 <= server.most_at_once <= 4
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "v.jsonl").read_text() and KEY not in json.dumps(server.requests)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.requests} == {
        ("words", 0.2, 1024)
    }


@pytest.mark.parametrize("protocol, score", [("threeclass", -1), ("relative", [-1, -1])])
def test_a_judge_that_answers_garbage(tmp_path, protocol, score) -> None:
    replies = ["I like both.", "\ud800", json.dumps(None)]

    def garbage(number: int, _: dict) -> Reaction:
        if number == 3:  # all tokens went into thinking
            return Reaction(body=b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}')
        return Reaction(replies[number])

    outcome, server, rows = run(tmp_path / "v.jsonl", garbage, protocol=protocol, concurrency=1)
    assert [row["score"] for row in rows] == [score] * 4 and outcome.unparsed == 4 and len(server.requests) == 4
    assert [row["text"] for row in rows] == [*replies, ""] and rows[3]["prompt_tokens"] is None


def test_text_in_parts_and_a_text_cut_off(tmp_path) -> None:
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "x\n"}, {"type": "text", "text": "2"}]}}]}

    def behaviour(number: int, _: dict) -> Reaction:
        return Reaction(body=json.dumps(parts).encode()) if number else Reaction("1", finish_reason="length")

    _, _, rows = run(tmp_path / "v.jsonl", behaviour, n=1, concurrency=1)
    assert [row["score"] for row in rows] == [-1, 2]


def test_only_verdicts_of_the_same_judge_prompt_and_answers_are_gone_on_from(tmp_path) -> None:
    path = tmp_path / "v.jsonl"
    _, _, rows = run(path, well_behaved)
    assert len(finished(judged_by(), comparisons(5), rows, path)) == 4
    for other, words in (
        (judged_by("other"), "judge is 'words' there"),
        (judged_by(protocol="relative"), "protocol is"),
    ):
        with pytest.raises(InputError, match=words):
            finished(other, comparisons(2), rows, path)
    changed = compare([Question(0, "What is 0?", "")], [Answers("a", {"0": "new"}), Answers("b", {"0": "one two"})])
    with pytest.raises(InputError, match="row 1: question 0 or the answer of (a or b|b or a) to it"):
        finished(judged_by(), changed, rows, path)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:80",
        "ftp://host/v1",
        "",
        "http://",
        "http://h:x/v1",
        "http://[::1/v1",
        "http://me:secret@host/v1",
        "https://h/v1?key=secret",
    ],
)
def test_addresses(url) -> None:
    with pytest.raises(InputError, match="base_url") as error:
        completions_url(url)
    assert "secret" not in str(error.value)


def test_addresses_are_completed_and_local_ones_known() -> None:
    expected = "http://h:8/v1/chat/completions"
    assert completions_url("http://h:8/v1/") == completions_url(expected) == expected
    assert [is_local(f"http://{host}/v1") for host in ("localhost:1", "127.0.0.1", "[::1]:8", "h")] == [True] * 3 + [
        False
    ]


def test_the_servers_own_rule() -> None:
    asked = comparisons(1)[0]  # "one two three" before "one two"
    request = judged_by().body(asked)
    assert by_words(request).endswith("\n1") and verdict(request, {"What is 0?": "two one"}).endswith("\n2")
    assert verdict(request, {"What is 1?": "two one"}).endswith("\n1")
    assert verdict(judged_by(protocol="relative").body(asked), {"What is 0?": "two one"}).startswith("8 10\n")
