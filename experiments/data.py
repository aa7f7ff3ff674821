"""Shows what a config trains on: python -m experiments.data --config=configs/alpaca.py --config.model.path=DIR
--config.data.path=FILE --show=5

Reads the data as a run does and prints examples decoded from their tokens (what is learned is green, or stands
between ⟦ and ⟧), the lengths of all examples, what was cut or left out, and the padding of the first epoch. Of the
model only the tokenizer and config.json are used. --out gets the figures as JSON.

data.path is a file, a hub data set (owner/name, owner/name:file), or one known by name: oasst1, hh-rlhf, alpaca,
alpaca-clean, self-instruct, unnatural-instructions, flan-v2, chip2, longform, dolly.
"""

import os
import sys
from pathlib import Path

from absl import flags

from experiments import cli

CONFIG = cli.config_flag()
SHOW = flags.DEFINE_integer("show", 5, "examples to print, the first of those trained on", lower_bound=0)
COLOR = flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "auto: on a terminal, unless NO_COLOR is set")
OUT = flags.DEFINE_string("out", None, "JSON file for the figures")


def main() -> int:
    from qlora_jax.data.added_tokens import extended_tokenizer
    from qlora_jax.data.batches import Batches
    from qlora_jax.data.describe import histogram, padding, show_example
    from qlora_jax.data.load import load_data
    from qlora_jax.data.tokenizer import Tokenizer
    from qlora_jax.errors import InputError
    from qlora_jax.io.export import write_json
    from qlora_jax.io.folder import resolve
    from qlora_jax.io.load import load_config
    from qlora_jax.train.setup import added_tokens

    c = CONFIG.value
    if OUT.value is not None and Path(OUT.value).is_dir():
        raise InputError(f"--out={OUT.value} is a folder; expected a file to write JSON to")
    if c.data.batches:
        raise InputError("data.batches is a file of ready batches, without texts to show; give data.path")
    folder = resolve(c.model.path, c.model.revision)
    V, added = load_config(folder).V, added_tokens(c.data, folder)
    tokenizer = Tokenizer.from_folder(folder) if added is None else extended_tokenizer(added)
    data = load_data(c.data, tokenizer, c.train.batch_size, V if added is None else added.rows(V))
    assert isinstance(data.batches, Batches)
    examples = data.batches.examples
    color = COLOR.value == "always" or (
        COLOR.value == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    for example in examples[: SHOW.value]:
        targets = int(example.loss_mask.sum())
        print(f"--- {example.where}: {len(example)} tokens, {targets} of them learned")
        print(f"{show_example(example, tokenizer, color)}\n")
    for line in [*(added.report(V) if added is not None else []), *data.report]:
        print(line)
    lengths = [len(example) for example in examples]
    print("lengths of the examples trained on:")
    print("\n".join(histogram(lengths, c.data.pad_to_multiple_of)))
    waste = padding(data.batches, c.data.pad_to_multiple_of)
    print(
        f"padding: {waste.waste:.1%} of the first epoch's {waste.padded:,} positions; "
        f"batches are {', '.join(map(str, waste.steps_by_length))} tokens long"
    )
    if OUT.value is not None:
        out = Path(OUT.value).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "path": c.data.path,
            "format": c.data.format,
            "examples": len(examples),
            "heldout": len(data.heldout),
            "tokens": sum(lengths),
            "targets": sum(int(example.loss_mask.sum()) for example in examples),
            "longest": max(lengths),
            "report": data.report,
            "padding": waste.waste,
            "steps_by_length": waste.steps_by_length,
        }
        write_json(out, figures)
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
