"""Makes the quickstart's committed material again: the instruction files, and on demand the tokenizer.

    python -m experiments.embedded                # assets/instructions/{train,heldout}.json, byte-identical
    python -m experiments.embedded --tokenizer    # assets/tiny_llama/tokenizer*.json too

The tokenizer depends a little on the standard library it is trained on, and the committed weights depend on the
tokenizer: make it again only together with the weights.
"""

import json
import pathlib

from absl import flags

from experiments.support import cli
from experiments.support.embedded import corpus, instructions, tokenizer
from qlora_jax.data.prompts import alpaca_prompt

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"

_OUT = flags.DEFINE_string("out", str(ASSETS), "The folder that holds instructions/ and tiny_llama/.")
_TOKENIZER = flags.DEFINE_bool("tokenizer", False, "Train the tokenizer again too.")


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


def main() -> None:
    out = pathlib.Path(_OUT.value)
    (out / "instructions").mkdir(parents=True, exist_ok=True)
    for name, content in instruction_files().items():
        path = out / "instructions" / name
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}: {content.count(chr(10)) - 2} rows")
    if _TOKENIZER.value:
        trained = tokenizer.train(tokenizer_texts())
        tokenizer.save(trained, out / "tiny_llama")
        print(f"wrote {out / 'tiny_llama'}: {trained.get_vocab_size()} tokens")


if __name__ == "__main__":
    cli.run(main)
