"""Which characters of a rendered conversation the assistant says: by the template's generation marks, or, where it has
none, by rendering the conversation turn by turn.

What a chat asks the model for is the text from the end of its prompt to the end of its turn. The prompt is the
conversation before the turn with the generation prompt, as `generate` renders it; if the whole rendering begins with
it, and with the conversation up to this turn, then the turn is exactly what lies between. If not, the template writes a
turn differently once others follow, and it cannot be masked exactly: an error.
"""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.tokenizer import Tokenizer

_SAID = ("reasoning_content", "content")  # texts of a turn that its rendering must have
_MEND = "use data.template=paper, or another template (chat_template.jinja in the model's folder)"


@dataclasses.dataclass(frozen=True)
class Spans:
    """A rendered conversation, and what the assistant says of it as [begin, end) in characters, rising. `marked`: by
    the template's own marks; otherwise each span is a turn, up to where the next begins. `numbered`: how the text names
    its control tokens (chat_guard)."""

    text: str
    spans: list[tuple[int, int]]
    marked: bool
    numbered: bool


def assistant_spans(chat: Chat, tokenizer: Tokenizer, now: datetime.date | None = None) -> Spans:
    """Renders a chat with the tokenizer's template and finds the assistant's turns.

    Args:
      chat: its last turn is the assistant's.
      now: the day for templates that write it.

    Raises:
      InputError: the tokenizer has no template, it refuses the conversation, drops or rewrites a turn, or its turns
        cannot be told apart.
    """
    messages = tokenizer.guard_chat(chat.messages)
    whole = tokenizer.render_chat(messages, False, chat.tools, now)
    spans = whole.marks
    if spans is None:
        spans = _by_prefixes(messages, whole.text, tokenizer, chat.tools, now)
    elif not spans:
        raise InputError(f"the chat template marks nothing of this conversation as the assistant's; {_MEND}")
    marked = whole.marks is not None
    _check_kept(messages, chat.tools, whole.text, spans, marked)
    return _unguarded(whole.text, spans, marked, tokenizer)


def prompt_spans(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tokenizer: Tokenizer) -> Spans:
    """A conversation to generate from, with the assistant's earlier turns where `assistant_spans` finds them in
    training; without any where it finds no way to tell them apart. Raises InputError when the template refuses it."""
    guarded = tokenizer.guard_chat(messages)
    whole = tokenizer.render_chat(guarded, add_generation_prompt)
    spans = whole.marks
    if spans is None:
        try:
            spans = _by_prefixes(guarded, whole.text, tokenizer)
        except InputError:  # training would refuse this conversation: there is nothing to agree with
            spans = []
    return _unguarded(whole.text, spans, whole.marks is not None, tokenizer)


def _unguarded(text: str, spans: Sequence[tuple[int, int]], marked: bool, tokenizer: Tokenizer) -> Spans:
    text, places, numbered = tokenizer.unguard(text, [place for span in spans for place in span])
    return Spans(text, list(zip(places[::2], places[1::2], strict=True)), marked, numbered)


def _by_prefixes(
    messages: Sequence[dict[str, Any]],
    whole: str,
    tokenizer: Tokenizer,
    tools: list[Any] | None = None,
    now: datetime.date | None = None,
) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.render_chat(messages[: number - 1], True, tools, now).text
        last = number == len(messages)
        upto = whole if last else tokenizer.render_chat(messages[:number], False, tools, now).text
        for part, name in ((prompt, "the prompt for"), (upto, "the conversation up to")):
            if not whole.startswith(part):
                raise InputError(
                    f"the chat template writes {name} turn {number} (assistant) differently "
                    f"{_difference(part, whole)}, so the turn cannot be masked exactly; {_MEND}"
                )
        if len(upto) <= len(prompt):
            raise InputError(f"the chat template writes nothing for turn {number} (assistant); {_MEND}")
        spans.append((len(prompt), len(upto)))
    if any(begin < end for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise InputError(f"the chat template joins turns of the assistant that follow each other; {_MEND}")
    return spans


def _difference(part: str, whole: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    alone, followed = part[at : at + 24], whole[at : at + 24]
    return f"when the conversation goes on ({alone!r} becomes {followed!r} after {at} characters)"


def _check_kept(
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    whole: str,
    spans: Sequence[tuple[int, int]],
    marked: bool,
) -> None:
    """Raises InputError when a turn's text is missing: templates may cut blanks around it, and nothing else."""
    said = [whole[begin:end] for begin, end in spans]
    learned, turns = "".join(said), iter(said)
    if missing := [name for name in _names(tools) if name not in whole]:
        raise InputError(f"the chat template does not write the tool {missing[0]!r} that the row has; {_MEND}")
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "tool":  # templates may write a result as they like; it is not learned
            continue
        text = whole if role != "assistant" else learned if marked else next(turns)
        wanted = [(name, message[name].strip()) for name in _SAID if name in message]
        wanted += [("tool_calls", name) for name in _names(message.get("tool_calls"))]
        for name, words in wanted:
            if words not in text:
                raise InputError(
                    f"the chat template drops or rewrites the {name} of turn {number} ({role}), {words[:40]!r}: "
                    f"the model would not see what the data says; {_MEND}"
                )
        if role == "assistant" and marked:
            content = message["content"].strip()
            learned = learned[learned.index(content) + len(content) :]


def _names(tools: Sequence[Any] | None) -> list[str]:
    """Names of the functions of tools, or of calls of them."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]
