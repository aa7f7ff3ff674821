"""Makes the quickstart's committed instruction files again, byte for byte, and on demand its tokenizer.

    python -m experiments.embedded

--tokenizer writes assets/tiny_llama/tokenizer*.json too. The tokenizer depends a little on the standard library it is
trained on, and the committed weights depend on the tokenizer: make it again only together with the weights.
"""

import pathlib

from absl import flags

from experiments.support import cli
from experiments.support.embedded import make, tokenizer
from qlora_jax.embedded import ASSETS

_OUT = flags.DEFINE_string("out", str(ASSETS), "The folder that holds instructions/ and tiny_llama/.")
_TOKENIZER = flags.DEFINE_bool("tokenizer", False, "Train the tokenizer again too.")


def main() -> None:
    out = pathlib.Path(_OUT.value)
    (out / "instructions").mkdir(parents=True, exist_ok=True)
    for name, content in make.instruction_files().items():
        path = out / "instructions" / name
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}: {content.count(chr(10)) - 2} rows")
    if _TOKENIZER.value:
        trained = tokenizer.train(make.tokenizer_texts())
        tokenizer.save(trained, out / "tiny_llama")
        print(f"wrote {out / 'tiny_llama'}: {trained.get_vocab_size()} tokens")


if __name__ == "__main__":
    cli.run(main)
