"""Says whether a run fits a GPU and how fast it is there, on any machine. It needs the extra `plan`.

    python -m experiments.plan --config=configs/guanaco_7b.py --gpu=rtx4090

--model=NAME stands in place of --config, as in train; without --data its rows have 1,024 tokens.

Compiles the config's real training programs for a GPU that is not here, from the model's sizes alone: no weights and no
GPU are needed, and data only where data.max_source_len or data.max_target_len is 0, which makes rows as long as its
longest. Prints device memory by kind, host memory, and the least time of a step; and, where it does not fit, the
smallest change that does. --gpu=here plans for this machine's own device; with --workdir it is held against what a
finished run there has measured. For several cards of one machine: --config.mesh.devices=2 (or mesh.data, mesh.fsdp);
--mesh then lists how each array is divided.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.support import cli
from experiments.support.run_flags import run_flags

if TYPE_CHECKING:
    from qlora_jax.planning.gpus import PlannedGpu

RUN = run_flags()
GPU = flags.DEFINE_list("gpu", None, "One or more of the known GPUs (a wrong name lists them), or here.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write (with several GPUs: a list).")
WORKDIR = flags.DEFINE_string("workdir", None, "With --gpu=here: a finished run of this config, to compare with.")
LONGEST = flags.DEFINE_bool("longest_context", False, "Find the longest sequence that fits instead, one a step.")
MESH = flags.DEFINE_bool("mesh", False, "Also list how each array is divided among the devices of config.mesh.")
ADVISE = flags.DEFINE_bool("advise", True, "Where it does not fit, look for the smallest change that does.")


def main() -> None:
    import jax

    here = GPU.value == ["here"]
    if not here:  # what is compiled for is not what is here, and a GPU's memory is left to who trains on it
        jax.config.update("jax_platforms", "cpu")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA's scheduler calls a program over four fifths of a card an error
    from qlora_jax.api.recipe import fill_for_plan
    from qlora_jax.errors import InputError
    from qlora_jax.planning.describe import mesh_table, table
    from qlora_jax.planning.gpus import planned_gpu
    from qlora_jax.planning.here import gpu_here
    from qlora_jax.planning.plan import make_plan
    from qlora_jax.train.spec import read_sizes

    if WORKDIR.value and not here:
        raise InputError("--workdir compares with a run on this machine: it goes with --gpu=here alone")
    if "here" in GPU.value and not here:
        raise InputError("--gpu=here stands alone: this machine's device is not compiled for as the others are")
    config, given = RUN.read(needs_data=False)
    if not RUN.has_file():
        fill_for_plan(config, read_sizes(config), given, print)
    measured = _measured(config, Path(WORKDIR.value)) if WORKDIR.value else None
    length = None if measured is None else measured.length
    gpus = {"here": gpu_here()} if here else {name: planned_gpu(name) for name in GPU.value}
    plans = []
    for name, gpu in gpus.items():
        if LONGEST.value:
            plans.append(_longest(config, name, gpu))
            continue
        plan = make_plan(config, gpu, lambda line: print(f"plan: {line}", flush=True), ADVISE.value, length)
        plans.append(plan.to_json(name))
        print(table(plan))
        if MESH.value:
            print(mesh_table(plan))
    if measured is not None:
        plans[0] |= _compare(plans[0]["device_peak_bytes"], measured.peak_bytes)
    if OUT.value:
        path = Path(OUT.value).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plans if len(plans) > 1 else plans[0], indent=1) + "\n")
        print(f"written: {path}")


def _longest(config: Any, name: str, gpu: "PlannedGpu") -> dict[str, Any]:
    from qlora_jax.planning.describe import table
    from qlora_jax.planning.longest import longest_context

    found = longest_context(config, gpu, lambda line: print(f"plan: {line}", flush=True))
    print(table(found.plan))
    beyond = "no longer one was tried" if found.too_long is None else f"{found.too_long:,} do not fit"
    print(f"longest context: {found.tokens:,} tokens ({beyond})")
    return found.plan.to_json(name) | {"longest_context": found.tokens, "too_long": found.too_long}


class Measured(NamedTuple):
    """What a finished run says of itself."""

    peak_bytes: int
    length: int  # tokens of its longest row


def _measured(config: Any, workdir: Path) -> Measured:
    from qlora_jax.errors import InputError
    from qlora_jax.models.config import read_json
    from qlora_jax.settings import differing_keys, resolved

    if not (workdir / "summary.json").is_file():
        raise InputError(f"--workdir={workdir}: no summary.json there; give the workdir of a finished run")
    differing = differing_keys(read_json(workdir / "config.json"), resolved(config))
    if differing:
        raise InputError(f"--workdir={workdir} is a run of another config: {'; '.join(differing[:5])}")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = max(row["tokens"] for row in rows if "tokens" in row)
    return Measured(read_json(workdir / "summary.json")["peak_device_bytes"], tokens // config.train.batch_size)


def _compare(planned: int, measured: int) -> dict[str, Any]:
    from qlora_jax.planning.describe import both

    print(f"the run measured {both(measured)}, the plan is {planned / measured - 1:+.1%} off")
    return {"measured_peak_bytes": measured, "plan_to_measured": planned / measured}


if __name__ == "__main__":
    cli.run(main)
