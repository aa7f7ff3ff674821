"""Answers to a file of prompts: prepared, decoded in the file's order, batch by batch, and written as rows.

A row is {"question_id", fields that the prompt's row brought, "prompt", "text", "reason", "answer_id", "model_id"}:
`text` is the answer and `reason` why it ended (decode.Completion). `question_id` is the row's own, its `id`, or its
place in the file from 1. `answer_id` is a hash of the settings, the prompt's ids and its draws, so an answer is known
to belong to its prompt, and a run that is repeated gives the same file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.errors import InputError
from qlora_jax.generate.answer_file import MEND
from qlora_jax.generate.decode import Completion, check_prompt, complete_batches
from qlora_jax.generate.prompting import MANY_TURNS, Answer, Request, answer_text, prompt_ids, system_turn
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.seeds import Draws, draws_of_all
from qlora_jax.models.decoder import Decoder
from qlora_jax.text.tokenizer import Tokenizer


class Prepared(NamedTuple):
    """A prompt, ready for the model."""

    request: Request
    number: int  # place in the file, from 1
    template: str
    ids: list[int]
    draws: Draws
    answer_id: str


def prepare(
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    seed: int,
    template: str | None = None,
    system: str | None = None,
) -> list[Prepared]:
    """Prompts of requests.

    Args:
      settings: what answers depend on beside their prompts; a part of answer_id.
      template: one of prompting.TEMPLATES; by default plain for a prompt, alpaca for an instruction, and for a question
        the tokenizer's own, else guanaco.
      system: system line of conversations that bring none; None is the template's own.
    Raises:
      InputError: a conversation or a system line for a template that has no place for it.
    """
    templates = [template or default_template(tokenizer, request.form) for request in requests]
    prompts = []
    for request, name in zip(requests, templates, strict=True):
        if name not in MANY_TURNS and (request.before or system is not None):
            what = "a conversation" if request.before else "a system line"
            raise InputError(
                f"{request.where}: the template {name} has no place for {what}; expected {' or '.join(MANY_TURNS)}"
            )
        own = bool(request.before) and request.before[0]["role"] == "system"
        before = [*([] if own else system_turn(system)), *request.before]
        prompts.append(prompt_ids(tokenizer, name, request, before))
    draws = draws_of_all(prompts, seed, [request.seed for request in requests])
    base = json.dumps(settings, sort_keys=True)
    return [
        Prepared(request, number, name, ids, draw, _digest([base, ids, draw]))
        for number, (request, name, ids, draw) in enumerate(zip(requests, templates, prompts, draws, strict=True), 1)
    ]


def default_template(tokenizer: Tokenizer, form: str) -> str:
    """The template of requests of a form when the user names none."""
    if form == "question":
        return "chat" if tokenizer.chat_template else "guanaco"
    return "alpaca" if form == "instruction" else "plain"


def check_answered(prepared: Sequence[Prepared], rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises InputError unless `rows`, of the file `name`, answer the first of the prompts."""
    for number, (prompt, row) in enumerate(zip(prepared, rows, strict=False), 1):
        if row.get("answer_id") != prompt.answer_id:
            raise InputError(f"{name}, line {number}: the answer to another prompt than the file has there: {MEND}")
    if len(rows) > len(prepared):
        raise InputError(f"{name} has {len(rows)} answers to the {len(prepared)} prompts of the file: {MEND}")


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    prepared: Sequence[Prepared],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch_size: int,
    stops: Sequence[str] = (),
    model_id: str = "",
    done: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the prompts from place `done` on, a batch at a time, in their order.

    Raises:
      InputError: a prompt does not fit the model.
    """
    for prompt in prepared:
        check_prompt(prompt.ids, model, prompt.request.where)
    stop = Stop(tokenizer, prepared, stops)
    prompts, draws = [prompt.ids for prompt in prepared], [prompt.draws for prompt in prepared]
    order = range(done, len(prepared))
    for numbers, ends in complete_batches(
        model, prompts, sampling, eos_ids, batch_size, stop, progress, draws=draws, order=order
    ):
        yield [
            _row(prepared[number], end, tokenizer, stops, model_id) for number, end in zip(numbers, ends, strict=True)
        ]


class Stop:
    """The `stop` of `complete_batches`: whether the text of a row has come to a stop. Reads each token once."""

    def __init__(self, tokenizer: Tokenizer, prepared: Sequence[Prepared], stops: Sequence[str]):
        self._tokenizer, self._prepared, self._stops = tokenizer, prepared, stops
        self._answers: dict[int, Answer] = {}
        self._read: dict[int, int] = {}

    def __call__(self, number: int, tokens: Sequence[int]) -> bool:
        prompt = self._prepared[number]
        if number not in self._answers:
            self._answers[number] = Answer(self._tokenizer, prompt.template, prompt.ids, self._stops)
        text = self._answers[number]
        text.push(tokens[self._read.get(number, 0) :])
        self._read[number] = len(tokens)
        return text.stopped


def _row(
    prompt: Prepared, end: Completion, tokenizer: Tokenizer, stops: Sequence[str], model_id: str
) -> dict[str, Any]:
    kept = dict(prompt.request.kept)
    question_id = kept.pop("question_id", kept.get("id", prompt.number))
    return {
        "question_id": question_id,
        **kept,
        "prompt": prompt.request.message,
        "text": answer_text(tokenizer, prompt.template, prompt.ids, end.tokens, stops),
        "reason": end.reason,
        "answer_id": prompt.answer_id,
        "model_id": model_id,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:22]
