"""Judging many comparisons side by side: what is left to do, the requests, and the rows they become."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.evaluate.judge.client import Endpoint, Patience, Refused, Reply, Stopped
from qlora_jax.evaluate.judge.pairs import Comparison
from qlora_jax.evaluate.judge.parse import relative_score, threeclass_score
from qlora_jax.evaluate.judge.prompts import Prompt, Prompts
from qlora_jax.evaluate.judge.store import SETTINGS, VerdictFile
from qlora_jax.evaluate.tournament.verdicts import UNPARSED
from qlora_jax.settings import config_hash


@dataclasses.dataclass(frozen=True)
class Judging:
    """What makes a verdict what it is. A negative temperature is not sent: some models take none."""

    judge: str
    protocol: str
    benchmark: str
    prompts: Prompts
    tokens_field: str = "max_tokens"  # its name in a request

    def body(self, comparison: Comparison) -> dict[str, Any]:
        """The request as JSON has it."""
        prompt = self.prompts.of(comparison.question.category)
        messages = prompt.messages(comparison.question.text, comparison.answer_1, comparison.answer_2)
        temperature = {} if prompt.temperature < 0 else {"temperature": prompt.temperature}
        return {"model": self.judge, "messages": messages, **temperature, self.tokens_field: prompt.max_tokens}

    def settings(self, category: str) -> dict[str, Any]:
        """The fields SETTINGS of a row on a question of this category."""
        prompt = self.prompts.of(category)
        values = (self.benchmark, self.judge, self.protocol, prompt.temperature, prompt.max_tokens, prompt.hash)
        return dict(zip(SETTINGS, values, strict=True))

    def row(self, comparison: Comparison, reply: Reply) -> dict[str, Any]:
        """The row of a verdict; `benchmark` is its first field (store.BEGINNING)."""
        prompt = self.prompts.of(comparison.question.category)
        return {
            "benchmark": self.benchmark,
            "first": comparison.first,
            "second": comparison.second,
            "item_id": comparison.question.item,
            "score": self.score(prompt, reply),
            "category": comparison.question.category,
            **{
                name: value
                for name, value in self.settings(comparison.question.category).items()
                if name != "benchmark"
            },
            "request": request_hash(comparison, prompt),
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "text": reply.text,
        }

    def score(self, prompt: Prompt, reply: Reply) -> int | list[float]:
        cut_off = reply.finish_reason == "length"
        if self.protocol == "relative":
            return relative_score(reply.text, cut_off, prompt.tuple_wanted)
        return threeclass_score(reply.text, cut_off)


def request_hash(comparison: Comparison, prompt: Prompt) -> str:
    """16 hex digits of the messages that a judge is sent."""
    texts = prompt.messages(comparison.question.text, comparison.answer_1, comparison.answer_2)
    return config_hash({"messages": texts})[:16]


def finished(
    judging: Judging, comparisons: Sequence[Comparison], rows: Sequence[dict], path: Path
) -> dict[tuple, dict]:
    """Rows of a file by comparison (its key), of those that are asked for.

    Raises InputError where the file holds verdicts of another judge, protocol or prompt, or of answers or questions
    that have changed since.
    """
    wanted = {comparison.key: comparison for comparison in comparisons}
    found = {}
    for number, row in enumerate(rows, 1):
        for name, here in judging.settings(str(row.get("category") or "")).items():
            if row[name] != here:
                raise InputError(
                    f"{path}, row {number}: {name} is {row[name]!r} there and {here!r} here; verdicts of one file have "
                    "one judge and one prompt: choose another --out"
                )
        key = str(row["item_id"]), row["first"], row["second"]
        comparison = wanted.get(key)
        if comparison is None:
            continue
        if row["request"] != request_hash(comparison, judging.prompts.of(comparison.question.category)):
            raise InputError(
                f"{path}, row {number}: question {key[0]} or the answer of {key[1]} or {key[2]} to it has changed "
                "since it was judged; choose another --out"
            )
        found[key] = row
    return found


@dataclasses.dataclass
class Outcome:
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[tuple[Comparison, str]] = dataclasses.field(default_factory=list)  # with the reason
    unparsed: int = 0  # of the rows
    repeated: int = 0  # requests that were sent again
    fatal: InputError | None = None  # what ended the run early
    interrupted: bool = False


async def judge_all(
    judging: Judging,
    comparisons: Sequence[Comparison],
    file: VerdictFile,
    url: str,
    key: str | None,
    patience: Patience,
    concurrency: int,
    max_failures: int,
    progress: Callable[[Outcome], None] = lambda _: None,
    note: Callable[[str], None] = print,
) -> Outcome:
    """Asks for every verdict and appends each to the file as it comes.

    Args:
      max_failures: failures in a row, with no success between, after which the run ends.
      progress: called after every verdict and every failure.
    Returns:
      what was gained, also where the run ended early or was interrupted (the task cancelled once): requests on their
      way were then waited for, because they are paid for.
    """
    outcome, queue = Outcome(), iter(comparisons)
    running = in_a_row = 0
    ended = False

    def end(error: InputError | None = None) -> None:
        nonlocal ended
        ended = True
        outcome.fatal = outcome.fatal or error
        endpoint.stop()

    async def work() -> None:
        nonlocal running, in_a_row
        for comparison in queue:
            if ended:
                return
            running += 1
            try:
                reply = await endpoint.ask(judging.body(comparison))
                row = judging.row(comparison, reply)
                file.append(row)
                outcome.rows.append(row)
                outcome.unparsed += row["score"] in (UNPARSED, [UNPARSED, UNPARSED])
                in_a_row = 0
            except Refused as error:
                outcome.failures.append((comparison, str(error)))
                in_a_row += 1
                if in_a_row >= max_failures:
                    end(InputError(f"{in_a_row} requests in a row have failed, the last: {error}"))
            except InputError as error:
                end(error)
            except Stopped:
                return
            finally:
                running -= 1
                outcome.repeated = endpoint.repeated
            progress(outcome)

    async with Endpoint(url, key, patience, concurrency) as endpoint:
        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(comparisons)))]
        try:
            await asyncio.wait(workers)
        except asyncio.CancelledError:
            outcome.interrupted = True
            end()
            note(f"interrupted: waiting for {running} requests on their way (again Ctrl-C leaves them)")
            await asyncio.wait(workers)
        for worker in workers:
            worker.result()
    return outcome
