"""From what a user asks to the ids a model is given, and from the ids it gives back to the text a user sees.

| template | the model is given | the text shown |
| --- | --- | --- |
| plain | BOS and the text | the continuation, as it is |
| alpaca | Alpaca's prompt around the last message | the answer, blanks at both ends cut |
| guanaco | Guanaco's conversation | the answer up to where the model would speak for the user |
| chat | the tokenizer's own template | the answer |
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.data.prompts import GUANACO_LABELS, alpaca_prompt, guanaco_prompt, user_message
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import InputError

TEMPLATES = ("plain", "alpaca", "guanaco", "chat")
MANY_TURNS = ("guanaco", "chat")  # templates that show the model what was said before
# trained on whole conversations, a Guanaco goes on to write the user's next turn
_STOPS = {"guanaco": GUANACO_LABELS["user"]}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked. `input`: Alpaca's further context, or "". `instruction`: whether it came in Alpaca's form."""

    text: str
    input: str = ""
    instruction: bool = False

    @property
    def message(self) -> str:
        """Text and input as one message."""
        return user_message(self.text, self.input)


def read_requests(path: str) -> list[Request]:
    """The prompts of a file: .txt, one a line (blank lines are skipped), or a data file with a field "prompt" or
    "instruction" (and "input").

    Raises:
      InputError: the file is missing, has no prompt, or a row has neither field.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() == ".txt":
        lines = [line for line in read_text(file).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{path} has no prompt; expected one a line")
        return [Request(line) for line in lines]
    return [_request(row) for row in read_rows(path)]


def read_text(file: Path) -> str:
    """A UTF-8 text file, its line ends as they are. Raises InputError when it is missing or not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file"
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error


def _request(row: Row) -> Request:
    name = next((name for name in ("prompt", "instruction") if name in row.fields), None)
    if name is None:
        found = ", ".join(str(field) for field in list(row.fields)[:12]) or "none"
        raise InputError(f'{row.where}: no field "prompt" or "instruction"; fields found: {found}')
    text, given = row.fields[name], row.fields.get("input") or ""
    if name == "prompt":
        given = ""
    for field, value in ((name, text), ("input", given)):
        if not isinstance(value, str):
            raise InputError(f"{row.where}: the field {field} holds {value!r}; expected text")
    if not text.strip():
        raise InputError(f"{row.where}: the field {name} is empty")
    return Request(text, given, instruction=name == "instruction")


def prompt_ids(
    tokenizer: Tokenizer, template: str, request: Request, before: Sequence[Mapping[str, str]] = ()
) -> list[int]:
    """Ids of a prompt, BOS included.

    Args:
      template: one of TEMPLATES.
      before: earlier turns {"role", "content"}; plain and alpaca leave them out.
    Raises:
      InputError: an unknown template, or the tokenizer has none of its own for "chat".
    """
    turns = [*before, {"role": "user", "content": request.message}]
    if template == "plain":
        return tokenizer.encode(request.message, bos=True)
    if template == "alpaca":
        return tokenizer.encode(alpaca_prompt(request.text, request.input), bos=True)
    if template == "guanaco":
        return tokenizer.encode(guanaco_prompt(turns), bos=True)
    if template == "chat":
        return tokenizer.encode_chat(turns)
    raise InputError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")


class Answer:
    """The text of an answer as its ids come: pieces of `push` and `flush` together are what the user sees.

    Attributes:
      stopped: the model began to speak for the user; the rest is not shown.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, prompt: Sequence[int]):
        self._stream = tokenizer.stream(prompt)
        self._stop = _STOPS.get(template)
        self._trim = template != "plain"
        self._begun = False
        self._held = ""  # blanks that may be the last, or the beginning of the stop
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Takes new ids; returns the text that is sure by now, perhaps ""."""
        return self._sure(self._stream.push(ids))

    def flush(self) -> str:
        """What is held back at the end."""
        text = self._sure(self._stream.flush())
        rest = self._held.rstrip() if self._trim else self._held
        self._held = ""
        return text + ("" if self.stopped else rest)

    def _sure(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if self._stop is not None and self._stop in text:
            self.stopped = True
            self._held = ""
            return self._begin(text[: text.index(self._stop)].rstrip())
        sure = text
        if self._stop is not None:
            stop = self._stop
            overlap = next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
            sure = text[: len(text) - overlap]
        if self._trim:
            sure = sure.rstrip()
        self._held = text[len(sure) :]
        return self._begin(sure)

    def _begin(self, text: str) -> str:
        if not self._trim or self._begun:
            return text
        text = text.lstrip()
        self._begun = bool(text)
        return text


def answer_text(tokenizer: Tokenizer, template: str, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The whole answer at once."""
    answer = Answer(tokenizer, template, prompt)
    return answer.push(tokens) + answer.flush()
