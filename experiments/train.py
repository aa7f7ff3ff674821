"""Finetunes a model in 4 bits: python -m experiments.train --config=configs/alpaca.py --config.model.path=DIR
--workdir=RUN

Run again with the same flags it goes on from its newest whole checkpoint, if data and weights are what they were. The
workdir gets config.json, inputs.json, metrics.jsonl, checkpoints/, adapter/ (a PEFT folder) and summary.json.
"""

import json
from pathlib import Path

from absl import flags

from experiments.support import cli

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one folder, one config.", required=True)


def main() -> int:
    from qlora_jax.settings import resolved
    from qlora_jax.train.loop import Stopped, finetune
    from qlora_jax.train.memory import out_of_memory_said

    workdir = Path(WORKDIR.value)
    try:
        with out_of_memory_said():
            summary = finetune(CONFIG.value, resolved(CONFIG.value), workdir)
    except Stopped as stopped:
        print(stopped)
        return 143  # 128 + SIGTERM
    print(json.dumps(summary, indent=2))
    print(f"written: {workdir}/adapter (PEFT), {workdir}/metrics.jsonl, {workdir}/summary.json")
    return 0


if __name__ == "__main__":
    cli.run(main)
