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
from qlora_jax.text.chat_rows import Answer, ChatRow
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.text.tokenizer_backends import Encoding

_KEPT = 64  # characters of a prompt's end that is kept with its ids: most are the same few words in every chat


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """ids of a row; what is learned of them as [begin, end), rising; `silent`: what is never to be learned; `ends`: the
    places after the last tokens of turns that are learned, where the row may be cut."""

    ids: list[int]
    learned: list[tuple[int, int]]
    silent: list[tuple[int, int]]
    ends: list[int]


def encode_rows(rows: Sequence[ChatRow], tokenizer: Tokenizer) -> list[ChatTokens | InputError]:
    """Tokens of rows, in their order; or, for one that cannot be masked exactly, the reason: the tokenizer cannot keep
    a prompt and its answer apart, or does not make a token of what ends a turn."""
    encodings = tokenizer.encode_unguarded([(row.text, row.numbered) for row in rows])
    prompts: dict[tuple[str, bool], list[int]] = {}
    found: list[ChatTokens | InputError] = []
    for row, encoding in zip(rows, encodings, strict=True):
        try:
            found.append(_learn(_Tokens(row, encoding, tokenizer, prompts)))
        except InputError as error:
            found.append(error)
    return found


def encode_prompt(row: ChatRow, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation to generate from, its earlier turns as `encode_rows` has them (as a whole where it refuses
    them)."""
    encoding = tokenizer.encode_unguarded([(row.text, row.numbered)])[0]
    tokens = _Tokens(row, encoding, tokenizer, {})
    try:
        for answer in row.answers:
            tokens.said(answer)
    except InputError:
        return encoding.ids
    return tokens.ids


def _learn(tokens: "_Tokens") -> ChatTokens:
    learned, silent, ends = [], [], []
    for answer in tokens.row.answers:
        said = tokens.said(answer)
        end = bisect.bisect_left(tokens.begins, answer.end)
        if not tokens.is_control(end - 1):
            raise InputError(
                "the tokenizer makes no control token of what ends the assistant's turn "
                f"({tokens.row.text[max(answer.end - 12, 0) : answer.end]!r}); use data.template=paper"
            )
        if answer.learned:
            learned += said
            ends.append(end)
        if answer.silent:
            silent += said
    return ChatTokens(tokens.ids, learned, silent, ends)


class _Tokens:
    """The tokens of a row, cut at places in its text."""

    def __init__(
        self, row: ChatRow, encoding: Encoding, tokenizer: Tokenizer, prompts: dict[tuple[str, bool], list[int]]
    ) -> None:
        self.row = row
        self.ids, self.begins, self.ends = map(list, encoding)
        self._tokenizer, self._prompts = tokenizer, prompts
        self._cut = 0  # tokens before this one were encoded apart

    def is_control(self, place: int) -> bool:
        """Whether the token at a place is a control token."""
        return self.ids[place] in self._tokenizer.controls

    def said(self, answer: Answer) -> list[tuple[int, int]]:
        """The tokens [first, stop) of what is said. Raises InputError as `index` does."""
        edges = {place for span in answer.spans for place in span} - {answer.end}
        at = {place: self.index(place) for place in sorted({answer.begin, *edges})}
        # it is the end token that ends what is learned, not the place where the blanks after it end
        at[answer.end] = bisect.bisect_left(self.begins, answer.end)
        return [(at[first], at[last]) for first, last in answer.spans]

    def index(self, place: int) -> int:
        """The first token of the text from `place` on; what stands before it are the tokens of that text alone.

        Raises:
          InputError: encoded apart, the two sides are not the text.
        """
        first = bisect.bisect_left(self.begins, place)
        # A control token parts the text: what stands before the last one has no say here.
        section = next((n for n in range(first - 1, self._cut - 1, -1) if self.is_control(n)), self._cut)
        start = self.begins[section] if 0 < section < len(self.begins) else 0
        prompt = self._encode_prompt(self.row.text[start:place])
        if prompt == self.ids[section:first]:
            return first
        following = next((n for n in range(first, len(self.ids)) if self.is_control(n)), len(self.ids))
        stop = self.begins[following] if following < len(self.ids) else len(self.row.text)
        left = self._encode(self.row.text[start:place])
        right = self._encode_alone(left.ids, self.row.text[place:stop], self.ids[section:following])
        if right is None:
            around = self.row.text[max(place - 12, 0) : place], self.row.text[place : place + 12]
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
        key = text, self.row.numbered
        if key not in self._prompts:
            ids = self._encode(text).ids
            if len(text) > _KEPT:
                return ids
            self._prompts[key] = ids
        return self._prompts[key]

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode_unguarded([(text, self.row.numbered)])[0]

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
