"""Tokens that a run adds to its model's tokenizer: ids, the embedding rows they need, the files that have them.

Two kinds, as the tokenizers library knows them. An ordinary added token is recognised wherever its text stands, and
decoded as text. A control token (special) comes from a chat template alone: its letters in a text stay letters.

A new token takes the id after the tokenizer's highest. Embeddings often have rows beyond that; those are used first.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.errors import InputError
from qlora_jax.files import write_json
from qlora_jax.io.folder import COMPANIONS
from qlora_jax.models.config import read_json
from qlora_jax.text import tokenizer_files
from qlora_jax.text.tokenizer import Tokenizer

_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")  # usual names; the first that is free may be added
_NOT_OF_THE_TOKENIZER = ("generation_config.json",)


class AddedTokens(NamedTuple):
    """What is added to the tokenizer of `folder`. Ids in `new` go up from `before`, one more than its highest id."""

    folder: Path
    before: int
    new: dict[str, int]  # text -> id
    control: frozenset[str]  # those of `new` that are control tokens
    present: tuple[str, ...]  # asked for, and in the vocabulary already
    present_control: tuple[str, ...]  # those of `present` that are control tokens
    pad: str | None  # text of a pad token that is not the end token; None where nothing is added

    def rows(self, V: int) -> int:
        """Rows that embedding and head need, of which they have V."""
        return max(V, self.before + len(self.new)) if self.new else V

    def real_rows(self, V: int) -> int:
        """The first rows, of V, that belong to tokens the model knows."""
        return min(V, self.before)

    def rows_to_fill(self, V: int) -> list[int]:
        """Rows without a meaning yet: of the new tokens, and all that a model of V rows lacks."""
        return sorted({*self.new.values(), *range(V, self.rows(V))})

    def report(self, V: int) -> list[str]:
        """Lines for the user."""
        lines = []
        if self.present:
            lines.append(f"tokens: in the vocabulary already, left as they are: {', '.join(map(repr, self.present))}")
        if self.present_control:
            shown = ", ".join(map(repr, self.present_control))
            lines.append(f"tokens: warning: {shown}: control tokens, which no text becomes; chat templates write them")
        if not self.new:
            return lines
        shown = ", ".join(f"{text!r} = {number}" for text, number in self.new.items())
        rows = self.rows(V)
        room = (
            f"embedding and head grow from {V:,} to {rows:,} rows"
            if rows > V
            else f"they take rows that the {V:,} of the embedding had beyond the tokenizer's {self.before:,}"
        )
        lines.append(f"tokens: added {shown}; pad is {self.pad!r}; {room}")
        return lines


def find_added(folder: Path, ordinary: Sequence[str], control: Sequence[str]) -> AddedTokens:
    """Ids for the texts that the tokenizer of `folder` does not have.

    A pad token comes with them where the tokenizer names none, or names an end token. Raises InputError for an empty or
    repeated text, and where the folder's files cannot hold one.
    """
    _check_texts(ordinary, control)
    tokenizer = Tokenizer.from_folder(folder)
    if (ordinary or control) and tokenizer.is_ranked:
        raise InputError(
            f"data.added_tokens: {folder} has no tokenizer.json, and tekken.json, tiktoken's files, merges.txt and "
            "bytes take no new tokens: use an unused control token, such as <SPECIAL_20>, or put a tokenizer.json "
            "beside it"
        )
    if ordinary and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"data.added_tokens: {folder} has a tokenizer.model and no tokenizer.json, and a SentencePiece model takes "
            "control tokens alone (data.added_special_tokens); transformers writes a tokenizer.json: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    present = tuple(text for text in (*ordinary, *control) if tokenizer.id_of(text) is not None)
    missing = [text for text in (*ordinary, *control) if text not in present]
    pad = _choose_pad(folder, tokenizer, missing) if missing else None
    if pad is not None and tokenizer.id_of(pad) is None and pad not in missing:
        missing.append(pad)
    return AddedTokens(
        folder,
        tokenizer.vocab_size,
        {text: tokenizer.vocab_size + place for place, text in enumerate(missing)},
        frozenset(text for text in missing if text in control or text == pad),
        present,
        tuple(text for text in present if text in ordinary and tokenizer.is_control(text)),
        pad,
    )


def _check_texts(ordinary: Sequence[str], control: Sequence[str]) -> None:
    seen: set[str] = set()
    for key, texts in (("data.added_tokens", ordinary), ("data.added_special_tokens", control)):
        for text in texts:
            if not isinstance(text, str) or not text.strip() or text != text.strip():
                raise InputError(f"{key}: {text!r}; expected a text without white space at its ends")
            if text in seen:
                raise InputError(f"{key}: {text!r} stands there twice, or in both keys; name it once")
            seen.add(text)


def _choose_pad(folder: Path, tokenizer: Tokenizer, missing: Sequence[str]) -> str:
    """The tokenizer's own if it is no end token; else one with a usual name, there or to be added."""
    named = tokenizer_files.read(folder).token_text("pad_token")[1]
    ids = {text: tokenizer.id_of(text) for text in (named, *_PADS) if text}
    usable = [text for text, number in ids.items() if number is not None and number not in tokenizer.eos_ids]
    unknown = [text for text, number in ids.items() if number is None]
    return [*usable, *(text for text in unknown if text in missing), *unknown][0]


def extended_tokenizer(added: AddedTokens) -> Tokenizer:
    """The tokenizer with its new tokens, read from the very files that `write_tokenizer` writes."""
    if not added.new:
        return Tokenizer.from_folder(added.folder)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        write_tokenizer(added, Path(folder))
        return Tokenizer.from_folder(folder, added.folder)


def write_tokenizer(added: AddedTokens, out: Path) -> list[str]:
    """The tokenizer's files with the new tokens into `out`, which is there; returns their names.

    Raises InputError when the tokenizer, read again, gives a token another id.
    """
    names = [name for name in COMPANIONS if (added.folder / name).is_file() and name not in _NOT_OF_THE_TOKENIZER]
    for name in names:
        shutil.copyfile(added.folder / name, out / name)
    edits = {
        "tokenizer.json": _add_to_tokenizer,
        "tokenizer_config.json": _add_to_config,
        "special_tokens_map.json": _add_to_config,
        "added_tokens.json": lambda spec, added: spec.update(added.new),
    }
    needed = {"tokenizer_config.json"} if "tokenizer.json" in names else {"tokenizer_config.json", "added_tokens.json"}
    for name, edit in edits.items():
        if name in names or name in needed:
            spec = read_json(out / name) if name in names else {}
            edit(spec, added)
            write_json(out / name, spec)
    tokenizer = Tokenizer.from_folder(out, added.folder)
    for text, number in added.new.items():
        if tokenizer.id_of(text) != number:
            raise InputError(
                f"{added.folder}: the tokenizer gives {text!r} the id {tokenizer.id_of(text)}, expected {number}: its "
                "ids have gaps; tokens cannot be added to it"
            )
    return sorted({*names, *needed})


def _token(text: str, added: AddedTokens) -> dict[str, Any]:
    """As the tokenizers library writes an added token."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **plain, "special": text in added.control}


def _add_to_tokenizer(spec: dict[str, Any], added: AddedTokens) -> None:
    tokens = spec.setdefault("added_tokens", [])
    tokens += [{"id": number, **_token(text, added)} for text, number in added.new.items()]


def _add_to_config(spec: dict[str, Any], added: AddedTokens) -> None:
    """tokenizer_config.json, special_tokens_map.json: the pad token, and the control tokens in their list."""
    spec["pad_token"] = added.pad
    control = [text for text in added.new if text in added.control and text != added.pad]
    is_new_form = isinstance(spec.get("extra_special_tokens"), list)  # of transformers 5
    listed = "extra_special_tokens" if is_new_form else "additional_special_tokens"
    if control:
        spec[listed] = [*(spec.get(listed) or []), *control]
    if "added_tokens_decoder" in spec or not (added.folder / "tokenizer.json").is_file():
        decoder = {str(number): _token(text, added) for text, number in added.new.items()}
        spec["added_tokens_decoder"] = spec.get("added_tokens_decoder", {}) | decoder
