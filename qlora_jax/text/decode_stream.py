"""Decoding token by token, for text that appears while it is generated.

One token is not always whole text: a character may be spread over several byte tokens, and whether a token begins
with a space can depend on its being the first. So every step decodes a short window twice, without and with the new
tokens, and the difference is the new text; it is held back while it ends inside a character.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

# A character has at most four bytes, but a byte-level token may end one and begin the next: after this many tokens
# without a whole end, the bytes are no UTF-8 and are shown as U+FFFD.
_MAX_HELD = 16


class DecodeStream:
    """Text of ids pushed one by one or in groups; the pieces together are the text of all ids."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context: Sequence[int],
        skipped: Set[int],
        written: Mapping[int, str] | None = None,
    ) -> None:
        """`decode`: ids to text; `context`: ids already shown; `skipped`: ids that leave no text; `written`: those of
        them that leave a text all the same."""
        self._decode = decode
        self._skipped = skipped
        self._written = written or {}
        self._shown = [i for i in context if i not in skipped]
        self._held: list[int] = []

    def push(self, ids: int | Iterable[int]) -> str:
        """Takes one id or several; returns the text that is whole by now, perhaps ""."""
        new = [ids] if isinstance(ids, int) else map(int, ids)
        pieces = []
        for each in new:
            if each in self._written:
                pieces += [self.flush(), self._written[each]]
            elif each not in self._skipped:
                pieces.append(self._push_one(each))
        return "".join(pieces)

    def flush(self) -> str:
        """What is held back at the end; an unfinished character shows as U+FFFD."""
        text = self._new_text() if self._held else ""
        self._held = []
        return text

    def _push_one(self, new: int) -> str:
        self._held.append(new)
        text = self._new_text()
        if not text or (text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < _MAX_HELD):
            return ""
        self._shown, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]
