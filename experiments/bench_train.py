"""Times real optimizer steps on random weights. Nothing is downloaded.

    python -m experiments.bench_train --config=configs/quickstart.py --steps=5

Nothing is downloaded: a model of the config's sizes is made on the device, already in 4 bits, and trained as the config
says on random tokens, every batch as long as its longest. Prints tokens/s, the share of the device's rate, peak memory
against the plan, and what paging moves and costs. --gpu_bytes holds JAX (and torch) to so much of the GPU.

--torch measures bitsandbytes + PEFT + transformers on the same sizes first, in a process of its own that has ended
before JAX takes the GPU; --torch_python names the Python that has them.

--members=8 also times a pack: so many adapters in one program over the one base, against the single run before it.
"""

import dataclasses
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.bench.packs import MeasuredPack
    from qlora_jax.bench.train import Measured
    from qlora_jax.planning.memory import Phase
    from qlora_jax.planning.utilization import Utilization
    from qlora_jax.train.spec import RunSpec

CONFIG = cli.config_flag()
GPU_BYTES = flags.DEFINE_string("gpu_bytes", None, "Memory that may be taken of the GPU, as 48GiB or 48GB.")
STEPS = flags.DEFINE_integer("steps", 10, "Optimizer steps that are timed.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "Optimizer steps before them.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
TORCH = flags.DEFINE_bool("torch", False, "Also measure bitsandbytes + PEFT + transformers, before JAX starts.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "The Python that has torch.")
TRACE = flags.DEFINE_bool("trace", False, "Also profile one step: what each kernel takes.")
MEMBERS = flags.DEFINE_integer("members", None, "Also time a pack of so many adapters.", lower_bound=1)
flags.DEFINE_alias("gpu-bytes", "gpu_bytes")


def main() -> None:
    from qlora_jax.bench import memory_cap
    from qlora_jax.mesh.axes import Axes
    from qlora_jax.train.checks import check_values
    from qlora_jax.train.spec import read_spec

    cap = None if GPU_BYTES.value is None else memory_cap.parse_bytes(GPU_BYTES.value, "--gpu_bytes")
    gpu_memory = memory_cap.gpu_memory_bytes()
    config = CONFIG.value
    check_values(config, "cpu" if gpu_memory is None else "gpu")
    Axes.of_one(config.mesh, "bench_train times")
    spec = read_spec(config)
    if spec.to_cut.is_open:
        spec = _cut(spec, cap, gpu_memory)
    if MEMBERS.value is not None:
        _check_pack(config, spec)
    if cap is not None and gpu_memory is not None:
        memory_cap.set_cap(cap, gpu_memory, f"--gpu_bytes={GPU_BYTES.value}")
    rival = _torch(spec, cap) if TORCH.value else None

    cap = _applied(cap)
    check_values(config)  # what JAX computes on is known now
    _say_what(spec)
    measured = _measure(spec)
    share, phase = _account(spec, measured)
    report = _report(spec, cap, measured, share, phase, rival)
    print(_table(spec, measured, share, phase))
    if MEMBERS.value is not None:
        pack = _measure_pack(spec, MEMBERS.value)
        report["pack"] = _pack_report(spec, measured, pack)
        print(_pack_line(report["pack"]))
    if "speed_to_torch" in report:
        print(_comparison(report))
    if OUT.value:
        path = Path(OUT.value).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {path}")


def _cut(spec: "RunSpec", cap: int | None, gpu_memory: int | None) -> "RunSpec":
    """As a run on this GPU would cut its batches, under the cap."""
    from qlora_jax.planning.memory import held_bytes
    from qlora_jax.train.cut import choose, described, unasked
    from qlora_jax.train.memory import MEMORY_FRACTION

    limit = None if gpu_memory is None else cap or int(MEMORY_FRACTION * gpu_memory)
    choice = choose(unasked(spec.to_cut), held_bytes(spec), limit)  # torch comes before JAX
    print(f"bench_train: {described(spec.to_cut, choice)}", flush=True)
    return spec.with_cut(choice.cut)


def _torch(spec: "RunSpec", cap: int | None) -> dict[str, Any]:
    from qlora_jax.bench import torch_side

    wanted = torch_side.specification(CONFIG.value, spec, STEPS.value, WARMUP.value, cap)
    print("torch first, in a process of its own; then JAX", flush=True)
    rival = torch_side.run(TORCH_PYTHON.value, wanted)
    if "error" in rival:
        print(f"torch is left out: {rival['error']}", flush=True)
    return rival


def _applied(cap: int | None) -> int | None:
    """The cap, or None where this process computes on no GPU. Raises InputError where JAX does not keep to it."""
    import jax

    from qlora_jax.bench import memory_cap
    from qlora_jax.train.memory import memory_limit

    if cap is None:
        return None
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"--gpu_bytes={GPU_BYTES.value} is not applied: this process computes on {device.device_kind}, no GPU")
        return None
    memory_cap.check_cap(cap, memory_limit(), f"--gpu_bytes={GPU_BYTES.value}")
    return cap


def _say_what(spec: "RunSpec") -> None:
    import jax

    from qlora_jax.train.memory import memory_limit

    limit, batch = memory_limit(), spec.batch
    room = "" if limit is None else f", {limit / 2**30:.2f} GiB of it"
    print(
        f"bench_train: {jax.devices()[0].device_kind}{room}, random weights, {WARMUP.value} + {STEPS.value} steps of "
        f"{batch.G} x {batch.B} sequences of {batch.T} = {batch.tokens:,} tokens",
        flush=True,
    )


def _measure(spec: "RunSpec") -> "Measured":
    from qlora_jax.bench.train import measure

    with tqdm(total=WARMUP.value + STEPS.value, desc="steps", unit="step", leave=False, delay=2) as bar:
        seed = CONFIG.value.train.seed
        return measure(CONFIG.value, spec, STEPS.value, WARMUP.value, bar.update, seed, TRACE.value)


def _check_pack(config: Any, spec: "RunSpec") -> None:
    """Raises InputError, before anything is measured, for what no pack trains."""
    from qlora_jax.packs.pack import refuse_paging, refuse_whole_matrices

    refuse_paging(config.optimizer)
    refuse_whole_matrices(spec.model.lora, config.data)


def _measure_pack(spec: "RunSpec", members: int) -> "MeasuredPack":
    from qlora_jax.bench.packs import measure_pack

    with tqdm(total=WARMUP.value + STEPS.value, desc="steps of the pack", unit="step", leave=False, delay=2) as bar:
        return measure_pack(CONFIG.value, spec, members, STEPS.value, WARMUP.value, bar.update, CONFIG.value.train.seed)


def _pack_report(spec: "RunSpec", single: "Measured", pack: "MeasuredPack") -> dict[str, Any]:
    from qlora_jax.planning.here import gpu_here
    from qlora_jax.planning.pack import plan_pack

    speed = pack.tokens_per_second(spec.batch.tokens)
    return {
        "members": pack.members,
        "over": pack.over,
        "tokens_per_second": speed,
        "step_seconds": statistics.median(pack.step_seconds),
        "speed_to_single_runs": speed / single.tokens_per_second(spec.batch),
        "peak_device_bytes": pack.peak_device_bytes,
        "peak_device_bytes_source": pack.peak_source,
        "planned_device_bytes": plan_pack(CONFIG.value, gpu_here(), pack.members).device_peak_bytes,
        "every_step_seconds": pack.step_seconds,
        "losses": pack.losses,
    }


def _pack_line(pack: dict[str, Any]) -> str:
    return (
        f"pack of {pack['members']} ({pack['over']}): {pack['tokens_per_second']:,.1f} tokens/s, "
        f"{pack['speed_to_single_runs']:.2f}x that of {pack['members']} warm single runs one after the other; peak "
        f"{pack['peak_device_bytes'] / 1e9:.3f} GB, planned {pack['planned_device_bytes'] / 1e9:.3f} GB"
    )


def _account(spec: "RunSpec", measured: "Measured") -> "tuple[Utilization, Phase]":
    """The share of the device's rate, and the larger of the plan's phases that the peak was measured over."""
    from qlora_jax.optim.schedules import make_optimizer, paging
    from qlora_jax.planning.here import gpu_here
    from qlora_jax.planning.memory import plan_memory
    from qlora_jax.planning.utilization import utilization

    here, config = gpu_here(), CONFIG.value
    o = config.optimizer
    run = {"loss_chunk": config.train.loss_chunk, "max_grad_norm": o.max_grad_norm}
    memory = plan_memory(spec, here, make_optimizer(o, config.train.steps), o.page_bytes, paging(o), run)
    seconds = statistics.median(measured.step_seconds)
    # the compiler's figure, on CPUs, is of the gradient
    names = ("gradient", "update") if measured.peak_source == "allocator" else ("gradient",)
    phases = [phase for phase in memory.phases if phase.name in names]
    share = utilization(spec, measured.trainable_params, seconds, here)
    return share, max(phases, key=lambda phase: phase.total)


def _report(
    spec: "RunSpec",
    cap: int | None,
    measured: "Measured",
    share: "Utilization",
    phase: "Phase",
    rival: dict[str, Any] | None,
) -> dict[str, Any]:
    import jax

    from experiments.support import versions
    from qlora_jax.settings import resolved
    from qlora_jax.train.memory import memory_limit

    device = jax.devices()[0]
    speed = measured.tokens_per_second(spec.batch)
    found = {
        "command": shlex.join(["python", "-m", "experiments.bench_train", *sys.argv[1:]]),
        "versions": versions.installed(),
        "platform": device.platform,
        "device": device.device_kind,
        "config": resolved(CONFIG.value),
        "sizes": dataclasses.asdict(spec.model.sizes),
        "batch": {"micro_batches": spec.batch.G, "sequences": spec.batch.B, "length": spec.batch.T},
        "tokens_per_step": spec.batch.tokens,
        "steps": STEPS.value,
        "warmup": WARMUP.value,
        "gpu_bytes": cap,
        "device_limit_bytes": memory_limit(),
        "tokens_per_second": speed,
        "step_seconds": statistics.median(measured.step_seconds),
        "gradient_seconds": statistics.median(measured.gradient_seconds),
        "update_seconds": statistics.median(measured.update_seconds),
        "resident_update_seconds": _median_or_none(measured.resident_update_seconds),
        "utilization": dataclasses.asdict(share),
        "peak_device_bytes": measured.peak_device_bytes,
        "peak_device_bytes_source": measured.peak_source,
        "peak_device_bytes_after": measured.peaks,
        "compiled_gradient_bytes": measured.gradient_bytes,
        "planned_device_bytes": phase.total,
        "planned_phase": {phase.name: phase.bytes},
        "plan_to_measured": phase.total / measured.peak_device_bytes,
        "peak_host_bytes": measured.peak_host_bytes,
        "optimizer_state_bytes": measured.optimizer_bytes,
        "optimizer_pages": measured.pages,
        "optimizer_pages_resident": measured.pages_resident,
        "page_traffic_bytes_each_way": measured.page_traffic_bytes,
        "trainable_params": measured.trainable_params,
        "losses": measured.losses,
        "grad_norms": measured.grad_norms,
        "every_gradient_seconds": measured.gradient_seconds,
        "every_update_seconds": measured.update_seconds,
        "kernel_seconds": measured.kernel_seconds,
        "order": ["torch", "jax"] if rival is not None else ["jax"],
        "torch": rival,
    }
    if rival is not None and "error" not in rival:
        found["speed_to_torch"] = speed / rival["tokens_per_second"]
    return found


def _table(spec: "RunSpec", measured: "Measured", share: "Utilization", phase: "Phase") -> str:
    gradient, update = (statistics.median(s) for s in (measured.gradient_seconds, measured.update_seconds))
    source = {"allocator": "the allocator's peak", "compiler": "of the compiled gradient: a CPU counts no peak"}
    return "\n".join(
        [
            measured.residency,
            _line("tokens/s, of the median step", f"{measured.tokens_per_second(spec.batch):,.1f}"),
            _line("seconds a step, the gradient", f"{gradient:.4f}"),
            _line("seconds a step, the update", f"{update:.4f}"),
            *_paging(measured),
            _line(
                "of the device's rate, model FLOPs",
                f"{share.mfu:.2%}",
                f"MFU; {share.model_flops / 1e12:,.4g} TFLOP a step, 4 a token for a frozen weight",
            ),
            _line(
                "of the device's rate, hardware FLOPs",
                f"{share.hfu:.2%}",
                f"{share.hardware_flops / 1e12:,.4g} TFLOP a step, with what remat repeats",
            ),
            _line("the device's rate", f"{share.flops_per_second / 1e12:,.2f}", f"TFLOP/s, {share.rate_source}"),
            _line(
                "peak on the device", f"{measured.peak_device_bytes / 1e9:.3f} GB", f"{source[measured.peak_source]}"
            ),
            _line(
                "planned for this device",
                f"{phase.total / 1e9:.3f} GB",
                f"{phase.total / measured.peak_device_bytes - 1:+.1%}, while: {phase.name}",
            ),
            f"  loss {measured.losses[0]:.4f} at first, {measured.losses[-1]:.4f} at last",
        ]
    )


def _paging(measured: "Measured") -> list[str]:
    if measured.pages_resident == measured.pages:
        return []
    lines = [_line("pages moved, each way a step", f"{measured.page_traffic_bytes / 1e9:.3f} GB")]
    resident = _median_or_none(measured.resident_update_seconds)
    if resident is None:
        return [*lines, "  an update without paging was not timed: its state does not fit beside the model"]
    step, update = (statistics.median(s) for s in (measured.step_seconds, measured.update_seconds))
    cost = update - resident
    return [
        *lines,
        _line(
            "the update, all state on the device",
            f"{resident:.4f}",
            f"paging costs {cost:+.4f} s, {cost / step:+.1%} of a step",
        ),
    ]


def _line(what: str, value: str, remark: str = "") -> str:
    return f"  {what:<38}{value:>12}" + (f"  ({remark})" if remark else "")


def _comparison(report: dict[str, Any]) -> str:
    rival = report["torch"]
    peak = "" if rival["peak_device_bytes"] is None else f", peak {rival['peak_device_bytes'] / 1e9:.3f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in rival["versions"].items())
    lines = [
        f"torch on {rival['device']} ({versions}; {rival['dtype']}, {rival['optimizer']}): "
        f"{rival['tokens_per_second']:,.1f} tokens/s{peak}",
        f"qlora_jax to torch: {report['speed_to_torch']:.2f}x tokens/s",
    ]
    if rival["trainable_params"] != report["trainable_params"]:
        lines.append(
            f"not the same shape: torch trains {rival['trainable_params']:,} parameters, "
            f"qlora_jax {report['trainable_params']:,}"
        )
    return "\n".join(lines)


def _median_or_none(seconds: tuple[float, ...] | None) -> float | None:
    return None if seconds is None else statistics.median(seconds)


if __name__ == "__main__":
    cli.run(main)
