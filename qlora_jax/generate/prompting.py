"""From what a user asks to the ids a model is given, and from the ids it gives back to the text a user sees.

| template | the model is given | the text shown |
| --- | --- | --- |
| plain | the text, after BOS where the tokenizer puts it there | the continuation, as it is |
| alpaca | BOS and Alpaca's prompt around the last message | the answer, blanks at both ends cut |
| guanaco | BOS and Guanaco's conversation | the answer up to where the model would speak for the user |
| chat | the tokenizer's own template | the answer, with the signs around its thinking |

alpaca and guanaco begin with BOS as the paper's training does, whatever the tokenizer does by itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.prompts import GUANACO_LABELS, alpaca_prompt, guanaco_prompt, user_message
from qlora_jax.errors import InputError
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer

TEMPLATES = ("plain", "alpaca", "guanaco", "chat")
MANY_TURNS = ("guanaco", "chat")  # templates that show the model what was said before
# trained on whole conversations, a Guanaco goes on to write the user's next turn
_STOPS = {"guanaco": (GUANACO_LABELS["user"],)}


Turn = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    text: the message, or the last one of a conversation.
    input: Alpaca's further context, or "".
    form: how it came: "prompt" (a text to go on from), "instruction" (Alpaca's form) or "question" (to an assistant).
    before: earlier turns of the conversation, perhaps begun with a system turn.
    seed: of this prompt's draws alone; None draws by the seed of all.
    kept: fields that go with the answer (`KEPT`), in their order.
    where: the place in a file, as errors name it.
    """

    text: str
    input: str = ""
    form: str = "prompt"
    before: tuple[Turn, ...] = ()
    seed: int | None = None
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="the message", compare=False)

    @property
    def message(self) -> str:
        """Text and input as one message."""
        return user_message(self.text, self.input)


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


def system_turn(system: str | None) -> list[Turn]:
    """The turn that stands before a conversation; none for None."""
    return [] if system is None else [{"role": "system", "content": system}]


def prompt_ids(
    tokenizer: Tokenizer, template: str, request: Request, before: Sequence[Mapping[str, str]] = ()
) -> list[int]:
    """Ids of a prompt, BOS included where there is one; an empty plain prompt is BOS alone. A T5's ends with EOS.

    Args:
      template: one of TEMPLATES.
      before: earlier turns {"role", "content"}; plain and alpaca leave them out.
    Raises:
      InputError: an unknown template, the tokenizer has none of its own for "chat", or a text is not valid Unicode.
    """
    turns = [*before, {"role": "user", "content": request.message}]
    for turn in turns:
        check_unicode(turn["content"])
    if template == "plain" and tokenizer.ends_source:
        return tokenizer.encode_source(request.message)
    if template == "plain":
        return tokenizer.encode_from_start(request.message) or tokenizer.encode("", bos=True)
    if template == "alpaca":
        return tokenizer.encode_source(alpaca_prompt(request.text, request.input))
    if template == "guanaco":
        return tokenizer.encode_source(guanaco_prompt(turns))
    if template == "chat":
        return encode_chat(tokenizer, turns)
    raise InputError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")


def bos_note(tokenizer: Tokenizer, template: str) -> str | None:
    """What to tell the user of a prompt that begins otherwise than the tokenizer begins a text; None if it does not."""
    if template not in ("alpaca", "guanaco") or tokenizer.bos_id is None or tokenizer.prefix:
        return None
    bos = tokenizer.controls.get(tokenizer.bos_id, "BOS")
    return f"template {template}: prompts begin with {bos!r}, as the paper's do; the tokenizer itself adds nothing"


def check_unicode(text: str) -> None:
    """Raises InputError for what a terminal or a flag gave as bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = text[max(error.start - 10, 0) : error.start]
        raise InputError(f"a text is not UTF-8 after {place!r}; convert it") from error


class Answer:
    """The text of an answer as its ids come: pieces of `push` and `flush` together are what the user sees.

    Args:
      stops: texts that end the answer, beside the template's own. The one that is complete first counts; neither it
        nor what follows is shown, and what may become one is held back.
    Attributes:
      stopped: a stop came, the user's or the template's (the model began to speak for the user).
    """

    def __init__(self, tokenizer: Tokenizer, template: str, prompt: Sequence[int], stops: Sequence[str] = ()):
        before = () if tokenizer.ends_source else prompt  # which is text of its own where an encoder reads it
        self._stream = tokenizer.stream(before, tokenizer.thinking if template == "chat" else {})
        self._stops = (*_STOPS.get(template, ()), *stops)
        self._trim = template != "plain"
        self._begun = False
        self._held = ""  # blanks that may be the last, or the beginning of a stop
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
        begins = _first_stop(text, self._stops)
        if begins is not None:
            self.stopped = True
            self._held = ""
            before = text[:begins]
            return self._begin(before.rstrip() if self._trim else before)
        sure = text[: len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)]
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


def answer_text(
    tokenizer: Tokenizer, template: str, prompt: Sequence[int], tokens: Sequence[int], stops: Sequence[str] = ()
) -> str:
    """The whole answer at once."""
    answer = Answer(tokenizer, template, prompt, stops)
    return answer.push(tokens) + answer.flush()


def check_stops(stops: Sequence[str]) -> None:
    """Raises InputError for a stop that would end every answer at once."""
    for stop in stops:
        check_unicode(stop)
    if "" in stops:
        raise InputError("a stop is empty; expected text (in bash, --stop=$'\\n' is a line's end)")


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop begins that ends first, the longer one of two that end together; None without one.

    The first that ends, not the first that begins: so the pieces in which a text comes do not matter.
    """
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end may be the beginning of the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
