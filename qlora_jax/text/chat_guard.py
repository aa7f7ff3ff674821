"""Control tokens in a chat: the template's own are tokens, the same letters inside a message are letters.

On its way through the template the text of a control token inside a message is a number between two noncharacters
(code points that Unicode keeps for a program's own use). Afterwards the letters come back; and so that they are not
taken for the token then, the template's own control tokens become numbers in their turn.

What the assistant says may hold control tokens of its own: the signs around its thinking, and what the template itself
looks for in a message (`spoken`). In its turns these pass as they are, for the template to see.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.chat_template import REASONING

_LETTERS = "\ufdd0{}\ufdd1"  # the letters of a control token inside a message
_TOKEN = "\ufdd2{}\ufdd3"  # a control token of the template, where letters of one are in the text too
_GUARDED = re.compile("\ufdd0(\\d+)\ufdd1")
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd5]")
_SHOWN = re.compile(r"(?:\ufdd0|\\ufdd0)(\d+)(?:\ufdd1|\\ufdd1)|(?:\ufdd0|\\ufdd0)\d*|(?:[\ufdd1-\ufdd5]|\\ufdd[1-5])")
_THINKING = re.compile("think|thought|reason", re.IGNORECASE)  # in the text of a token around reasoning
_SAID = ("content", *REASONING)  # fields of an assistant's message that are its own words


class Guard:
    """Numbers the control tokens in the order of `specials`; of those, `spoken` pass in the assistant's own words."""

    def __init__(self, specials: Sequence[str], spoken: Collection[str] = ()) -> None:
        self._specials = list(specials)
        self._number = {special: number for number, special in enumerate(self._specials)}
        self._pattern = special_pattern(self._specials)
        self._spoken = frozenset(spoken)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with the control tokens' texts in it guarded. Raises InputError as `guard` does."""
        by_assistant = message["role"] == "assistant"
        return {
            name: value if name == "role" else self.guard(value, by_assistant and name in _SAID)
            for name, value in message.items()
        }

    def guard(self, value: Any, own_words: bool = False) -> Any:
        """A value of a message, every control token's text in it (also in lists and objects) as a number.

        Raises:
          InputError: a noncharacter U+FDD0 to U+FDD5 is in it.
        """
        if isinstance(value, str):
            if found := _NONCHARACTERS.search(value):
                raise InputError(f"a message has U+{ord(found[0]):04X}, which is no character of any text; take it out")
            passing = self._spoken if own_words else ()
            return self._pattern.sub(
                lambda match: match[0] if match[0] in passing else _LETTERS.format(self._number[match[0]]), value
            )
        if isinstance(value, list | tuple):
            return [self.guard(entry, own_words) for entry in value]
        if isinstance(value, dict):
            return {self.guard(key): self.guard(entry, own_words) for key, entry in value.items()}
        return value

    def unguard(self, text: str, cuts: Sequence[int]) -> tuple[str, list[int], bool]:
        """What a template made of guarded messages: the text to encode, `cuts` (rising places in the text) there, and
        whether its control tokens are named as numbers (`token_pattern`) rather than written.

        Raises:
          InputError: the template took a message apart in the middle of a control token's text.
        """
        if not _NONCHARACTERS.search(text):
            return text, list(cuts), False
        edges = [0, *cuts, len(text)]
        pieces = [self._named(text[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)]
        whole = "".join(pieces)
        left = _NONCHARACTERS.search(token_pattern().sub("", whole))
        if left or whole != self._named(text):
            raise InputError("the template takes apart a control token's text in a message; take it out of the message")
        moved, at = [], 0
        for piece in pieces[:-1]:
            at += len(piece)
            moved.append(at)
        return whole, moved, True

    def shown(self, text: str) -> str:
        """Guarded text, or a message about it, as a reader may see it: the letters, and no sign of the guard."""
        return _SHOWN.sub(lambda match: self._letters(match[1] or "", ""), text)

    def _named(self, text: str) -> str:
        named = self._pattern.sub(lambda match: _TOKEN.format(self._number[match[0]]), text)
        return _GUARDED.sub(lambda match: self._letters(match[1], match[0]), named)

    def _letters(self, number: str, otherwise: str) -> str:
        return self._specials[int(number)] if number and int(number) < len(self._specials) else otherwise


def spoken(specials: Collection[str], searched: Sequence[str], never: Collection[str]) -> frozenset[str]:
    """Control tokens that an assistant may say itself: those around its thinking by their names, and those that its
    template looks for in messages (`searched`); `never` those that end its turn."""
    return frozenset(
        special
        for special in specials
        if special and special not in never and (is_thinking(special) or any(special in text for text in searched))
    )


def is_thinking(special: str) -> bool:
    """Whether a control token is one around reasoning, by its name."""
    return bool(_THINKING.search(special))


def token_names(count: int) -> list[str]:
    """The numbers that stand for `count` control tokens."""
    return [_TOKEN.format(number) for number in range(count)]


def token_pattern() -> re.Pattern[str]:
    """Matches any of `token_names`, the whole as group 1."""
    return re.compile("(\ufdd2\\d+\ufdd3)")


def special_pattern(specials: Sequence[str]) -> re.Pattern[str]:
    """Matches any control token's text as group 1, the longest first."""
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("((?!))")
