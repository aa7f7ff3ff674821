"""A turn of the assistant: the prompt that it answers, and what of the text it says.

What a chat asks the model for is the text from the end of its prompt to the end of its turn. The prompt is what the
template writes for the conversation before the turn, with the generation prompt, as `generate` renders it. The answer
is what the template writes for the turn while it is the last, and it has to go on exactly from that prompt.

Some templates open the thinking in the generation prompt and do not write it in front of the answer. The answer then
goes on with the thinking that the data has; with none, it closes the thinking at once. The form is the template's own
where it writes reasoning at all, else that of the prompt: `<think>` and a line break ask for a line break, `</think>`
and a blank line.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.chat_template import REASONING, Rendered
from qlora_jax.text.tokenizer import Tokenizer

_OTHER = "another template (chat_template.jinja in the model's folder)"
_PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"))  # around reasoning in a text
_PROBE = "Zq7pR"  # stands for reasoning, to see how a template writes it; in no template, in hardly any data


@dataclasses.dataclass(frozen=True)
class Turn:
    """Of the assistant; guarded (chat_guard), in characters of `text`.

    text: the conversation with the turn as the last.
    begin: where the prompt ends and the answer begins. spans: what is said, [begin, end), rising.
    end: where the token ends that ends the turn. marked: `spans` are the template's own marks.
    thinking: "" as the data has it, "unwritten" (there is some, and the template does not write it), "closed" (there is
      none, and the prompt opens it).
    """

    text: str
    begin: int
    spans: list[tuple[int, int]]
    end: int
    marked: bool
    thinking: str = ""

    @property
    def start(self) -> int:
        """Where the turn's own text begins: templates may mark what stands before the answer, too."""
        return min(self.begin, self.spans[0][0])

    @property
    def said(self) -> str:
        """The text up to the end of what is said: a row that shows the turn as it was generated begins with it."""
        return self.text[: max(self.end, self.spans[-1][1])]


class Turns:
    """The turns of a conversation under a tokenizer's template.

    Args:
      messages, tools: of a Chat.
      now: the day for templates that write it.
    Raises:
      InputError: a message has a noncharacter.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        tokenizer: Tokenizer,
        now: datetime.date | None = None,
    ) -> None:
        self._tokenizer, self._now = tokenizer, now
        self.messages, self.tools = tokenizer.guard_chat([_with_objects(each) for each in messages], tools)
        self._as_text: list[dict[str, Any]] | None = None
        if any(each.get("tool_calls") for each in messages):
            self._as_text = tokenizer.guard_chat([_with_texts(each) for each in messages])[0]

    def prompt(self, number: int) -> str:
        """What the model is asked with for the message `number`, counted from 0. Raises InputError as `render_chat`."""
        return self._render(self._messages[:number], True).text

    def opening(self, number: int) -> str:
        """The end of the prompt for the message `number` that opens its thinking, "" where it does not."""
        prompt = self.prompt(number)
        return next((prompt[prompt.rindex(first) :] for first, _ in _PAIRS if prompt.rstrip().endswith(first)), "")

    def whole(self) -> str:
        """The conversation as it is. Raises InputError as `render_chat`."""
        return self._render(self._messages, False).text

    def turn(self, number: int) -> Turn:
        """The assistant's message `number`.

        Raises:
          InputError: the template refuses the conversation, does not write the answer after its prompt, drops or
            rewrites it, or ends it with no control token.
        """
        prompt, whole = self.prompt(number), self._render(self._messages[: number + 1], False)
        text, marks, thinking = whole.text, whole.marks, ""
        begin = len(prompt)
        if not text.startswith(prompt):
            text, thinking = self._continued(number, prompt, text)
            marks = None
        if len(text) <= begin:
            raise InputError(f"the chat template writes nothing for turn {number + 1} (assistant); {self.mend}")
        spans = [(begin, len(text))] if marks is None else [span for span in marks if span[1] > begin]
        if not spans:
            raise InputError(f"the chat template marks nothing of turn {number + 1} as the assistant's; {self.mend}")
        if self._drops_thinking(number, "".join(text[first:last] for first, last in spans)):
            thinking = "unwritten"
        return self._ended(number, Turn(text, begin, spans, 0, marks is not None, thinking))

    @property
    def mend(self) -> str:
        """What to do about a chat that cannot be learned exactly: the paper's form has no place for tools."""
        tools = self.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in self.messages)
        return f"use {_OTHER}, or take the chats with tools out" if tools else f"use data.template=paper, or {_OTHER}"

    @functools.cached_property
    def _messages(self) -> list[dict[str, Any]]:
        """With the arguments of calls as objects, which most templates want; as JSON text where it fails on objects, or
        writes them as Python does."""
        if self._as_text is None:
            return self.messages
        python = [str(found) for each in self.messages for found in _arguments(each) if found]
        try:
            whole = self._render(self.messages, False).text
            if not any(each in whole for each in python):
                return self.messages
        except InputError:
            try:
                self._render(self._as_text, False)
            except InputError:
                return self.messages
        return self._as_text

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Rendered:
        return self._tokenizer.render_chat(messages, add_generation_prompt, self.tools, self._now)

    def _continued(self, number: int, prompt: str, text: str) -> tuple[str, str]:
        """The turn after a prompt that its rendering does not begin with, and what is to be said of its thinking."""
        begin = self._begin(number, prompt, text)
        if begin is not None:
            return prompt + text[begin:], ""
        message, opening = self._messages[number], self.opening(number)
        thought, answer = _parted(message)
        bare = {name: value for name, value in message.items() if name not in REASONING} | {"content": answer}
        if not opening and thought:  # a prompt that closes the thinking leaves no place for it
            written = self._render([*self._messages[:number], bare], False).text
            if written.startswith(prompt):
                return written, "unwritten"
        if not opening:
            raise InputError(
                f"the chat template writes the prompt for turn {number + 1} (assistant) differently when the answer "
                f"follows ({self._difference(prompt, text)}): the model would be asked with another text than it is "
                f"trained on; {self.mend}"
            )
        kind = "" if thought else "closed"
        for reasoning in dict.fromkeys((thought or _PROBE, _PROBE)):
            written = self._render([*self._messages[:number], bare | {"reasoning_content": reasoning}], False).text
            if written.startswith(prompt + reasoning):
                return prompt + thought + written[len(prompt) + len(reasoning) :], kind
        # the template never writes reasoning
        first, last = next(pair for pair in _PAIRS if opening.startswith(pair[0]))
        before, blank = prompt.removesuffix(opening), opening.removeprefix(first)
        if not text.startswith(before) or text[len(before) :].lstrip().startswith(first):
            raise InputError(
                f"the chat template's prompt for turn {number + 1} (assistant) opens the thinking, and what it writes "
                f"does not go on from there ({self._difference(prompt, text)}); {self.mend}"
            )
        said, content = text[len(before) :], message.get("content") or ""
        own = content[: content.rfind(last) + len(last)] if last in content else ""
        if own.startswith(opening) and said.startswith(content[len(own) :]):
            return before + own + said, ""  # word for word as the data has it
        gap = "\n\n" if "\n" in blank else blank
        said = said.lstrip("\n") if own else said
        return f"{prompt}{thought}{blank}{last}{gap}{said}", kind

    def _begin(self, number: int, prompt: str, text: str) -> int | None:
        """Where the answer begins in a text that has its prompt's last words, but something else before them: an answer
        may change how earlier turns are written. None where the text has not these words before the answer."""
        before = self._render(self._messages[:number], False).text
        asking = prompt.removeprefix(before) if prompt.startswith(before) else ""
        if not any(token in asking for token in self._tokenizer.ends):
            return None
        message = self._messages[number]
        other = {name: _PROBE for name in ("content", *REASONING) if message.get(name)} or {"content": _PROBE}
        try:
            another = self._render([*self._messages[:number], message | other], False).text
        except InputError:
            return None
        same = next((n for n, (a, b) in enumerate(zip(text, another, strict=False)) if a != b), len(text))
        found = text.rfind(asking, 0, same)
        if found < 0:
            return None
        begin = found + len(asking)
        earlier = (self._messages[number - 1].get("content") or "").strip() if number else ""
        # that it stands there, too, says that the words found are those of an earlier turn
        return None if len(earlier) > 2 and earlier in text[begin:same] else begin

    def _difference(self, part: str, whole: str) -> str:
        part, whole = self._tokenizer.shown(part), self._tokenizer.shown(whole)
        at = next((n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
        return f"{part[at : at + 24]!r} becomes {whole[at : at + 24]!r} after {at} characters"

    def _drops_thinking(self, number: int, said: str) -> bool:
        """Whether the turn's reasoning is not in what is said.

        Raises:
          InputError: anything else of the turn is not: templates may cut blanks around it.
        """
        message = self._messages[number]
        thought, answer = _parted(message)
        content = (message.get("content") or "").strip()
        wanted = [("content", content if content in said else answer.strip())]
        wanted += [("tool_calls", name) for name in names_of(message.get("tool_calls"))]
        for name, words in wanted:
            if words not in said:
                raise InputError(self.dropped(number, name, words))
        return bool(thought.strip()) and thought.strip() not in said

    def dropped(self, number: int, name: str, words: str) -> str:
        """The reason to refuse a chat whose message `number` lacks words."""
        role, words = self._messages[number]["role"], self._tokenizer.shown(words)[:40]
        return (
            f"the chat template drops or rewrites the {name} of turn {number + 1} ({role}), {words!r}: the model would "
            f"not see what the data says; {self.mend}"
        )

    def _ended(self, number: int, turn: Turn) -> Turn:
        """The turn up to its end: the token that stops the generation. If the turn has none of its own, that is the
        token that begins the next turn."""
        first, last = turn.spans[-1]
        end, stops = self._last_token(turn.text, max(first, turn.begin), last)
        if not stops:
            following = self._next_token(number, turn.text[:last])
            if following:
                text = turn.text[:last] + following
                spans = [*turn.spans[:-1], (first, len(text))]
                return dataclasses.replace(turn, text=text, spans=spans, end=len(text))
        if not end:
            shown = self._tokenizer.shown(turn.text[first:last])[-24:]
            raise InputError(
                f"the chat template {'marks' if turn.marked else 'writes'} no control token at the end of the "
                f"assistant's turn (it ends {shown!r}), so the model would not learn to stop; put eos_token there in "
                f"the template{', inside its generation block' if turn.marked else ''}{self._tokenizer.nameless_end}, "
                f"or {self.mend}"
            )
        return dataclasses.replace(turn, spans=turn.spans if turn.marked else [(first, end)], end=end)

    def _last_token(self, text: str, first: int, last: int) -> tuple[int, bool]:
        """Where the control token ends, in [first, last), that ends the text, and whether generation stops there: of
        those with nothing but blanks after them, the first that stops it, else the last; 0 without any."""
        ends, found, at = self._tokenizer.ends, [], last
        while True:
            at = first + len(text[first:at].rstrip())
            token = next((token for token in ends if text.endswith(token, first, at)), None)
            if token is None:
                break
            found.append((at, token in self._tokenizer.stops))
            at -= len(token)
        stopping = [each for each in found if each[1]]
        return stopping[-1] if stopping else found[0] if found else (0, False)

    def _next_token(self, number: int, text: str) -> str | None:
        """What the template writes after the turn's text, up to the token that begins the next turn, if generation
        stops there; None if it does not."""
        user = {"role": "user", "content": "a"}
        short = [user, {"role": "assistant", "content": "b"}]  # whose earlier turn is written as the last one is
        tries = [(self._messages[: number + 2], text)] if number + 1 < len(self._messages) else []
        tries += [([*self._messages[: number + 1], user], text), ([*short, user], "")]
        for longer, before in tries:
            try:
                before = before or self._render(short, False).text
                whole = self._render(longer, False).text
            except InputError:
                continue
            rest = whole[len(before) :] if whole.startswith(before) else ""
            blanks = rest[: len(rest) - len(rest.lstrip())]
            token = next((token for token in self._tokenizer.ends if rest.lstrip().startswith(token)), None)
            if token in self._tokenizer.stops:
                return blanks + str(token)
        return None


def names_of(tools: Sequence[Any] | None) -> list[str]:
    """Names of the functions of tools, or of calls of them."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _parted(message: Mapping[str, Any]) -> tuple[str, str]:
    """(reasoning, answer) of a message, the reasoning from a field of its own or from the head of its content, begun
    there or in the prompt; "" where there is none."""
    content = message.get("content") or ""
    own = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if own is not None:
        return own.strip("\n"), content
    for first, last in _PAIRS:
        thought, found, answer = content.partition(last)
        head, begun, rest = thought.partition(first)
        if found and last not in answer and not (begun and head.strip()):
            return (rest if begun else thought).strip("\n"), answer.lstrip("\n")
    return "", content


def _arguments(message: Mapping[str, Any]) -> list[Any]:
    """The arguments of a message's calls that are objects."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    found = [call.get("arguments") for call in calls if isinstance(call, dict)]
    return [each for each in found if isinstance(each, dict)]


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return _with_arguments(message, lambda value: _object(value) if isinstance(value, str) else value)


def _with_texts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return _with_arguments(message, lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _with_arguments(message: Mapping[str, Any], change: Any) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function") if isinstance(call, dict) else None
        if isinstance(inner, dict) and "arguments" in inner:
            call = call | {"function": inner | {"arguments": change(inner["arguments"])}}
        elif isinstance(call, dict) and "arguments" in call:
            call = call | {"arguments": change(call["arguments"])}
        calls.append(call)
    return {**message, "tool_calls": calls}
