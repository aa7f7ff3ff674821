"""Readers of what a run and a sweep wrote, and of a command line's keys: see readers.py."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tests.fuzz import mutate

_CHECKPOINT = ("_METADATA", "manifest.ocdbt", "d/0")


def sums(folder: Path) -> Callable[[bytes], Any]:
    """checksums.json of a checkpoint, whose names are of files in it."""
    from qlora_jax.train.checkpoints import Checkpoints

    item = folder / "checkpoints" / "3" / "default"
    item.mkdir(parents=True, exist_ok=True)
    (item / "d").mkdir(exist_ok=True)
    for name in _CHECKPOINT:
        (item / name).write_bytes(name.encode())

    def read(data: bytes) -> None:
        assert Checkpoints(folder / "checkpoints", 2, lambda line: None).latest == 3

    return read


def some_sums() -> list[bytes]:
    return [json.dumps({name: xxhash.xxh3_128(name.encode()).hexdigest() for name in _CHECKPOINT}).encode()]


def workdir(folder: Path) -> Callable[[bytes], Any]:
    """config.json, metrics.jsonl, summary.json or inputs.json of a run that goes on, or is reported on."""
    from qlora_jax.report.source import read as read_source
    from qlora_jax.train.workdir import Workdir

    for other, content in _run_files().items():
        (folder / other).write_bytes(content)

    def read(data: bytes) -> None:
        read_source(folder)
        held = Workdir(folder, json.loads(_run_files()["config.json"]))
        try:
            held.go_on(lambda line: None)
            held.metrics()
        finally:
            held.close()

    return read


def _run_files() -> dict[str, bytes]:
    rows = [{"step": step, "loss": 2.0 / step, "tokens": 96, "seconds": 0.1} for step in range(1, 5)]
    return {
        "config.json": json.dumps(
            {"model": {"path": "m"}, "lora": {"rank": 8, "targets": ["q_proj"]}, "train": {"steps": 4}}
        ).encode(),
        "metrics.jsonl": b"\n".join(json.dumps(row).encode() for row in rows) + b"\n",
        "summary.json": json.dumps({"steps": 4, "final_eval_loss": 1.5, "tokens_per_second": 9.0}).encode(),
        "inputs.json": json.dumps({"model.path": {"content": "0" * 32, "parts": [["m", "1" * 32]]}}).encode(),
    }


def of_run(name: str) -> Callable[[], list[bytes]]:
    return lambda: [_run_files()[name]]


def ledger(folder: Path) -> Callable[[bytes], Any]:
    """What a ledger's rows hold: JSON texts that a report and a driver read again."""
    from qlora_jax.report.source import read as read_source
    from qlora_jax.sweep.grid import Point
    from qlora_jax.sweep.ledger import FILE, Ledger, Outcome, Row, contents, reading

    made = Ledger(folder)
    made.add([Point("h1", {"lora": {"rank": 8}}, {"lora.rank": 8}, ("g",))])
    made.start("p", ["h1"], "node")
    made.finish([Outcome("h1", {"final_eval_loss": 1.0, "steps": 2})], [Row("h1", 1, "loss", 2.0)])
    made.close()
    db = sqlite3.connect(folder / FILE, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")

    def read(data: bytes) -> None:
        column, _, text = data.decode("utf-8", "replace").partition(" ")
        if column not in ("config", "result", "axes", "groups", "error", "status", "hash"):
            column = "result"
        before = db.execute(f'SELECT "{column}" FROM points').fetchone()[0]
        try:
            db.execute(f'UPDATE points SET "{column}" = ?', (text,))
        except sqlite3.IntegrityError:
            return
        try:
            read_source(folder)
            with reading(folder / FILE) as found:
                contents(found)
        finally:
            db.execute(f'UPDATE points SET "{column}" = ?', (before,))

    return read


def ledger_rows() -> list[bytes]:
    return [
        b'config {"lora": {"rank": 8}}',
        b'result {"final_eval_loss": 1.0, "steps": 2}',
        b'axes {"lora.rank": 8}',
        b'groups ["g"]',
    ]


def in_ledger(rng: Any, data: bytes) -> bytes:
    column, _, text = data.partition(b" ")
    return column + b" " + mutate.either(mutate.in_json, mutate.in_bytes)(rng, text)


def flags(folder: Path) -> Callable[[bytes], Any]:
    from configs import base
    from qlora_jax.config_file import override
    from qlora_jax.settings import config_hash, resolved
    from qlora_jax.train.checks import check_config

    whole = base.get_config()
    whole.model.path, whole.data.path = "model", "data.jsonl"

    def read(data: bytes) -> None:
        key, _, text = data.decode("utf-8", "replace").partition("=")
        config = whole.copy_and_resolve_references().lock()
        override(config, [(key, text)])
        config_hash(resolved(config))
        check_config(config)

    return read


def some_flags() -> list[bytes]:
    from configs import base
    from qlora_jax.settings import flatten

    known = flatten(base.get_config()) | {"model.path": "m", "data.path": "d"}
    return [
        f"{key}={value if not isinstance(value, tuple) else ','.join(map(str, value))}".encode()
        for key, value in known.items()
    ]


WORDS = (
    "model.", "lora.rank", "=", "train.steps=", "auto", "[0]", "(1,", "'a',", "1e3", "__class__", "lambda: 0", "[" * 99,
    "(" * 300, "-" * 999, "{", "},", "q_proj,v_proj", ",", ",,", "0x10", "1_000", "nan", "inf", "9" * 5000,
)  # fmt: skip
