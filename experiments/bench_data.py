"""Times the input pipeline: from rows on disk to batches.

    python -m experiments.bench_data --config=configs/quickstart.py --rows=3000

From rows on disk to batches. First everything is read, tokenized and kept (in a temporary folder); then batches are
made from what is kept, as a run does it, grouped by length and packed. Each part runs in a process of its own. Printed
are tokens (padding not counted) a second and the peak of the process's own memory (RssAnon: pages of the memory map
belong to the system, which takes them back at need). Of the model only the tokenizer and config.json are used.
"""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments.support import cli

CONFIG = cli.config_flag()
ROWS = flags.DEFINE_integer(
    "rows", 0, "rows to time with: those of data.path over and over, the words of their texts turned round at a random "
    "place so that no tokenizer knows them already; 0 takes data.path as it is", lower_bound=0,
)  # fmt: skip
STEPS = flags.DEFINE_integer("steps", 2000, "batches of each kind to make, an epoch at most", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "JSON file for the figures")


def main() -> int:
    from qlora_jax.bench.data import make, tokenize, write_rows
    from qlora_jax.errors import InputError
    from qlora_jax.files import write_json

    c = CONFIG.value
    if c.data.batches or not c.data.path:
        raise InputError("give a data set: data.path")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_JAX_CACHE"] = f"{folder}/cache"
        if ROWS.value:
            print(f"writing {ROWS.value:,} rows")
            c.data.path = write_rows(c.data, ROWS.value, Path(folder) / "rows.jsonl")
        results = [_apart(tokenize, c)]
        results += [_apart(make, c, is_packed, STEPS.value) for is_packed in (False, True)]
    for result in results:
        before, peak, kept = (result[name] / 2**20 for name in ("memory_before", "memory_peak", "bytes_kept"))
        print(
            f"{result['what']:30} {result['tokens']:13,} tokens in {result['seconds']:7.2f} s: "
            f"{result['tokens_per_second']:11,.0f} tokens/s; own memory {before:,.0f} MiB before, {peak:,.0f} MiB at "
            f"most; {kept:,.0f} MiB kept on disk"
        )
    if OUT.value is not None:
        write_json(Path(OUT.value).expanduser(), {"cores": os.cpu_count(), "results": results})
    return 0


def _apart(function: Any, *arguments: Any) -> dict[str, Any]:
    """The function's result, from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    cli.run(main)
