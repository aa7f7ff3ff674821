"""What a sweep's workers run: packs of adapters on one frozen base (train/pack), warm from pack to pack."""

from pathlib import Path
from typing import Any

from qlora_jax.sweep.engine import OnRow, RunPack, Trained


def make_runner() -> RunPack:
    """Imports JAX: call it in the process that is to train."""
    from qlora_jax.train.pack import PackRunner

    runner = PackRunner()

    def run(configs: list[dict[str, Any]], folder: Path, on_row: OnRow) -> list[Trained]:
        members = runner.train(configs, folder, lambda line: None, on_row)
        return [Trained(member.result, member.error) for member in members]

    return run
