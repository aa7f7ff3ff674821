"""The committed instruction files and the tokenizer's texts, made again."""

import json

from experiments.support.embedded import corpus, instructions
from qlora_jax.data.prompts import alpaca_prompt


def dump(rows: list[dict[str, str]]) -> str:
    """`rows` as a JSON list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def instruction_files() -> dict[str, str]:
    """File name -> content of the instruction set."""
    train, held_out = instructions.split()
    return {"train.json": dump(train), "heldout.json": dump(held_out)}


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: a third of the generated text, half of the standard library's, some prompts.

    The prompts make the words of Alpaca's wording single tokens, so that a prompt takes about 50 of the context's 256.
    """
    train, _ = instructions.split()
    prompts = [alpaca_prompt(row["instruction"], row["input"]) for row in train[:500]]
    return corpus.documents(0, rounds=2) + corpus.stdlib_documents(500_000) + prompts
