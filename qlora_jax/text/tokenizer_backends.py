"""The kinds of tokenizer files behind one interface: tokenizer.json (tokenizers), tokenizer.model (SentencePiece), and
files of ranks, which are read as a tokenizer.json (ranked).

Both turn plain text into ids with nothing added, and never read a control token out of it: a data set that
contains the letters "</s>" means those letters, not the end of the sequence. Marked text, which a chat template
writes, has control tokens, and its tokens come with their places in the text.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qlora_jax.errors import InputError
from qlora_jax.files import loads, read_whole
from qlora_jax.text import ranked
from qlora_jax.text.chat_guard import special_pattern, token_names, token_pattern

# Encodings of this many texts exist at a time: the library's objects are some hundred times the size of the ids.
_CHUNK = 1024

_FLAGS = ("single_word", "lstrip", "rstrip")  # of an added token

_USUAL_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Encoding(NamedTuple):
    """Ids of a text, and where each begins and ends in it, in characters. Begins never fall. Tokens that are bytes of
    one character share its place or stand before it without a width, as does a space that the tokenizer adds."""

    ids: list[int]
    begins: list[int]
    ends: list[int]


class Backend(Protocol):
    """What Tokenizer needs of a tokenizer file.

    `specials` has the text of every control token with its id; `prefix`: ids that the file has put before every text,
    None for a kind of file that does not say; `defaults`: tokens by the names of tokenizer_config.json, and `eos_id`,
    for folders where no other file says more; `is_bytes`: it is a byte-level tokenizer; `is_ranked`: its file
    has strings and their ranks (ranked).
    """

    vocab_size: int
    specials: dict[str, int]
    prefix: tuple[int, ...] | None
    defaults: dict[str, str]
    eos_id: int | None
    is_bytes: bool
    is_ranked: bool

    def id_of(self, token: str) -> int | None: ...

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_marked(self, texts: Sequence[str], numbered: bool = False) -> list[Encoding]:
        """Encodings of texts in which the control tokens' texts stand for the control tokens; `numbered`: their names
        of chat_guard.token_names, in the order of `specials`, do, and their texts are plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def content(self) -> bytes:
        """All that decides the ids: equal for equal tokenizers."""
        ...


class JsonBackend:
    """tokenizer.json, or what is read as such (ranked), by the `tokenizers` library."""

    def __init__(
        self, file: Path, control_tokens: set[str], stops: Sequence[int] = (), spec: dict[str, Any] | None = None
    ) -> None:
        """`control_tokens`, `stops`: texts and ids of control tokens, even if the file does not mark them special;
        `spec`: what the file comes to, where it is no tokenizer.json."""
        import tokenizers

        self._file = file
        self.is_ranked = spec is not None
        try:
            spec = spec or loads(read_whole(file))
            for token in spec.get("added_tokens", []):
                is_control = token["content"] in control_tokens or token["id"] in stops
                token["special"] = token["special"] or is_control
            self.prefix: tuple[int, ...] | None = _prefix(spec.get("post_processor"))
            # It would add tokens, which is left to the caller, and take blanks out of the tokens' places.
            spec["post_processor"] = None
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: not a readable tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._numbered: Any = None  # the same tokenizer, made when a text needs it
        self._spec = spec
        self.specials = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["special"]}
        self.is_bytes = '"ByteLevel"' in json.dumps(spec)
        self.defaults: dict[str, str] = {}
        # This kind of file does not say which of its control tokens ends a text: go by the usual names.
        self.eos_id = next((self.specials[token] for token in _USUAL_EOS if token in self.specials), None)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if self.is_ranked:
            self._check_controls(file)

    def _check_controls(self, file: Path) -> None:
        """A piece of text that is a whole entry of the vocabulary becomes it, and must not be a control token."""
        texts = list(self.specials)
        for text, ids in zip(texts, self.encode_plain(texts), strict=True):
            if self.specials[text] in ids:
                raise InputError(f"{file}: the control token {text!r} could not be told from the same letters in text")

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True  # as letters
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            with self._failing():
                ids.extend(e.ids for e in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False))
        return ids

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """The library finds some mistakes of a file only where a text needs what is missing there."""
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{self._file}: a text cannot be cut into tokens: {error}") from error

    def encode_marked(self, texts: Sequence[str], numbered: bool = False) -> list[Encoding]:
        tokenizer, own = self._with_numbers() if numbered else (self._tokenizer, {})
        tokenizer.encode_special_tokens = numbered
        encodings = []
        for start in range(0, len(texts), _CHUNK):
            with self._failing():
                chunk = tokenizer.encode_batch(list(texts[start : start + _CHUNK]), add_special_tokens=False)
            for found in chunk:
                begins, ends = zip(*found.offsets, strict=True) if found.ids else ((), ())
                ids = [own.get(number, number) for number in found.ids] if own else found.ids
                encodings.append(Encoding(ids, list(begins), list(ends)))
        return encodings

    def _with_numbers(self) -> tuple[Any, dict[int, int]]:
        """The tokenizer with a second token for every control token, which its number stands for; second id -> id."""
        import tokenizers

        if self._numbered is None:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            flags = {t["content"]: {name: t[name] for name in _FLAGS} for t in self._spec["added_tokens"]}
            names = token_names(len(self.specials))
            tokenizer.add_tokens(
                [
                    tokenizers.AddedToken(name, normalized=False, special=False, **flags[special])
                    for name, special in zip(names, self.specials, strict=True)
                ]
            )
            own = dict(zip(map(tokenizer.token_to_id, names), self.specials.values(), strict=True))
            self._numbered = tokenizer, own
        return self._numbered

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def content(self) -> bytes:
        return self._tokenizer.to_str().encode()


def _prefix(processor: dict[str, Any] | None) -> tuple[int, ...]:
    """Ids that a post-processor of tokenizer.json puts before a single text."""
    kind = (processor or {}).get("type")
    if processor is None or kind == "ByteLevel":
        return ()
    if kind == "Sequence":  # each works on what those before it made
        return tuple(number for each in reversed(processor["processors"]) for number in _prefix(each))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],)
    before = itertools.takewhile(lambda piece: "SpecialToken" in piece, processor["single"])
    tokens = processor["special_tokens"]
    return tuple(number for piece in before for number in tokens[piece["SpecialToken"]["id"]]["ids"])


class TekkenBackend(JsonBackend):
    """tekken.json, Mistral's: it begins every text with <s>, and names its tokens by no other file."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, set(), spec=ranked.read_tekken(file))
        self.defaults = {name: text for name, text in ranked.TEKKEN_NAMES.items() if text in self.specials}
        self.prefix = (self.specials["<s>"],) if "<s>" in self.specials else ()


class ByteBackend(JsonBackend):
    """ByT5's: bytes, three control tokens before them and `sentinels` after them. No file."""

    def __init__(self, folder: Path, sentinels: Sequence[str]) -> None:
        controls = {text: number for number, text in enumerate(ranked.BYT5_NAMES.values())}
        controls |= {text: len(controls) + 256 + place for place, text in enumerate(sentinels)}
        super().__init__(folder, set(), spec=ranked.of_bytes(controls))
        self.defaults = dict(ranked.BYT5_NAMES)
        self.prefix = ()


class SentencePieceBackend:
    """tokenizer.model, read by the `sentencepiece` library."""

    prefix: tuple[int, ...] | None = None
    is_bytes = is_ranked = False

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
            count = self._model.get_piece_size()
            control = (i for i in range(count) if self._model.is_control(i))
            self.specials = {self._model.id_to_piece(i): i for i in control} | added
            known = {f"{name}_token": getattr(self._model, f"{name}_id")() for name in ("bos", "eos", "unk")}
            self.defaults = {name: self._model.id_to_piece(number) for name, number in known.items() if number >= 0}
        except (RuntimeError, OSError, ValueError, IndexError) as error:  # of pieces that are no UTF-8, too
            raise InputError(f"{file}: not a readable SentencePiece model: {error}") from error
        self._skipped = set(self.specials.values())
        self.eos_id = known["eos_token"] if known["eos_token"] >= 0 else None
        self._count = count
        self.vocab_size = max([count - 1, *self.specials.values()]) + 1

    def id_of(self, token: str) -> int | None:
        if token in self.specials:
            return self.specials[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def encode_marked(self, texts: Sequence[str], numbered: bool = False) -> list[Encoding]:
        names = token_names(len(self.specials)) if numbered else list(self.specials)
        own = dict(zip(names, self.specials.values(), strict=True))
        pattern = token_pattern() if numbered else special_pattern(names)
        return [self._encode_pieces(pattern.split(text), own) for text in texts]

    def _encode_pieces(self, pieces: Sequence[str], own: dict[str, int]) -> Encoding:
        """Plain text and control tokens by turns; each plain piece is encoded for itself."""
        encoding = Encoding([], [], [])
        at = 0
        for number, piece in enumerate(pieces):
            if number % 2:
                ids, offsets = [own[piece]], [(0, len(piece))]
            else:
                ids, offsets = self._encode_with_offsets(piece)
            encoding.ids.extend(ids)
            encoding.begins.extend(at + begin for begin, _ in offsets)
            encoding.ends.extend(at + end for _, end in offsets)
            at += len(piece)
        return encoding

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            found = self._model.encode(text, return_type="offset_mapping")
        except (TypeError, ValueError) as error:
            raise InputError(
                "this sentencepiece does not tell the tokens' places in a text, which a chat needs to tell its turns "
                "apart: pip install 'sentencepiece>=0.2.3'"
            ) from error
        return found["ids"], found["offsets"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if i < self._count and i not in self._skipped])

    def content(self) -> bytes:
        return self._model.serialized_model_proto() + json.dumps(sorted(self.specials.items())).encode()
