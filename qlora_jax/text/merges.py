"""vocab.json and merges.txt: byte-level BPE as it was stored before tokenizer.json (GPT-2, OPT, RoBERTa).

They hold strings with their ids and pairs in the order in which they are joined; how a text is cut and which tokens
have names is a matter of the class that reads them. Source: transformers 5.23's classes of these names, which make a
tokenizer.json's pieces of both files.
"""

import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer_backends import JsonBackend
from qlora_jax.text.tokenizer_files import Files

VOCABULARY, MERGES = "vocab.json", "merges.txt"
_ENDOFTEXT = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
# Class -> the tokens that it names where no file does.
_CLASSES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": _ENDOFTEXT,
    "CodeGenTokenizer": _ENDOFTEXT,
    "RobertaTokenizer": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "</s>",
        "cls_token": "<s>", "mask_token": "<mask>",
    },
}  # fmt: skip
# model_type -> class, where no file names one.
_OF_MODELS = {
    "gpt2": "GPT2Tokenizer", "opt": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "phi": "CodeGenTokenizer",
    "codegen": "CodeGenTokenizer", "roberta": "RobertaTokenizer",
}  # fmt: skip


class MergesBackend(JsonBackend):
    """Both files, as the tokenizer.json that does the same."""

    def __init__(self, folder: Path, files: Files) -> None:
        """Raises InputError where one is missing or damaged, or the folder's class is another."""
        kind = _class_of(folder, files)
        vocabulary = _vocabulary(folder / VOCABULARY)
        defaults = {name: text for name, text in _CLASSES[kind].items() if text in vocabulary}
        said = {name: files.token_text(name)[1] for name in defaults if files.token_text(name)[0]}
        named = {name: text for name, text in (defaults | said).items() if text in vocabulary}
        specials = {text: vocabulary[text] for text in (*named.values(), *files.control_tokens()) if text in vocabulary}
        specials |= files.added_tokens()
        processor = None
        if kind == "RobertaTokenizer":
            if missing := [name for name in ("cls_token", "sep_token") if name not in named]:
                raise InputError(f"{folder / VOCABULARY} lacks the {missing[0]}, which stands beside every text")
            ends = {key: (named[f"{key}_token"], vocabulary[named[f"{key}_token"]]) for key in ("sep", "cls")}
            processor = {"type": "RobertaProcessing", "trim_offsets": False, "add_prefix_space": False, **ends}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        by_bytes = {"type": "ByteLevel", "trim_offsets": False, "use_regex": True}
        by_bytes["add_prefix_space"] = files.tokenizer_config.get("add_prefix_space") is True
        spec = {
            "version": "1.0",
            "added_tokens": [
                {"id": number, "content": text, "special": True, **flags}
                for text, number in sorted(specials.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": by_bytes,
            "post_processor": processor,
            "decoder": by_bytes,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "vocab": vocabulary,
                "merges": _merges(folder / MERGES),
            },
        }  # fmt: skip
        super().__init__(folder / MERGES, set(), spec=spec)
        self.defaults = defaults
        if processor is None:
            self.prefix = None  # tokenizer_config.json says it (add_bos_token)


def _class_of(folder: Path, files: Files) -> str:
    said = files.tokenizer_config.get("tokenizer_class") or files.config.get("tokenizer_class")
    said = said or _OF_MODELS.get(files.config.get("model_type", ""))
    kind = said.removesuffix("Fast") if isinstance(said, str) else said
    if kind not in _CLASSES:
        raise InputError(
            f"{folder} has vocab.json and merges.txt, and {kind or 'no file'} says how they are read; known are "
            f"{', '.join(_CLASSES)}: put a tokenizer.json beside them, as transformers writes it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return kind


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable vocabulary, which {MERGES} needs: {error}") from error
    if not isinstance(found, dict) or not all(type(number) is int for number in found.values()):
        raise InputError(f"{file}: expected an object of strings and their ids")
    return found


def _merges(file: Path) -> list[list[str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise InputError(f"{file}: not UTF-8: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise InputError(f"{file}: line {number} is {line!r}; expected two strings with a blank between them")
        found.append(pair)
    return found
