"""From a rendered chat to tokens of which exactly the assistant's are learned.

A turn's first token is the one that `generate` would ask for: the tokens before it are those of the prompt alone.
Where the tokenizer joins the prompt's last letters with the answer's first in one token, both sides are encoded apart,
as they are when the model answers. A turn ends with the control token that stops the model: it is the last that is
learned, and blanks that the template writes after it are not.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from qlora_jax.errors import InputError
from qlora_jax.text.chat_spans import Spans
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.text.tokenizer_backends import Encoding

_KEPT = 64  # characters of a prompt's end that is kept with its ids: most are the same few words in every chat


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """ids of a whole chat; what is learned of them as [begin, end), rising; `ends`: the places after a turn's last
    token, where the chat may be cut."""

    ids: list[int]
    learned: list[tuple[int, int]]
    ends: list[int]


def encode_spans(rendered: Sequence[Spans], tokenizer: Tokenizer) -> list[ChatTokens | InputError]:
    """Tokens of rendered chats, in their order; or, for a chat that cannot be masked exactly, the reason: a turn has no
    token that ends it, or the tokenizer cannot keep the prompt and the answer apart."""
    encodings = tokenizer.encode_unguarded([(chat.text, chat.numbered) for chat in rendered])
    prompts: dict[tuple[str, bool], list[int]] = {}
    found: list[ChatTokens | InputError] = []
    for chat, encoding in zip(rendered, encodings, strict=True):
        try:
            found.append(_learn(_Tokens(chat, encoding, tokenizer, prompts)))
        except InputError as error:
            found.append(error)
    return found


def encode_prompt(chat: Spans, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation to generate from, its earlier turns as `encode_spans` has them (as a whole where it refuses
    them)."""
    encoding = tokenizer.encode_unguarded([(chat.text, chat.numbered)])[0]
    tokens = _Tokens(chat, encoding, tokenizer, {})
    try:
        for begin, end in chat.spans:
            tokens.cut(begin, end)
    except InputError:
        return encoding.ids
    return tokens.ids


def _learn(tokens: "_Tokens") -> ChatTokens:
    learned, ends = [], []
    spans, marked = tokens.chat.spans, tokens.chat.marked
    for number, (begin, end) in enumerate(spans, 1):
        first, stop = tokens.cut(begin, end)
        after_end = tokens.after_end(first, stop, end)
        if after_end is not None:
            ends.append(after_end)
        elif not marked or number == len(spans):  # marks may be several in a turn
            shown = tokens.chat.text[begin:end][-24:]
            raise InputError(
                f"the chat template {'marks' if marked else 'writes'} no control token at the end of the assistant's "
                f"turn (it ends {shown!r}), so the model would not learn to stop; put eos_token there in the template"
                f"{', inside its generation block' if marked else ''}, or use data.template=paper"
            )
        learned.append((first, stop if marked else ends[-1]))
    return ChatTokens(tokens.ids, learned, ends)


class _Tokens:
    """The tokens of a chat, cut at places in its text."""

    def __init__(
        self, chat: Spans, encoding: Encoding, tokenizer: Tokenizer, prompts: dict[tuple[str, bool], list[int]]
    ) -> None:
        self.chat = chat
        self.ids, self.begins, self.ends = map(list, encoding)
        self._tokenizer, self._prompts = tokenizer, prompts
        self._controls = tokenizer.controls.keys() | set(tokenizer.eos_ids)
        self._cut = 0  # tokens before this one were encoded apart

    def after_end(self, first: int, stop: int, place: int) -> int | None:
        """The index after the last control token of [first, stop); None when text follows it, up to `place`."""
        for last in range(stop - 1, first - 1, -1):
            if self.ids[last] in self._controls:
                return None if self.chat.text[self.ends[last] : place].strip() else last + 1
        return None

    def cut(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens [first, stop) of a span. Raises InputError as `index` does."""
        first = self.index(begin)
        # Without marks it is the end token that ends what is learned, not the place where the turn's text ends.
        return first, self.index(end) if self.chat.marked else bisect.bisect_left(self.begins, end)

    def index(self, place: int) -> int:
        """The first token of the text from `place` on; what stands before it are the tokens of that text alone.

        Raises:
          InputError: encoded apart, the two sides are not the text.
        """
        first = bisect.bisect_left(self.begins, place)
        # A control token parts the text: what stands before the last one has no say here.
        section = next((n for n in range(first - 1, self._cut - 1, -1) if self.ids[n] in self._controls), self._cut)
        start = self.begins[section] if 0 < section < len(self.begins) else 0
        prompt = self._encode_prompt(self.chat.text[start:place])
        if prompt == self.ids[section:first]:
            return first
        following = next((n for n in range(first, len(self.ids)) if self.ids[n] in self._controls), len(self.ids))
        stop = self.begins[following] if following < len(self.ids) else len(self.chat.text)
        left = self._encode(self.chat.text[start:place])
        right = self._encode_alone(left.ids, self.chat.text[place:stop], self.ids[section:following])
        if right is None:
            around = self.chat.text[max(place - 12, 0) : place], self.chat.text[place : place + 12]
            raise InputError(
                f"the tokenizer joins what stands before the assistant's turn with its text ({around[0]!r} and "
                f"{around[1]!r}), and apart they are not the same text: the turn cannot be masked exactly; let the "
                "template write a control token or a line break there, or use data.template=paper"
            )
        self.ids[section:following] = left.ids + right.ids
        self.begins[section:following] = [start + n for n in left.begins] + [place + n for n in right.begins]
        self.ends[section:following] = [start + n for n in left.ends] + [place + n for n in right.ends]
        self._cut = section + len(left.ids)
        return self._cut

    def _encode_prompt(self, text: str) -> list[int]:
        key = text, self.chat.numbered
        if key not in self._prompts:
            ids = self._encode(text).ids
            if len(text) > _KEPT:
                return ids
            self._prompts[key] = ids
        return self._prompts[key]

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode_unguarded([(text, self.chat.numbered)])[0]

    def _encode_alone(self, before: list[int], text: str, joined: list[int]) -> Encoding | None:
        """Text encoded by itself, to follow the tokens `before`; None when both are not the text of `joined`."""
        wanted = self._tokenizer.decode(joined)
        for lead in ("", "\n"):  # SentencePiece begins a text with a space: not so after a line break
            encoding = self._encode(lead + text)
            skip, width = bisect.bisect_left(encoding.begins, len(lead)), len(lead)
            parts = (encoding.ids[skip:], *([n - width for n in places[skip:]] for places in encoding[1:]))
            if encoding.ends[skip - 1 : skip] <= [width] and self._tokenizer.decode(before + parts[0]) == wanted:
                return Encoding(*parts)
        return None
