"""Finetunes a model in 4 bits. Run again with the same flags, it goes on.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/first

Run again with the same flags it goes on from its newest whole checkpoint, if data and weights are what they were. The
workdir gets config.json, inputs.json, metrics.jsonl, checkpoints/, adapter/ (a PEFT folder) and summary.json.
"""

import time
from pathlib import Path

from absl import flags

from experiments.support import cli
from experiments.support.command import this_command
from experiments.support.finished import finished

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one folder, one config.", required=True)


def main() -> int:
    from qlora_jax.settings import resolved
    from qlora_jax.train.loop import Stopped, finetune
    from qlora_jax.train.memory import out_of_memory_said

    begun, workdir = time.perf_counter(), Path(WORKDIR.value)
    try:
        with out_of_memory_said():
            summary = finetune(CONFIG.value, resolved(CONFIG.value), workdir)
    except Stopped as stopped:
        print(f"{stopped}:\n  {this_command()}")
        return 143  # 128 + SIGTERM
    print(finished(CONFIG.value, workdir, summary, time.perf_counter() - begun))
    return 0


if __name__ == "__main__":
    cli.run(main)
