"""Files of prompts: a text a line, or rows in the forms that prompts and benchmarks come in.

| a row with | is | whose form |
| --- | --- | --- |
| `messages` | a conversation [{role, content}] that ends with the user's turn | OpenAI's form |
| `turns` | a question, alone in a list | Vicuna's and MT-bench's question.jsonl |
| `question_id` and `text` | a question, or turns as "### Human: ... ### Assistant:" | the paper's questions |
| `prompt` | a text to go on from | |
| `instruction`, perhaps `input` | an instruction | Alpaca |

The first of these that a row has counts. `seed` (a number) is the row's own; the fields of KEPT go with the answer.
"""

import json
import re
from pathlib import Path
from typing import Any

from qlora_jax.data.fields import bad, kind, objects, text
from qlora_jax.data.prompts import GUANACO_LABELS
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Request, Turn, read_text
from qlora_jax.generate.sampling import check_seed
from qlora_jax.text.chat_template import REASONING

KEPT = ("question_id", "id", "message_id", "category", "lang")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LABEL = re.compile("(" + "|".join(re.escape(label) for label in GUANACO_LABELS.values()) + ")")
_SPEAKERS = {label: role for role, label in GUANACO_LABELS.items()}


def read_requests(path: str) -> list[Request]:
    """The prompts of a file: .txt, one a line (blank lines are skipped), or a data file of rows as above.

    Raises:
      InputError: the file is missing, has no prompt, or rows are in none of the forms (the first is named).
    """
    file = Path(path).expanduser()
    if file.suffix.lower() == ".txt":
        lines = [line for line in read_text(file).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path} has no prompt; expected one a line")
        return [Request(line, where=f"the prompt {line[:40]!r}") for line in lines]
    requests: list[Request] = []
    problems = Problems()
    for row in read_rows(path):
        try:
            requests.append(request_of(row))
        except InputError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return requests


def request_of(row: Row) -> Request:
    """The prompt of a row. Raises InputError for a row in none of the forms."""
    fields = row.fields
    rest: dict[str, Any] = {
        "kept": _kept(row),
        "seed": _seed(row),
        "where": row.where,
    }
    if "messages" in fields:
        return _conversation(row, "messages", messages(row), rest)
    if "turns" in fields:
        return Request(_only_turn(row), form="question", **rest)
    if "question_id" in fields and "text" in fields:
        return _question(row, rest)
    if "prompt" in fields:
        return Request(text(row, "prompt"), **rest)
    if "instruction" in fields:
        return Request(text(row, "instruction"), text(row, "input", optional=True), "instruction", **rest)
    bad(row, "prompt", 'no field "prompt", "instruction", "messages" or "turns", nor "question_id" with "text"')


def _conversation(row: Row, field: str, turns: list[Turn], rest: dict[str, Any]) -> Request:
    if not turns or turns[-1]["role"] != "user":
        bad(row, field, f"expected a conversation that ends with the user's turn in the field {field}")
    if not turns[-1]["content"].strip():
        bad(row, field, f"the last turn in the field {field} is empty")
    return Request(turns[-1]["content"], form="question", before=tuple(turns[:-1]), **rest)


def messages(row: Row) -> list[Turn]:
    """Turns of a row {"messages": [{role, content, reasoning_content?}]}.

    Raises InputError for other roles and content that is no text."""
    turns: list[Turn] = []
    for message in objects(row, "messages"):
        role = text(message, "role")
        if role not in _ROLES:
            bad(message, "role", f"expected {', '.join(_ROLES)} in the field role, found {role!r}")
        if role in ("system", "developer") and turns:
            bad(message, "role", "a system turn that is not the first")
        turn = {"role": _ROLES[role], "content": text(message, "content", blank=True)}
        for name in REASONING:
            if message.fields.get(name) is not None:
                turn[name] = text(message, name, blank=True)
        turns.append(turn)
    return turns


def _only_turn(row: Row) -> str:
    turns = row.fields["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        bad(row, "turns", f"expected a list of questions in the field turns, found {kind(turns)}")
    if len(turns) != 1 or not turns[0].strip():
        bad(row, "turns", f"expected one question in the field turns, found {len(turns)} (a conversation: messages)")
    return turns[0]


def _question(row: Row, rest: dict[str, Any]) -> Request:
    question = text(row, "text")
    before, *parts = _LABEL.split(question)
    if not parts or before.strip() or parts[-2:] != [GUANACO_LABELS["assistant"], parts[-1]] or parts[-1].strip():
        return Request(question, form="question", **rest)
    turns: list[Turn] = [
        {"role": _SPEAKERS[label], "content": content.strip()}
        for label, content in zip(parts[:-2:2], parts[1:-2:2], strict=True)
    ]
    return _conversation(row, "text", turns, rest)


def _kept(row: Row) -> dict[str, Any]:
    kept = {name: row.fields[name] for name in KEPT if row.fields.get(name) is not None}
    for name, value in kept.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError):
            bad(row, name, f"the field {name} holds what JSON has no form for: {value!r}")
    return kept


def _seed(row: Row) -> int | None:
    seed = row.fields.get("seed")
    if isinstance(seed, str) and re.fullmatch(r"[0-9]{1,10}", seed.strip()):
        seed = int(seed)  # of a CSV file
    if seed is None or seed == "":
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        bad(row, "seed", f"expected a whole number in the field seed, found {kind(seed)}")
    check_seed(seed, f"{row.where}: the field seed")
    return seed
