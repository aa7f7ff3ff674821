"""Shows what a config trains on: examples as the loss sees them, lengths, cuts and padding.

    python -m experiments.data --config=configs/quickstart.py --show=3

Reads the data as a run does and prints examples decoded from their tokens (what is learned is green, or stands
between ⟦ and ⟧), the lengths of all examples, what was cut or left out, and the padding of the first epoch: as the
config makes batches, shuffled, grouped by length, and packed. Of the model only the tokenizer and config.json are used.
--out gets the figures as JSON, --png as a picture.

data.path is a file, a hub data set (owner/name, owner/name:file), or one known by name: oasst1, hh-rlhf, alpaca,
alpaca-clean, self-instruct, unnatural-instructions, flan-v2, chip2, longform, dolly. Several have commas between them,
and data.weights=0.7,0.3 says which share of the examples drawn is of each.
"""

import os
import sys
from pathlib import Path

from absl import flags

from experiments.support import cli

CONFIG = cli.config_flag()
SHOW = flags.DEFINE_integer("show", 5, "examples to print, the first of those trained on", lower_bound=0)
COLOR = flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "auto: on a terminal, unless NO_COLOR is set")
OUT = flags.DEFINE_string("out", None, "JSON file for the figures")
PNG = flags.DEFINE_string("png", None, "PNG file for lengths and padding")


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.feed.batches import FileBatches
    from qlora_jax.feed.describe import histogram, show_example
    from qlora_jax.feed.figures import draw_data
    from qlora_jax.feed.labelled import labels_of
    from qlora_jax.feed.load import load_data
    from qlora_jax.feed.padding import padding, padding_by_method
    from qlora_jax.feed.store import lengths_of, targets_of
    from qlora_jax.files import write_json
    from qlora_jax.io.folder import resolve
    from qlora_jax.io.load import load_config
    from qlora_jax.text.added_tokens import extended_tokenizer
    from qlora_jax.text.tokenizer import Tokenizer
    from qlora_jax.train.setup import added_tokens

    c = CONFIG.value
    for name, value, kind in (("out", OUT.value, "JSON"), ("png", PNG.value, "a picture")):
        if value is not None and Path(value).is_dir():
            raise InputError(f"--{name}={value} is a folder; expected a file to write {kind} to")
    if c.data.batches:
        raise InputError("data.batches is a file of ready batches, without texts to show; give data.path")
    folder = resolve(c.model.path, c.model.revision)
    model, added = load_config(folder), added_tokens(c.data, folder)
    tokenizer = Tokenizer.from_folder(folder) if added is None else extended_tokenizer(added)
    V = model.V if added is None else added.rows(model.V)
    data = load_data(c.data, tokenizer, c.train.batch_size, V, model.context)
    assert not isinstance(data.batches, FileBatches)
    examples = data.batches.examples
    color = COLOR.value == "always" or (
        COLOR.value == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    label_of = labels_of(c.data)
    for example in examples[: SHOW.value]:
        learned = int(example.loss_mask.sum())
        print(f"--- {example.where}: {len(example)} tokens, {learned} of them learned")
        print(f"{show_example(example, tokenizer, color, label_of and label_of(example))}\n")
    for line in [*(added.report(model.V) if added is not None else []), *data.report]:
        print(line)
    lengths, targets = lengths_of(examples), targets_of(examples)
    print("lengths of the examples trained on:")
    print("\n".join(histogram(lengths.tolist(), c.data.pad_to_multiple_of)))
    methods = padding_by_method(c.data, examples, c.train.batch_size, data.shares)
    print("padding of the first epoch, by the way batches are made:")
    for name, waste in methods.items():
        shapes = f"{len(waste.steps_by_length)} shape{'s' * (len(waste.steps_by_length) > 1)}"
        packed = f", {waste.rows:,} rows of {len(examples) / waste.rows:.1f} examples" if waste.rows else ""
        print(f"  {name:18} {waste.waste:6.1%} of {waste.padded:,} positions, {waste.steps:,} steps, {shapes}{packed}")
    if PNG.value is not None:
        picture = Path(PNG.value).expanduser()
        picture.parent.mkdir(parents=True, exist_ok=True)
        shares = {name: waste.waste for name, waste in methods.items()}
        names = ", ".join(Path(source["path"]).name for source in data.sources)
        title = f"{names}: {len(examples):,} examples"
        draw_data(picture, lengths - targets, targets, shares, title)
        print(f"written: {picture}")
    if OUT.value is not None:
        out = Path(OUT.value).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        waste = padding(data.batches)
        figures = {
            "path": c.data.path,
            "format": c.data.format,
            "sources": data.sources,
            "examples": len(examples),
            "heldout": len(data.heldout),
            "tokens": int(lengths.sum(dtype=int)),
            "targets": int(targets.sum(dtype=int)),
            "longest": int(lengths.max()),
            "truncated": data.truncated,
            "report": data.report,
            "packing": c.data.packing,
            "padding": waste.waste,
            "steps_by_length": waste.steps_by_length,
            "padding_by_method": {name: waste.to_json() for name, waste in methods.items()},
        }
        write_json(out, figures)
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
