"""From a row of a data set to (source, target): the text that is given and the text that is learned.

A format is one function of a row, entered in FORMATS by its name in the config. It raises InputError naming file,
line and field when the row is not of the format, and returns None for a row that rightly has nothing to learn.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from qlora_jax.data.prompts import GUANACO_LABELS, alpaca_prompt, guanaco_conversation
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_GUANACO_TURN = re.compile("(" + "|".join(re.escape(label) for label in GUANACO_LABELS.values()) + ")")


class Pair(NamedTuple):
    """What a row becomes. `target` is never blank."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A pair and the place of its row."""

    source: str
    target: str
    where: str


def alpaca(row: Row) -> Pair:
    """{instruction, input?, output}: Alpaca's prompt, and the output."""
    instruction = _text(row, "instruction")
    given = _text(row, "input", optional=True)
    return Pair(alpaca_prompt(instruction, given), _text(row, "output"))


def input_output(row: Row) -> Pair:
    """{input, output}: as they are. The input may be empty."""
    return Pair(_text(row, "input", blank=True), _text(row, "output"))


def oasst1(row: Row) -> Pair | None:
    """A conversation tree {prompt: {text, role, rank?, replies}}, or its flattened form {text: "### Human: ..."}.

    Of a tree the best-ranked path is taken: at every level the reply of the lowest rank, or the first of the file
    where none has a rank. The source is empty and the whole conversation is the target, to its last assistant turn;
    None when there is no assistant turn.
    """
    if "prompt" in row.fields:
        turns = _best_path(row)
    elif "text" in row.fields:
        turns = _flattened_turns(row)
    else:
        hint = ""
        if "parent_id" in row.fields or "message_id" in row.fields:
            hint = "; these are single messages: use the file of trees, for OpenAssistant/oasst1 its *.trees.jsonl.gz"
        _bad(row, "prompt", f'no field "prompt" (a tree) or "text" (a flattened conversation){hint}')
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return Pair("", guanaco_conversation(turns)) if turns else None


FORMATS: dict[str, Callable[[Row], Pair | None]] = {
    "alpaca": alpaca,
    "input-output": input_output,
    "oasst1": oasst1,
}


def format_rows(rows: Sequence[Row], format: str) -> tuple[list[Text], int]:
    """Every row as text, and the number of rows left out because they have nothing to learn.

    Raises:
      InputError: an unknown format, or the first bad row (file, line, reason) with the count of the others.
    """
    if format not in FORMATS:
        raise InputError(f"unknown data.format {format!r}; known formats: {', '.join(FORMATS)}")
    texts: list[Text] = []
    left_out = 0
    problems = Problems()
    for row in rows:
        try:
            pair = FORMATS[format](row)
        except InputError as error:
            problems.add(str(error))
            continue
        if pair is None:
            left_out += 1
        else:
            texts.append(Text(pair.source, pair.target, row.where))
    problems.raise_if_any()
    return texts, left_out


def _best_path(row: Row) -> list[dict[str, str]]:
    turns = []
    node: Any = row.fields["prompt"]
    while node is not None:
        if not isinstance(node, dict):
            _bad(row, "prompt", f"expected messages as objects in the tree, found {_kind(node)}")
        message = dataclasses.replace(row, fields=node)
        role = _text(message, "role")
        if role not in _OASST_ROLES:
            _bad(message, "role", f"expected prompter or assistant in the field role, found {role!r}")
        turns.append({"role": _OASST_ROLES[role], "content": _text(message, "text", blank=True)})
        node = _best_reply(message)
    return turns


def _best_reply(message: Row) -> Any:
    replies = message.fields.get("replies") or []
    if not isinstance(replies, list):
        _bad(message, "replies", f"expected a list in the field replies, found {_kind(replies)}")
    kept = [reply for reply in replies if not (isinstance(reply, dict) and reply.get("deleted"))]

    def rank(reply: Any) -> float:
        value = reply.get("rank") if isinstance(reply, dict) else None
        if value is None:
            return float("inf")
        if isinstance(value, bool) or not isinstance(value, int | float):
            _bad(message, "rank", f"expected a number in the field rank, found {_kind(value)}")
        return float(value)

    return min(kept, key=rank, default=None)  # min keeps the first of equals


def _flattened_turns(row: Row) -> list[dict[str, str]]:
    before, *parts = _GUANACO_TURN.split(_text(row, "text"))
    if not parts or before.strip():
        _bad(row, "text", f'expected text that begins with "### Human:", found {before.strip()[:40]!r}')
    roles = {label: role for role, label in GUANACO_LABELS.items()}
    return [
        {"role": roles[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _text(row: Row, field: str, optional: bool = False, blank: bool = False) -> str:
    """The text of a field. `optional`: missing, null and blank give ""; `blank`: it must be there but may be blank."""
    value = row.fields.get(field)
    if optional and value is None:
        return ""
    if field not in row.fields:
        _bad(row, field, f'no field "{field}"')
    if not isinstance(value, str):
        _bad(row, field, f"expected text in the field {field}, found {_kind(value)}")
    if not value.strip() and not optional and not blank:
        _bad(row, field, f"the field {field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        _bad(row, field, f"half a surrogate pair (U+{code:04X}) in the field {field}: not valid Unicode")
    return value


def _bad(row: Row, field: str, reason: str) -> NoReturn:
    found = ", ".join(str(name) for name in list(row.fields)[:12]) or "none"
    missing = field not in row.fields
    raise InputError(f"{row.where}: {reason}" + (f"; fields found: {found}" if missing else ""))


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
