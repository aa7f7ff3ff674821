"""What a sweep's workers run: packs of adapters on one frozen base (packs/pack), warm from pack to pack."""

import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qlora_jax.sweep.engine import OnRow, RunPack, Trained


def make_runner(keep_adapters: bool = False) -> RunPack:
    """Imports JAX: call it in the process that is to train.

    A pack that is to write checkpoints before its end keeps them in its folder, and goes on from them; they are deleted
    at its end. With `keep_adapters` members/HASH/ there is the folder of each run, PEFT adapter included.
    """
    from qlora_jax.packs.pack import PackRunner

    runner = PackRunner()

    def run(plains: list[dict[str, Any]], folder: Path, on_row: OnRow) -> list[Trained]:
        configs = [ConfigDict(plain) for plain in plains]
        saves = any(plain["train"]["checkpoint_every"] < plain["train"]["steps"] for plain in plains)
        where = folder if saves or keep_adapters else None
        members = runner.train(configs, where, lambda line: None, on_row, keep_adapters)
        if where is not None:
            shutil.rmtree(where / "checkpoints" if keep_adapters else where, ignore_errors=True)
        return [
            Trained(member.summary, None if member.status == "done" else member.reason or member.status)
            for member in members
        ]

    return run
