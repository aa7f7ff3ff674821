"""Vocabularies of byte strings by rank, as the tokenizer.json that does the same: tekken.json, and tiktoken's files.

Such a tokenizer cuts a text by an expression and joins, inside each piece, the neighbours whose joint string has the
lowest rank. Byte-level BPE of the `tokenizers` library does this where every way to cut a string into two others is a
merge of that string's rank. Sources: mistral_common's tekken.py (v3 to v15), tiktoken's load.py and _educational.py.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import loads, read_whole

# Of mistral_common, for files that do not list theirs (version 7 and before); the rest are <SPECIAL_20>, ...
_TEKKEN_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
TEKKEN_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# ByT5's control tokens, before its bytes; the sentinels of its pretraining stand after them.
BYT5_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_MOST_TOKENS = 2**24  # a hundred times what tokenizers have
# How texts are cut where a file of ranks says nothing about it: as Llama 3 does, and transformers takes it.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def is_ranks(file: Path) -> bool:
    """Whether a tokenizer.model is a text of tiktoken's: lines of a string in base64 and its rank."""
    with open(file, "rb") as opened:
        parts = opened.readline(4096).split()
    return len(parts) == 2 and parts[1].isdigit() and _decoded(parts[0]) is not None


def read_ranks(file: Path, specials: Mapping[str, int]) -> dict[str, Any]:
    """A text of tiktoken's -> the spec of a tokenizer.json. `specials`: the control tokens, text -> id.

    Raises InputError where a line is no string and rank, or no control token is known.
    """
    if not specials:
        raise InputError(
            f"{file} is a file of tiktoken's, which has no control tokens: expected them in tokenizer_config.json "
            "(added_tokens_decoder) or added_tokens.json"
        )
    ranks = {}
    for number, line in enumerate(read_whole(file).splitlines(), start=1):
        parts = line.split()
        token = _decoded(parts[0]) if len(parts) == 2 and parts[1].isdigit() else None
        if token is None:
            raise InputError(f"{file}: line {number} is no string in base64 and its rank")
        ranks[token] = int(parts[1])
    return _spec(ranks, _PATTERN, specials, str(file))


def read_tekken(file: Path) -> dict[str, Any]:
    """tekken.json -> the spec of a tokenizer.json. Control tokens have the first ids, strings those after them.

    Raises InputError where the file is damaged or is not what mistral_common would read.
    """
    try:
        said = loads(read_whole(file))
        config, vocabulary, specials = said["config"], said["vocab"], said.get("special_tokens")
        count, size, pattern = config["default_num_special_tokens"], config["default_vocab_size"], config["pattern"]
        is_whole = type(count) is type(size) is int and 0 <= count <= size <= _MOST_TOKENS
        if not is_whole or not isinstance(pattern, str):
            raise ValueError(f"{count!r} control tokens of {size!r} tokens")
        names = _TEKKEN_SPECIALS if specials is None else [token["token_str"] for token in specials]
        numbers = range(len(names)) if specials is None else [token["rank"] for token in specials]
        strings = [base64.b64decode(token["token_bytes"], validate=True) for token in vocabulary[: size - count]]
        ranks = [token["rank"] for token in vocabulary[: size - count]]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise InputError(f"{file}: not a readable tokenizer: {type(error).__name__}: {error}") from error
    in_order = len(ranks) == size - count and ranks == list(range(size - count))
    if not in_order or [*numbers] != list(range(len(names))) or len(names) > count:
        raise InputError(
            f"{file}: not a readable tokenizer: expected {count} control tokens at most and {size - count} strings at "
            f"least, each in the order of its rank; found {len(names)} and {len(vocabulary)}"
        )
    names = [*names, *(f"<SPECIAL_{number}>" for number in range(len(names), count))]
    controls = {name: number for number, name in enumerate(names)}
    return _spec({token: count + rank for rank, token in enumerate(strings)}, pattern, controls, str(file))


def of_bytes(specials: Mapping[str, int]) -> dict[str, Any]:
    """ByT5's tokenizer, whose tokens are bytes, as the spec of a tokenizer.json. `specials`: BYT5_NAMES first."""
    first = len(BYT5_NAMES)
    return _spec({bytes([byte]): first + byte for byte in range(256)}, r"[\s\S]", specials, "ByT5Tokenizer")


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _spec(ids: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], where: str) -> dict[str, Any]:
    """`ids`: string -> id, which rise with the rank."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise InputError(f"{where}: the byte {missing[0]} has no token, so some texts have none")
    letters = str.maketrans(dict(enumerate(_letters())))
    by_rank = sorted((number, token) for token, number in ids.items())
    vocabulary = {token.decode("latin-1").translate(letters): number for number, token in by_rank}
    numbers = {*vocabulary.values()}
    if both := [text for text, number in specials.items() if text in vocabulary or number in numbers]:
        raise InputError(f"{where}: the control token {both[0]!r} has the text or the id of a plain string too")
    merges: list[tuple[str, str]] = []
    for text in vocabulary:  # a letter is a byte
        cuts = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in vocabulary]
        known = [(left, right) for left, right in cuts if right in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "ignore_merges": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, "special": True, **flags}
            for text, number in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "post_processor": None,
        "decoder": by_bytes,
        "model": model | {"vocab": dict(specials) | vocabulary, "merges": merges},
    }


def _letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones as they are, the others from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]
