"""Two kinds of tokenizer files behind one interface: tokenizer.json (tokenizers), tokenizer.model (SentencePiece).

Both turn plain text into ids with nothing added, and never read a control token out of it: a data set that
contains the letters "</s>" means those letters, not the end of the sequence.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_jax.errors import InputError

# Encodings of this many texts exist at a time: the library's objects are some hundred times the size of the ids.
_CHUNK = 1024


_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Backend(Protocol):
    """What Tokenizer needs of a tokenizer file.

    `specials` has the text of every control token with its id; `bos_id` and `eos_id` are what the file itself knows
    of them, for folders where no other file says more.
    """

    vocab_size: int
    specials: dict[str, int]
    bos_id: int | None
    eos_id: int | None

    def id_of(self, token: str) -> int | None: ...

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_marked(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def content(self) -> bytes:
        """All that decides the ids: equal for equal tokenizers."""
        ...


class JsonBackend:
    """tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, file: Path, control_tokens: set[str]) -> None:
        """`control_tokens`: texts that are control tokens even where the file does not mark them special."""
        import tokenizers

        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
            for token in spec.get("added_tokens", []):
                token["special"] = token["special"] or token["content"] in control_tokens
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: not a readable tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.specials = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["special"]}
        # This kind of file does not say which of its control tokens begins or ends a text: go by the usual names.
        self.bos_id = next((self.specials[token] for token in _USUAL_BOS if token in self.specials), None)
        self.eos_id = next((self.specials[token] for token in _USUAL_EOS if token in self.specials), None)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True  # as letters
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            ids.extend(e.ids for e in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False))
        return ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the control tokens' texts stand for the control tokens."""
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def content(self) -> bytes:
        return self._tokenizer.to_str().encode()


class SentencePieceBackend:
    """tokenizer.model, read by the `sentencepiece` library."""

    def __init__(self, file: Path, added: dict[str, int]) -> None:
        """`added`: control tokens that the files beside it add to the model's own, text -> id."""
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(
                f"{file.parent} has a tokenizer.model and no tokenizer.json; reading it needs sentencepiece: "
                "pip install sentencepiece"
            ) from error
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file}: not a readable SentencePiece model: {error}") from error
        count = self._model.get_piece_size()
        control = (i for i in range(count) if self._model.is_control(i))
        self.specials = {self._model.id_to_piece(i): i for i in control} | added
        self._skipped = set(self.specials.values())
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self._count = count
        self.vocab_size = max([count - 1, *self.specials.values()]) + 1

    def id_of(self, token: str) -> int | None:
        if token in self.specials:
            return self.specials[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the control tokens' texts stand for the control tokens."""
        return encode_around_specials(text, self)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i < self._count and i not in self._skipped])

    def content(self) -> bytes:
        return self._model.serialized_model_proto() + json.dumps(sorted(self.specials.items())).encode()


def encode_around_specials(text: str, backend: Backend, rewrite: Callable[[str], str] = str) -> list[int]:
    """Ids of a text cut at the control tokens' texts; the pieces between them, rewritten, are plain text."""
    ids: list[int] = []
    for number, piece in enumerate(special_pattern(backend.specials).split(text)):
        if number % 2:
            ids.append(backend.specials[piece])
        elif piece:
            ids.extend(backend.encode_plain([rewrite(piece)])[0])
    return ids


def special_pattern(specials: dict[str, int]) -> re.Pattern[str]:
    """Matches any control token's text as group 1, the longest first."""
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("((?!))")
