"""Finetunes a model in 4 bits. Run again with the same flags, it goes on.

    python -m experiments.train --model=quickstart --data=quickstart

--config=FILE stands in place of --model and --data, and needs --workdir.

Without --config format, packing, batch and steps follow from model and data; --config.lora.rank=16 sets a key.
Without --workdir the run is in runs/MODEL-DATA, or, where that holds another run, in the next number.
Run again with the same flags it goes on from its newest whole checkpoint, if data and weights are what they were. The
workdir gets config.json, inputs.json, metrics.jsonl, checkpoints/, adapter/ (a PEFT folder) and summary.json.
"""

import time
from pathlib import Path

from absl import flags

from experiments.support import cli
from experiments.support.command import this_command
from experiments.support.finished import finished
from experiments.support.run_flags import run_flags
from experiments.support.watched import watched

RUN = run_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one folder, one config. Needed with --config.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of processes that train one model: HOST:PORT of the first.")
PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many they are.")
PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which of them this is, from 0.")
CLUSTER = flags.DEFINE_bool("cluster", False, "Join the processes that srun or mpirun started, one a node.")


def main() -> int:
    """Trains; as one of several processes, in a child that is watched."""
    if not _is_one_of_several():
        return train()
    from qlora_jax.mesh.failures import lost, told

    def joined() -> int:
        _join()
        with told():
            return train()
        raise AssertionError("a run that failed has ended")

    return watched(joined, lost)


def train() -> int:
    from qlora_jax.api.folders import choose_workdir
    from qlora_jax.errors import InputError
    from qlora_jax.mesh.processes import are_several, is_first
    from qlora_jax.settings import resolved
    from qlora_jax.train.loop import Stopped, finetune
    from qlora_jax.train.memory import out_of_memory_said

    begun = time.perf_counter()
    config, given = RUN.read(needs_data=True)
    if WORKDIR.value is None and RUN.has_file():
        raise InputError("missing flag --workdir=... (--help says more)")
    RUN.fill(config, given, print)
    plain = resolved(config)
    workdir = Path(WORKDIR.value) if WORKDIR.value is not None else choose_workdir(config, plain)
    if WORKDIR.value is None:
        print(f"run: {workdir}")
    try:
        with out_of_memory_said():
            summary = finetune(config, plain, workdir)
    except Stopped as stopped:
        if is_first():
            print(f"{stopped}:\n  {this_command()}")
        return 0 if are_several() else 143  # 128 + SIGTERM; a launcher would take it for one of many that failed
    if is_first():
        print(finished(config, workdir, summary, time.perf_counter() - begun))
    return 0


def _is_one_of_several() -> bool:
    """Whether the flags say that other processes train with this one."""
    from qlora_jax.errors import InputError

    given = [flag is not None for flag in (COORDINATOR.value, PROCESSES.value, PROCESS.value)]
    if any(given) and not all(given):
        raise InputError("--coordinator, --processes and --process go together: who trains, and which of them this is")
    if CLUSTER.value and any(given):
        raise InputError("--cluster asks the launcher for what --coordinator, --processes and --process say: give one")
    return CLUSTER.value or all(given)


def _join() -> None:
    """Meets the others."""
    from qlora_jax.mesh.processes import start

    start(COORDINATOR.value, PROCESSES.value, PROCESS.value)


if __name__ == "__main__":
    cli.run(main)
