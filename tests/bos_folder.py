"""Folders of tokenizers that say in different places, or not at all, what stands before a text."""

import json
from pathlib import Path


def write_folder(folder: Path, golden: Path, kind: str, processor: str, **files: dict | None) -> None:
    """Files of a tokenizer.

    Args:
      golden: tests/golden.
      kind: "bytes" and "pieces" are the tokenizer.json of golden/chat and golden/tokenizer, "model" the tokenizer.model
        of golden/tokenizer.
      processor: the post_processor: "none", "bos" (puts <s> before a text) or "own" (the file's).
      files: JSON files by name; None for one that is not there.
    """
    if kind == "model":
        (folder / "tokenizer.model").write_bytes((golden / "tokenizer" / "tokenizer.model").read_bytes())
    else:
        source = {"bytes": "chat", "pieces": "tokenizer"}[kind]
        spec = json.loads((golden / source / "tokenizer.json").read_text(encoding="utf-8"))
        if processor != "own":
            spec["post_processor"] = None if processor == "none" else bos_processor(spec)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))


def bos_processor(spec: dict) -> dict:
    """A post_processor for a tokenizer.json that puts <s> before a text."""
    number = next(token["id"] for token in spec["added_tokens"] if token["content"] == "<s>")
    begun = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*begun, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": begun, "pair": pair, "special_tokens": tokens}
