"""Ledgers of sweeps that never ran: results follow from a config by a formula, with noise of its seed."""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from configs import quickstart
from qlora_jax.sweep.grid import Grid, Points, axis, chain, expand, fixed, group, product, zipped
from qlora_jax.sweep.ledger import Ledger, Outcome, Row

TYPES = [("none", False), ("nf4", True), ("nf4", False), ("fp4", False), ("int4", False)]
LOSS = {"none": 0.0, "nf4": 0.01, "fp4": 0.05, "int4": 0.1}
LAYERS = [("q_proj", "k_proj"), ("gate_proj", "up_proj", "down_proj"), ("all-linear",)]
STEPS = range(2, 21, 2)
HOSTILE = "</script><img src=x onerror=alert(1)> & 'quoted' \"twice\" <b>bold</b> $x_1$ \\"


def seeds(count: int) -> Grid:
    return zipped(axis("train.seed", range(count)), axis("data.seed", range(count)))


def grid(repetitions: int) -> Points:
    """5 * 3 * S + 4 * 3 * S + 5 * S + 2 * S points, less those that groups share; 37 a repetition."""
    types = chain(*(fixed({"quant.format": name, "quant.double_quant": double}) for name, double in TYPES))
    ranks = zipped(axis("lora.rank", [2, 8, 16, 32]), axis("lora.alpha", [2.0, 8.0, 16.0, 32.0]))
    again = seeds(repetitions)
    return expand(
        quickstart.get_config(),
        chain(
            group("Data types", product(types, axis("optimizer.learning_rate", [2e-3, 5e-3, 1e-2]), again)),
            group("r and layers", product(ranks, axis("lora.targets", LAYERS), again)),
            group("Amount of data", product(axis("data.max_examples", [100, 200, 400, 800, 0]), again)),
            group("Source or target", product(axis("data.train_on_source", [False, True]), again)),
        ),
    )


def losses(config: dict[str, Any], steps: Iterable[int]) -> list[float]:
    """Nats at steps of a run of 20: lower with more data and more layers; NF4 < FP4 < Int4; r does nothing."""
    seed = zlib.crc32(repr(sorted(map(repr, config.items()))).encode())
    value = 1.0 + LOSS[config["quant"]["format"]]
    value += 0.1 * ("q_proj" in config["lora"]["targets"]) + 0.02 * config["train"]["seed"] % 0.1
    value += 2.0 / (config["data"]["max_examples"] or 1500)
    return [value + 1.5 * math.exp(-step / 5) + 0.01 * np.random.default_rng(seed + step).normal() for step in steps]


def write(workdir: Path, points: Points, done: int | None = None, failed: int = 3, pack: int = 16) -> Path:
    """A ledger whose first `done` points (all) are done; of every 97 one, up to `failed` in all, has an error."""
    ledger = Ledger(workdir)
    ledger.add(points.points)
    ledger.set_meta(
        {"config_path": "configs/sweeps/<synthetic>.py", "commit": "0123456789abcdef", "groups": points.groups}
    )
    done = len(points.points) if done is None else done
    for first in range(0, done, pack):
        members = points.points[first : min(first + pack, done)]
        hashes = [point.hash for point in members]
        ledger.start(f"pack{first}", hashes, f"node{first // pack % 2}")
        rows, outcomes = [], []
        for number, point in enumerate(members, first):
            curve = losses(point.config, STEPS)
            rows += [Row(point.hash, step, "loss", value) for step, value in zip(STEPS, curve, strict=True)]
            rows.append(Row(point.hash, 20, "eval_loss", curve[-1]))
            result = {"final_eval_loss": curve[-1], "final_train_loss": curve[-1], "steps": 20}
            result["final_eval_accuracy"] = 1 / (1 + result["final_eval_loss"])
            error = f"step {number}: {HOSTILE}" if number % 97 == 1 and number // 97 < failed else None
            outcomes.append(Outcome(point.hash, result, error))
        ledger.finish(outcomes, rows)
    for first in range(done, min(done + pack, len(points.points)), pack):
        hashes = [point.hash for point in points.points[first : first + pack]]
        ledger.start(f"pack{first}", hashes, "node0")
        ledger.log([Row(digest, 1, "loss", 2.5) for digest in hashes])
    ledger.close()
    return workdir
