"""Timing of the input pipeline, for experiments.bench_data: rows to tokens on disk, tokens to batches.

Every function is to run in a process of its own; QLORA_JAX_CACHE says where tokens are kept. Memory is the process's
own (RssAnon): pages of the memory map belong to the system, which takes them back at need.
"""

import copy
import itertools
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

from qlora_jax.data.formats import COLUMNS
from qlora_jax.data.read import read_rows
from qlora_jax.feed.load import load_data
from qlora_jax.feed.pipeline import prefetched, step_dataset
from qlora_jax.io.folder import resolve
from qlora_jax.io.load import load_config
from qlora_jax.text.tokenizer import Tokenizer


def write_rows(data: Any, count: int, out: Path) -> str:
    """Writes so many rows of the data set's form to a .jsonl file and returns its path."""
    rows = read_rows(data.path, data.revision, COLUMNS.get(data.format, ()))
    draw = random.Random(0)

    def turned(value: Any) -> Any:
        words = value.split(" ") if isinstance(value, str) else []
        at = draw.randrange(len(words)) if words else 0
        return " ".join(words[at:] + words[:at]) if words else value

    with out.open("w", encoding="utf-8") as file:
        for row in itertools.islice(itertools.cycle(rows), count):
            file.write(json.dumps({name: turned(value) for name, value in row.fields.items()}) + "\n")
    return str(out)


def tokenize(config: Any) -> dict[str, Any]:
    """Rows on disk to tokens on disk."""
    with _Timed("rows to tokens on disk") as timed:
        data = _load(config)
    return timed.result(data, int(data.batches.examples.lengths.sum(dtype=int)))


def make(config: Any, is_packed: bool, steps: int) -> dict[str, Any]:
    """Batches from what is kept; opening it, the order of the examples and packing are part of the time."""
    config = copy.deepcopy(config)
    config.data.packing = is_packed
    with _Timed(f"tokens to batches, {'packed' if is_packed else 'grouped'}") as timed:
        data = _load(config)
        steps = min(steps, data.batches.steps_per_epoch)
        feed = prefetched(step_dataset(data.batches, steps, 0, 1), 0)
        begun = time.perf_counter()
        for batch in feed:
            batch["tokens"].max()  # touches it, as handing it to a device would
        in_batches = time.perf_counter() - begun
    tokens, _ = data.batches.padded(steps)
    return timed.result(data, tokens) | {"steps": steps, "steps_per_second": steps / in_batches}


def _load(config: Any) -> Any:
    folder = resolve(config.model.path, config.model.revision)
    tokenizer = Tokenizer.from_folder(folder)
    model = load_config(folder) if (folder / "config.json").is_file() else None
    V, context = (tokenizer.vocab_size, None) if model is None else (model.V, model.context)
    return load_data(config.data, tokenizer, config.train.batch_size, V, context)


class _Timed:
    """Seconds of a block, and the process's own memory before it and at most."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> "_Timed":
        import pyarrow.parquet  # noqa: F401 (imports are not what is timed)
        import tokenizers  # noqa: F401

        self.before = self.peak = _own_memory()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, _own_memory())

    def result(self, data: Any, tokens: int) -> dict[str, Any]:
        kept = sum(file.stat().st_size for file in Path(os.environ["QLORA_JAX_CACHE"]).rglob("*.arrow"))
        return {
            "what": self.what,
            "examples": len(data.batches.examples),
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "memory_before": self.before,
            "memory_peak": self.peak,
            "bytes_kept": kept,
        }


def _own_memory() -> int:
    """Bytes of this process that are no file's: RssAnon, of Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not say RssAnon")
