"""The rows of a chat: texts in which every turn to learn stands as it is generated.

Where the template writes a turn the same whether others follow or not, one row has all turns. Where it does not (it
drops thinking from earlier turns, or ends the last turn with another token), an answer is learned in a row that ends
with it; such a row has as well the earlier answers that it shows as they were generated.
"""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_turns import Turn, Turns, names_of
from qlora_jax.text.tokenizer import Tokenizer

TURNS = ("all", "last")  # which of a chat's answers are learned


@dataclasses.dataclass(frozen=True)
class Answer:
    """A turn of the assistant in a row, in characters of its text.

    begin: the end of its prompt. spans: what is said, [begin, end), rising. end: after the token that ends the turn.
    learned: it is learned in this row. silent: it is never to be learned.
    """

    begin: int
    spans: list[tuple[int, int]]
    end: int
    learned: bool = False
    silent: bool = False


@dataclasses.dataclass(frozen=True)
class ChatRow:
    """A rendered conversation, and the assistant's turns in it that stand as they were generated, rising. `numbered`:
    how the text names its control tokens (chat_guard)."""

    text: str
    answers: list[Answer]
    numbered: bool


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """The rows of a chat, in the order of their last turns.

    unwritten: answers to learn that have reasoning which the template does not write. closed: those that have none
      though their prompt opens it. hidden: a turn that is never to be learned does not stand in a row as it was
      generated, so that its place there is not known.
    """

    rows: list[ChatRow]
    unwritten: int = 0
    closed: int = 0
    hidden: bool = False


def rows_of(chat: Chat, tokenizer: Tokenizer, turns: str = "all", now: datetime.date | None = None) -> ChatRows:
    """Renders a chat with the tokenizer's template; no rows for a chat without an answer to learn.

    Args:
      turns: one of TURNS.
      now: the day for templates that write it.

    Raises:
      InputError: the tokenizer has no template, it refuses the conversation, or a turn cannot be learned exactly.
    """
    asked = [n for n, each in enumerate(chat.messages) if each["role"] == "assistant"]
    silent = [n for n in asked if chat.learn is not None and not chat.learn[n]]
    learned = [n for n in asked if n not in silent]
    if turns == "last":
        learned = learned[-1:]
    if not learned:
        return ChatRows([])
    written = Turns(chat.messages, chat.tools, tokenizer, now)
    found: dict[int, Turn] = {}
    for number in asked:
        if number in learned:
            found[number] = written.turn(number)
        elif number < learned[-1]:
            _try_turn(written, number, found)
    rows: list[tuple[int, set[int]]] = []  # the row's last turn, and those that are learned in it
    placed: dict[int, list[int]] = {}  # the row's last turn -> all that stand in it
    for number in reversed(learned):
        home = next((taken for last, taken in rows if number in placed[last]), None)
        if home is None:
            rows.append((number, {number}))
            placed[number] = _standing(found[number].text, found, number)
        else:
            home.add(number)
    made = []
    for last, taken in reversed(rows):
        _check_context(written, found[last], last)
        answers = [
            Answer(turn.begin, turn.spans, turn.end, number in taken, number in silent)
            for number in placed[last]
            for turn in (found[number],)
        ]
        made.append(_row(found[last].text, answers, tokenizer))
    kinds = [found[number].thinking for number in learned]
    hidden = any(n not in placed[last] for last, _ in rows for n in silent if n < last)
    return ChatRows(made, kinds.count("unwritten"), kinds.count("closed"), hidden)


def prompt_row(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tokenizer: Tokenizer,
    tools: Sequence[Any] | None = None,
    now: datetime.date | None = None,
) -> ChatRow:
    """A conversation to generate from, with the assistant's earlier turns where `rows_of` finds them in training.

    Raises InputError when the template refuses it."""
    written = Turns(messages, tools, tokenizer, now)
    text = written.prompt(len(messages)) if add_generation_prompt else written.whole()
    found: dict[int, Turn] = {}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            _try_turn(written, number, found)
    standing = [found[number] for number in _standing(text, found, len(messages))]
    answers = [Answer(turn.begin, turn.spans, turn.end) for turn in standing]
    return _row(text, answers, tokenizer)


def _try_turn(written: Turns, number: int, found: dict[int, Turn]) -> None:
    """A turn that is not to be learned may be one that cannot be."""
    try:
        found[number] = written.turn(number)
    except InputError:
        return


def _standing(text: str, found: Mapping[int, Turn], last: int) -> list[int]:
    """The turns, up to `last`, that stand in a text as they were generated, and not inside each other; rising."""
    standing: list[int] = []
    limit = len(text)
    for number in sorted((n for n in found if n <= last), reverse=True):
        turn = found[number]
        said = turn.said
        if len(said) <= limit and text.startswith(said):
            standing.insert(0, number)
            limit = turn.start
    return standing


def _check_context(written: Turns, turn: Turn, last: int) -> None:
    """Raises InputError when the row lacks what the system, the user or the tools say before the turn."""
    if missing := [name for name in names_of(written.tools) if name not in turn.text]:
        raise InputError(f"the chat template does not write the tool {missing[0]!r} that the row has; {written.mend}")
    for number, message in enumerate(written.messages[:last]):
        if message["role"] in ("assistant", "tool"):  # templates may write these as they like; they are not learned
            continue
        words = (message.get("content") or "").strip()
        if words not in turn.text:
            raise InputError(written.dropped(number, "content", words))


def _row(text: str, answers: Sequence[Answer], tokenizer: Tokenizer) -> ChatRow:
    places = {place for each in answers for place in (each.begin, each.end, *sum(each.spans, ()))}
    text, moved, numbered = tokenizer.unguard(text, sorted(places))
    to = dict(zip(sorted(places), moved, strict=True))
    shifted = [
        dataclasses.replace(
            each, begin=to[each.begin], end=to[each.end], spans=[(to[first], to[last]) for first, last in each.spans]
        )
        for each in answers
    ]
    return ChatRow(text, shifted, numbered)
