"""Says whether a config fits a GPU and how fast it is there, on any machine. It needs the extra `plan`.

    python -m experiments.plan --config=configs/guanaco_7b.py --gpu=rtx4090

Compiles the config's real training programs for a GPU that is not here, from the model's sizes alone: no weights and no
GPU are needed, and data only where data.max_source_len or data.max_target_len is 0, which makes rows as long as its
longest. Prints device memory by kind, host memory, and the least time of a step; and, where it does not fit, the
smallest change that does. --gpu=here plans for this machine's own device; with --workdir it is held against what a
finished run there has measured.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.plan.gpus import PlannedGpu
    from qlora_jax.plan.plan import Plan

CONFIG = cli.config_flag()
GPU = flags.DEFINE_list("gpu", None, "One or more of the known GPUs (a wrong name lists them), or here.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file to write (with several GPUs: a list).")
WORKDIR = flags.DEFINE_string("workdir", None, "With --gpu=here: a finished run of this config, to compare with.")
LONGEST = flags.DEFINE_bool("longest_context", False, "Find the longest sequence that fits instead, one a step.")
ADVISE = flags.DEFINE_bool("advise", True, "Where it does not fit, look for the smallest change that does.")

LABELS = {
    "codes": "base: 4-bit codes",
    "scales": "base: scales",
    "linear_16bit": "base: linear layers, not quantized",
    "embeddings_and_head": "base: embeddings and head",
    "norms": "base: norms",
    "adapters": "adapters",
    "modules_to_save": "embedding and head that train",
    "gradients": "gradients",
    "optimizer": "optimizer state on the device",
    "block_inputs": "block inputs (remat)",
    "temporaries": "XLA's temporaries",
}


def main() -> None:
    import jax

    here = GPU.value == ["here"]
    if not here:  # what is compiled for is not what is here, and a GPU's memory is left to who trains on it
        jax.config.update("jax_platforms", "cpu")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA's scheduler calls a program over four fifths of a card an error
    from qlora_jax.errors import InputError
    from qlora_jax.plan.gpus import planned_gpu
    from qlora_jax.plan.here import gpu_here
    from qlora_jax.plan.plan import make_plan

    if WORKDIR.value and not here:
        raise InputError("--workdir compares with a run on this machine: it goes with --gpu=here alone")
    if "here" in GPU.value and not here:
        raise InputError("--gpu=here stands alone: this machine's device is not compiled for as the others are")
    measured = _measured(Path(WORKDIR.value)) if WORKDIR.value else None
    length = None if measured is None else measured.length
    gpus = {"here": gpu_here()} if here else {name: planned_gpu(name) for name in GPU.value}
    plans = []
    for name, gpu in gpus.items():
        if LONGEST.value:
            plans.append(_longest(name, gpu))
            continue
        plan = make_plan(CONFIG.value, gpu, lambda line: print(f"plan: {line}", flush=True), ADVISE.value, length)
        plans.append(plan.to_json(name))
        print(table(plan))
    if measured is not None:
        plans[0] |= _compare(plans[0]["device_peak_bytes"], measured.peak_bytes)
    if OUT.value:
        path = Path(OUT.value).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plans if len(plans) > 1 else plans[0], indent=1) + "\n")
        print(f"written: {path}")


def _longest(name: str, gpu: "PlannedGpu") -> dict[str, Any]:
    from qlora_jax.plan.longest import longest_context

    found = longest_context(CONFIG.value, gpu, lambda line: print(f"plan: {line}", flush=True))
    print(table(found.plan))
    beyond = "no longer one was tried" if found.too_long is None else f"{found.too_long:,} do not fit"
    print(f"longest context: {found.tokens:,} tokens ({beyond})")
    return found.plan.to_json(name) | {"longest_context": found.tokens, "too_long": found.too_long}


def table(plan: "Plan") -> str:
    """The plan as a person reads it. GB is 10^9 bytes, GiB 2^30."""
    from qlora_jax.plan.memory import usable_bytes
    from qlora_jax.plan.plan import EFFICIENCIES

    memory, batch, peak = plan.memory, plan.spec.batch, plan.memory.peak
    scale, unit = (1e9, "GB") if peak.total >= 1e9 else (1e6, "MB")

    def row(label: str, size: int, more: str = "") -> str:
        return f"  {label:<36}{size / scale:>9.3f} {unit}{more}"

    pages = f" in {len(memory.resident)} pages, {sum(memory.resident)} of them on the device"
    lines = [f"{plan.gpu.device_kind}: {_both(plan.gpu.memory_bytes)}", ""]
    lines += [row(LABELS[kind], size) for kind, size in peak.bytes.items()]
    lines += [
        row(f"peak on the device, while: {peak.name}", peak.total),
        "  " + ", ".join(f"{phase.name} {phase.total / scale:.3f}" for phase in memory.phases) + f" {unit}",
        row("of which a run may take", usable_bytes(plan.gpu)),
        "",
        row("pinned host memory", memory.pinned_host_bytes),
        row("host memory at the peak of loading", memory.load_host_peak_bytes),
        row("optimizer state", memory.optimizer_bytes, pages),
        "",
        f"  a step: {batch.G} x {batch.B} sequences of {batch.T} = {batch.tokens:,} tokens, "
        f"{plan.time.flops / 1e12:,.2f} TFLOP,",
        f"  {plan.time.bytes / 1e9:,.2f} GB of device memory moved, {plan.time.bus_bytes / 1e9:,.3f} GB each way over "
        "the bus",
        f"  roofline {plan.time.seconds:.3g} s; tokens/s at "
        + ", ".join(f"{share:.0%}: {share * batch.tokens / plan.time.seconds:,.0f}" for share in EFFICIENCIES),
        "",
    ]
    if plan.fits:
        room = usable_bytes(plan.gpu) - peak.total
        lines.append(f"it fits, with {_both(room)} to spare")
    else:
        short = peak.total - usable_bytes(plan.gpu)
        lines.append(f"it does not fit: {_both(short)} short")
        if memory.held_bytes > usable_bytes(plan.gpu):
            lines.append(
                f"  base, adapters and gradients alone take {_both(memory.held_bytes)}: take a larger card, a smaller "
                "model or a smaller lora.rank"
            )
        lines += [f"  nor with {change}" for change in plan.tried]
        if plan.change is not None:
            lines.append(f"  it fits with {plan.change}")
    return "\n".join(lines)


def _both(size: int) -> str:
    if size < 1e9:
        return f"{size / 1e6:.2f} MB ({size / 2**20:.2f} MiB)"
    return f"{size / 1e9:.2f} GB ({size / 2**30:.2f} GiB)"


class Measured(NamedTuple):
    """What a finished run says of itself."""

    peak_bytes: int
    length: int  # tokens of its longest row


def _measured(workdir: Path) -> Measured:
    from qlora_jax.errors import InputError
    from qlora_jax.models.config import read_json
    from qlora_jax.settings import differing_keys, resolved

    if not (workdir / "summary.json").is_file():
        raise InputError(f"--workdir={workdir}: no summary.json there; give the workdir of a finished run")
    differing = differing_keys(read_json(workdir / "config.json"), resolved(CONFIG.value))
    if differing:
        raise InputError(f"--workdir={workdir} is a run of another config: {'; '.join(differing[:5])}")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = max(row["tokens"] for row in rows if "tokens" in row)
    return Measured(read_json(workdir / "summary.json")["peak_device_bytes"], tokens // CONFIG.value.train.batch_size)


def _compare(planned: int, measured: int) -> dict[str, Any]:
    print(f"the run measured {_both(measured)}, the plan is {planned / measured - 1:+.1%} off")
    return {"measured_peak_bytes": measured, "plan_to_measured": planned / measured}


if __name__ == "__main__":
    cli.run(main)
