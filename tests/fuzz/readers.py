"""The readers of strangers' files, each as a function that reads a folder in which one file is hostile.

It returns, or raises InputError. A reader's folder is made once, with whatever stands beside the file that changes from
input to input; there is bait in it: code and a pickle that nobody may open, and a secret outside of it.
"""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.fuzz import mutate, rows, runs, texts, weights


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader.

    file: the one that is hostile, "" where the input is no file. make: from a fresh folder to what reads it, and is
    given the input too. seeds: good inputs. change: a hostile one of a good one. share: of a run's inputs, against the
    others. writes: whether it opens a run's folder, to go on in it.
    """

    file: str
    make: Callable[[Path], Callable[[bytes], Any]]
    seeds: Callable[[], list[bytes]]
    change: mutate.Change
    share: float = 1.0
    writes: bool = False


def bait(folder: Path) -> None:
    """A folder for a reader: beside it a secret, in it what nobody may open."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "secret").write_text("not for readers")
    (folder.parent / "secret.safetensors").write_bytes(save({"secret": np.ones(3, np.float32)}))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a stranger was run')\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def _said(*contents: object) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(content).encode() for content in contents]


def _tokenizer(
    file: str,
    beside: Callable[[], dict[str, bytes]],
    seeds: Callable[[], list[bytes]],
    change: mutate.Change,
    share: float = 1.0,
) -> Reader:
    return Reader(file, texts.tokenizer(beside), seeds, change, share)


def _rows(file: str, seeds: Callable[[], list[bytes]], change: mutate.Change, share: float = 1.0) -> Reader:
    return Reader(file, rows.rows(file), seeds, change, share)


def _run(file: str, change: mutate.Change) -> Reader:
    return Reader(file, runs.workdir, runs.of_run(file), change, writes=True)


_JSON = mutate.either(mutate.in_json, mutate.in_json, mutate.in_json, mutate.in_bytes)
_LINES = mutate.either(mutate.in_lines, mutate.in_lines, mutate.in_bytes)
_HEADER = mutate.either(mutate.with_length(_JSON), mutate.in_bytes)
_STOPS = {"bos_token_id": 259, "eos_token_id": [260, 261], "pad_token_id": 0}
_NAMED = {"eos_token": "</s>", "bos_token": {"content": "<s>"}}

READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", weights.tensors, weights.some_tensors, _HEADER, 3),
    "index": Reader(
        "model.safetensors.index.json", weights.index, weights.indices, mutate.either(_JSON, weights.hostile_names), 2
    ),
    "config": Reader("config.json", weights.config, weights.configs, _JSON, 2),
    "native": Reader("config.json", weights.native, weights.native_configs, _JSON, 0.5),
    "quant_state": Reader("", weights.bitsandbytes, weights.quant_states, _JSON),
    "adapter_config": Reader("adapter_config.json", weights.adapter_config, weights.adapter_configs, _JSON),
    "adapter": Reader("adapter_model.safetensors", weights.adapter, weights.adapters, _HEADER, 0.5),
    "tokenizer": _tokenizer("tokenizer.json", texts.beside, texts.specs, _JSON, 0.5),
    "tokenizer_config": _tokenizer("tokenizer_config.json", texts.beside, _said(texts.SETTINGS), _JSON),
    "special_tokens": _tokenizer("special_tokens_map.json", texts.beside, _said(_NAMED), _JSON, 0.5),
    "added_tokens": _tokenizer(
        "added_tokens.json", texts.beside_pieces, _said({"<extra>": 400, "<more>": 401}), _JSON, 0.5
    ),
    "generation_config": _tokenizer("generation_config.json", texts.beside, _said(_STOPS), _JSON, 0.5),
    "tekken": _tokenizer("tekken.json", dict, texts.tekkens, _JSON, 0.3),
    "ranks": _tokenizer("tokenizer.model", texts.of_ranks, texts.ranks, mutate.in_bytes, 0.3),
    "pieces": _tokenizer("tokenizer.model", texts.beside_pieces, texts.pieces, mutate.in_bytes, 0.3),
    "template": Reader(
        "", texts.template, texts.templates, mutate.either(mutate.template, mutate.template, mutate.in_bytes), 2
    ),
    "rows": _rows("rows.jsonl", rows.row_lines, _LINES, 2),
    "rows_json": _rows("rows.json", rows.row_lists, _JSON),
    "rows_csv": _rows("rows.csv", rows.tables, mutate.in_bytes),
    "rows_gz": _rows(
        "rows.jsonl.gz", lambda: [gzip.compress(each, mtime=0) for each in rows.row_lines()], mutate.in_bytes, 0.5
    ),
    "rows_parquet": _rows("rows.parquet", rows.parquets, mutate.in_bytes, 0.5),
    "glue": Reader("rows", rows.glue, rows.glue_rows, _LINES),
    "task": Reader("task1.json", rows.task, rows.tasks, _JSON, 0.5),
    "checksums": Reader("checkpoints/3/default/checksums.json", runs.sums, runs.some_sums, _JSON, 0.5, writes=True),
    "run_config": _run("config.json", _JSON),
    "run_metrics": _run("metrics.jsonl", _LINES),
    "run_summary": _run("summary.json", _JSON),
    "run_inputs": _run("inputs.json", _JSON),
    "ledger": Reader("", runs.ledger, runs.ledger_rows, runs.in_ledger, 0.5),
    "flags": Reader("", runs.flags, runs.some_flags, mutate.either(mutate.text(runs.WORDS), mutate.in_bytes)),
}
