"""Lets a model judge pairs of answers. Without --dry_run the example asks the model and costs money.

    python -m experiments.judge --questions=assets/judging/questions.jsonl --answers=assets/judging/first.jsonl \\
      --answers=assets/judging/second.jsonl --judge_model=gpt-4 --out=runs/verdicts.jsonl --dry_run

A judge is any OpenAI-compatible endpoint (--base_url); its key comes from an environment variable (--key_env) and is
neither printed nor stored. Every verdict is appended to --out at once: run the same command again to go on, also after
a kill; nothing is paid for twice but what was on its way. Comparisons that failed stand in FILE.errors.jsonl, the exit
status is then 2, and the next run tries them again. `tournament --verdicts=FILE.jsonl` and `agreement` read it.

Questions: JSONL {question_id, text or turns, category}. Answers: JSONL {question_id, text or generation, model_id}.
Protocols: threeclass (first, second, tie) and relative (1 to 10 points for each). The default prompts have the paper's
roles in our own words; for the paper's own, give its files as --prompts and --reviewers.
Before it starts, requests, tokens and, with prices, the cost are printed; --dry_run ends there.
"""

import asyncio
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.evaluate.judge.cost import Tokens
    from qlora_jax.evaluate.judge.pairs import Comparison
    from qlora_jax.evaluate.judge.run import Judging, Outcome
    from qlora_jax.evaluate.judge.store import VerdictFile

QUESTIONS = flags.DEFINE_string("questions", None, "JSONL of questions", required=True)
ANSWERS = flags.DEFINE_multi_string("answers", [], "JSONL of one system's answers, or NAME=FILE; repeat it")
OUT = flags.DEFINE_string("out", None, "JSONL that verdicts are appended to", required=True)
JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "the judge's name at the endpoint", required=True)
BASE_URL = flags.DEFINE_string("base_url", "https://api.openai.com/v1", "address of the endpoint, with its /v1")
KEY_ENV = flags.DEFINE_string(
    "key_env", "OPENAI_API_KEY", "environment variable with the key; a server on this machine gets it only where given"
)
PROTOCOL = flags.DEFINE_enum("protocol", "threeclass", ["threeclass", "relative"], "what the judge is asked for")
ORDERS = flags.DEFINE_enum("orders", "both", ["both", "first", "random"], "whose answer stands first")
BASELINE = flags.DEFINE_string("baseline", None, "system that all others are compared with; all pairs without it")
BENCHMARK = flags.DEFINE_string("benchmark", "any", "name of the benchmark, as tournament has it")
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL of prompts; our own by default")
REVIEWERS = flags.DEFINE_string("reviewers", None, "JSONL of which prompt a category of question has")
MAX_QUESTIONS = flags.DEFINE_integer("max_questions", None, "the first so many questions alone", lower_bound=1)
PARTIAL = flags.DEFINE_bool("partial", False, "pass over questions that one of two systems has not answered")
SEED = flags.DEFINE_integer("seed", 0, "of --orders=random")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "of the judge; below 0 it is not sent; the reviewers' (0.2) by default"
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "tokens that the judge writes at most; the reviewers' (1024) by default", lower_bound=1
)
TOKENS_FIELD = flags.DEFINE_enum(
    "tokens_field", "max_tokens", ["max_tokens", "max_completion_tokens"], "what the endpoint calls it"
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "requests side by side", lower_bound=1)
TIMEOUT = flags.DEFINE_float("timeout", 120.0, "seconds for one answer of the judge")
RETRIES = flags.DEFINE_integer("retries", 6, "tries of a request after the first", lower_bound=0)
BACKOFF = flags.DEFINE_float("backoff", 1.0, "seconds before the first repetition; doubles", lower_bound=0)
MAX_WAIT = flags.DEFINE_float(
    "max_wait", 120.0, "seconds of one wait at most, also where Retry-After asks", lower_bound=0
)
MAX_FAILURES = flags.DEFINE_integer("max_failures", 20, "failures in a row that end the run", lower_bound=1)
PRICE_INPUT = flags.DEFINE_float("price_input", None, "USD per million tokens read", lower_bound=0)
PRICE_OUTPUT = flags.DEFINE_float("price_output", None, "USD per million tokens written", lower_bound=0)
MAX_COST = flags.DEFINE_float("max_cost", None, "USD: an estimate above it is refused", lower_bound=0)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the estimate and the first request; send nothing, write nothing")


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.judge.client import completions_url
    from qlora_jax.evaluate.judge.cost import estimate
    from qlora_jax.evaluate.judge.pairs import check_known, compare, read_answers, read_questions
    from qlora_jax.evaluate.judge.prompts import PROMPTS as OWN
    from qlora_jax.evaluate.judge.prompts import REVIEWERS as OWN_REVIEWERS
    from qlora_jax.evaluate.judge.prompts import read_prompts
    from qlora_jax.evaluate.judge.run import Judging, finished
    from qlora_jax.evaluate.judge.store import VerdictFile, read_back

    out = Path(OUT.value).expanduser()
    if out.is_dir() or not out.name.endswith(".jsonl") or out.name.endswith(".errors.jsonl"):
        raise InputError(f"--out={out}: expected a file of verdicts, FILE.jsonl")
    prices = [PRICE_INPUT.value, PRICE_OUTPUT.value]
    if None in prices and prices != [None, None] or (None in prices and MAX_COST.value is not None):
        raise InputError("a cost needs both prices, --price_input and --price_output (USD per million tokens)")
    if not TIMEOUT.value > 0:
        raise InputError(f"--timeout={TIMEOUT.value}: expected a positive number of seconds")
    for flag in (TIMEOUT, BACKOFF, MAX_WAIT, TEMPERATURE, PRICE_INPUT, PRICE_OUTPUT, MAX_COST):
        if flag.value is not None and not math.isfinite(flag.value):
            raise InputError(f"--{flag.name}={flag.value}: expected a finite number")
    if not BENCHMARK.value or not JUDGE_MODEL.value:
        raise InputError("--benchmark and --judge_model need a name")
    url = completions_url(BASE_URL.value)
    key = None if DRY_RUN.value else read_key(url)
    prompts = read_prompts(
        Path(PROMPTS.value).expanduser() if PROMPTS.value else OWN[PROTOCOL.value],
        Path(REVIEWERS.value).expanduser() if REVIEWERS.value else OWN_REVIEWERS,
        TEMPERATURE.value,
        MAX_TOKENS.value,
    )
    questions = read_questions(Path(QUESTIONS.value).expanduser())
    systems = [read_answers(given) for given in ANSWERS.value]
    for system in systems:
        check_known(questions, system)
    asked = questions[: MAX_QUESTIONS.value]
    comparisons = compare(asked, systems, ORDERS.value, BASELINE.value, PARTIAL.value, SEED.value)
    judging = Judging(JUDGE_MODEL.value, PROTOCOL.value, BENCHMARK.value, prompts, TOKENS_FIELD.value)
    if DRY_RUN.value:
        rows = read_back(out, out.read_bytes())[0] if out.exists() else []
        done = finished(judging, comparisons, rows, out)
        left = [comparison for comparison in comparisons if comparison.key not in done]
        announce(judging, comparisons, left, len(asked), estimate(left, prompts))
        show_request(judging, (left or comparisons)[0])
        return 0
    with VerdictFile(out) as file:
        done = finished(judging, comparisons, file.rows, out)
        left = [comparison for comparison in comparisons if comparison.key not in done]
        if file.repaired:
            note(f"{out}: a half-written last line ({file.repaired} bytes) was cut off")
        announce(judging, comparisons, left, len(asked), estimate(left, prompts))
        outcome = ask(judging, left, file, url, key)
    everything = [*done.values(), *outcome.rows]
    write_errors(out, outcome)
    summarise(everything, outcome, out)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.fatal is not None:
        raise outcome.fatal
    if outcome.failures:
        raise InputError(
            f"{len(outcome.failures)} of {len(comparisons)} comparisons failed, the first: {outcome.failures[0][1]}; "
            f"all stand in {errors_file(out)}; run the same command again to try them again"
        )
    return 0


def read_key(url: str) -> str | None:
    """The key from its environment variable. Raises InputError, without the key, where there is none to send."""
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.judge.client import is_local

    name, named = KEY_ENV.value, flags.FLAGS["key_env"].present
    key = os.environ.get(name, "").strip()
    if is_local(url) and not named:
        return None
    if not key:
        raise InputError(f"the environment variable {name} is not set; it holds the key for {url} (--key_env names it)")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"the environment variable {name} holds blanks or other characters that no key has")
    if url.startswith("http:") and not is_local(url):
        note(f"the key in {name} goes unencrypted to {url}; https:// would protect it")
    return key


def cost_of(tokens: "Tokens") -> float | None:
    """USD; None without prices."""
    if PRICE_INPUT.value is None or PRICE_OUTPUT.value is None:
        return None
    return tokens.dollars(PRICE_INPUT.value, PRICE_OUTPUT.value)


def announce(
    judging: "Judging", comparisons: "Sequence[Comparison]", left: "Sequence[Comparison]", asked: int, tokens: "Tokens"
) -> None:
    """What will be done and what it costs. Raises InputError above --max_cost."""
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.judge.cost import RULE

    pairs = len({frozenset((comparison.first, comparison.second)) for comparison in comparisons})
    print(
        f"{judging.judge} judges {pairs} pair{'s' * (pairs != 1)} of systems on {asked} questions, {judging.protocol}, "
        f"orders {ORDERS.value}: {len(comparisons)} comparisons"
    )
    if len(left) < len(comparisons):
        print(f"resuming: {len(comparisons) - len(left)} verdicts are there, {len(left)} are left")
    cost = cost_of(tokens)
    price = "" if cost is None else f"; at most about {cost:.2f} USD"
    print(
        f"{tokens.requests:,} requests, about {tokens.read:,} tokens read, at most {tokens.written:,} written ({RULE}; "
        f"repeated requests come on top){price}",
        flush=True,
    )
    if cost is not None and MAX_COST.value is not None and cost > MAX_COST.value:
        raise InputError(f"the estimate of {cost:.2f} USD is above --max_cost={MAX_COST.value:g}; nothing was sent")


def show_request(judging: "Judging", comparison: "Comparison") -> None:
    from qlora_jax.progress import for_terminal

    print(
        f"\nthe first request, on question {comparison.question.item}, {comparison.first} before {comparison.second}:"
    )
    for message in judging.body(comparison)["messages"]:
        text = message["content"].encode("utf-8", "replace").decode()
        print(f"\n--- {message['role']} ---\n{for_terminal(text)}")


def ask(judging: "Judging", left: "Sequence[Comparison]", file: "VerdictFile", url: str, key: str | None) -> "Outcome":
    """Sends what is left, under a progress bar."""
    from tqdm import tqdm

    from qlora_jax.evaluate.judge.client import Patience
    from qlora_jax.evaluate.judge.run import Outcome, judge_all

    if not left:
        return Outcome()
    patience = Patience(TIMEOUT.value, RETRIES.value, BACKOFF.value, MAX_WAIT.value)
    with tqdm(total=len(left), desc="judging", unit="verdict") as bar:

        def say(text: str) -> None:
            bar.write(text, file=sys.stderr)

        def progress(outcome: "Outcome") -> None:
            counts = {"unparsed": outcome.unparsed, "failed": len(outcome.failures), "repeated": outcome.repeated}
            bar.set_postfix(counts, refresh=False)
            bar.update(len(outcome.rows) + len(outcome.failures) - bar.n)

        return asyncio.run(
            judge_all(judging, left, file, url, key, patience, CONCURRENCY.value, MAX_FAILURES.value, progress, say)
        )


def errors_file(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl") + ".errors.jsonl")


def write_errors(out: Path, outcome: "Outcome") -> None:
    """What failed in this run; no file where nothing did."""
    path = errors_file(out)
    lines = [
        {"item_id": failed.question.item, "first": failed.first, "second": failed.second, "error": reason}
        for failed, reason in outcome.failures
    ]
    try:
        if lines:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # verdicts are safe, and what ended the run is still to be said
        note(f"{path} cannot be written: {error.strerror}")


def summarise(rows: list[dict], outcome: "Outcome", out: Path) -> None:
    """The table of wins by order, position bias, and what was paid; nothing where there is no verdict."""
    from qlora_jax.evaluate.judge.cost import used
    from qlora_jax.evaluate.judge.summary import order_table, steadiness
    from qlora_jax.evaluate.tables import as_text

    if not rows:
        return
    header, cells = order_table(rows)
    print(f"\n{as_text(header, cells)}\n")
    for line in steadiness(rows):
        print(line)
    tokens = used(outcome.rows)
    dollars = cost_of(tokens)
    cost = "" if dollars is None else f", {dollars:.2f} USD"
    counted = "" if tokens.requests == len(outcome.rows) else f" (counted by the server for {tokens.requests} of them)"
    print(
        f"this run: {len(outcome.rows)} verdicts, {len(outcome.failures)} failed, {outcome.repeated} repeated; "
        f"{tokens.read:,} tokens read, {tokens.written:,} written{counted}{cost}"
    )
    print(f"written: {out} ({len(rows)} verdicts of this comparison)", flush=True)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
