"""Folders with vocab.json and merges.txt. The standard library alone: golden scripts use it too."""

import json
from pathlib import Path

TOKENS = ("<pad>", "<unk>", "<mask>", "<|endoftext|>")
TEXTS = ["The cat reads\n a book.", " don't, I'll 12345  x", "\t\x85é 中文 🙂\r\n", "", "a"]


def write_folder(folder: Path, golden: Path, config: dict, settings: dict | None, named: dict | None) -> Path:
    """The byte-level tokenizer of golden/chat as both files, TOKENS after it."""
    folder.mkdir(exist_ok=True)
    spec = json.loads((golden / "chat" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    first = max(vocabulary.values()) + 1
    vocabulary |= {text: first + place for place, text in enumerate(TOKENS)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    files = {"vocab": vocabulary, "config": config, "tokenizer_config": settings, "special_tokens_map": named}
    for name, values in files.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
