"""What packs are worth, measured: against one process a run, and against a warm loop in one process.

A sample of one pack's points is trained three ways, each in new processes with one thread of a CPU each:

    one process a run   `workers` at a time; start, loading and compilation included, as a shell loop over `train` pays
    warm loop           in one process, one by one; each point once before, so that nothing is compiled or loaded
    pack                in one process, all at once; likewise once before
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.sweep.cluster import ONE_THREAD
from qlora_jax.sweep.packs import Pack


def compare(packs: Sequence[Pack], count: int, models_per_minute: float | None, workers: int) -> list[str]:
    """Lines with the figures and both ratios.

    Args:
      packs: of the sweep; the sample is the first `count` points of the largest.
      models_per_minute: of the sweep that has just run, all included; None where none has.
    Raises:
      InputError: a sample that does not train.
    """
    configs = max(packs, key=lambda pack: len(pack.points)).configs[:count]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_measure, Path(folder) / str(at), "train", [plain]) for at, plain in enumerate(configs)]
            for job in jobs:
                job.result()
        single = 60 * len(configs) / (time.perf_counter() - begun)
        warm = {how: 60 * len(configs) / _measure(Path(folder) / how, how, configs) for how in ("loop", "pack")}
    lines = [
        f"measured on {len(configs)} points of one pack:",
        f"  one process a run, {workers} at a time, all included: {single:.3g} models a minute",
        f"  warm, in one process of one thread: one by one {warm['loop']:.3g}, as a pack {warm['pack']:.3g} models a "
        f"minute: {warm['pack'] / warm['loop']:.2f} times",
    ]
    if models_per_minute:
        ratio = models_per_minute / single
        lines.append(f"  this sweep, all included: {models_per_minute:.3g} models a minute: {ratio:.3g} times")
    return lines


def _measure(folder: Path, how: str, configs: list[dict[str, Any]]) -> float:
    """Seconds that a new process states."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(configs))
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "qlora_jax.sweep.compare", how, str(folder)]
    done = subprocess.run(command, env=environment | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"--compare_single: a run of the sample failed: {reason}")
    return float(done.stdout.strip().splitlines()[-1])


def _main(how: str, folder: Path) -> None:
    from ml_collections import ConfigDict

    configs = [ConfigDict(plain) for plain in json.loads((folder / "configs.json").read_text())]
    if how == "train":
        from qlora_jax.settings import resolved
        from qlora_jax.train.loop import finetune

        finetune(configs[0], resolved(configs[0]), folder / "run", lambda line: None)
        print(0.0)  # its caller's clock counts
        return
    from qlora_jax.packs.pack import PackRunner

    runner = PackRunner()
    packs = [configs] if how == "pack" else [[config] for config in configs]
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        for pack in packs:
            runner.train(pack, None, lambda line: None, lambda member, row: None)
        seconds = time.perf_counter() - begun
    print(seconds)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
