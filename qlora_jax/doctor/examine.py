"""All of it: from the machine to a report, as values and as text."""

from pathlib import Path
from typing import Any

from qlora_jax.doctor import devices, findings, machine, packages
from qlora_jax.doctor.findings import Problem


def examine(folder: Path) -> dict[str, Any]:
    """Everything that is known, as JSON has it; "problems" [{"what", "command", "stops"}], "can_train". Never raises.

    `folder`: whose disk counts.
    """
    return report(machine.machine(folder), packages.packages(), devices.devices())


def report(machine: dict[str, Any], packages: dict[str, Any], jax: dict[str, Any]) -> dict[str, Any]:
    """Arguments: of the three functions of these names."""
    found = findings.problems(machine, packages, jax)
    fits = findings.largest_that_fits(jax, machine)
    return {
        "can_train": not any(problem.stops for problem in found),
        "problems": [problem._asdict() for problem in found],
        "machine": machine,
        "packages": packages,
        "jax": jax,
        "largest_config": None if fits is None else fits[0],
    }


def text(report: dict[str, Any]) -> str:
    """For a terminal."""
    machine, packages, jax = report["machine"], report["packages"], report["jax"]
    lines = [
        _line("system", machine["system"]),
        _line("python", f"{machine['python']} ({machine['python_path']})"),
        _line("jax", _versions(packages["needed"])),
        _line("host", f"{machine['cpus'] or '?'} CPUs, memory {_gib(machine['memory_free_bytes'])} free of "
              f"{_gib(machine['memory_bytes'])}, disk {_gib(machine['disk_free_bytes'])} free"),
        *(_line("device", _device(device)) for device in jax.get("devices", [])),
        *(_line("gpu", _gpu(gpu)) for gpu in machine["gpus"]),
    ]  # fmt: skip
    if not machine["gpus"]:
        lines.append(_line("gpu", f"none ({machine['nvidia_smi']})"))
    cuda = packages["cuda"]
    shown = [f"{name} {version}" for name, version in cuda.items() if name.startswith("jax-cuda")]
    others = len(cuda) - len(shown)
    lines.append(_line("cuda", ", ".join(shown + ([f"{others} nvidia packages"] if others else [])) or "not installed"))
    lines += _kernel_lines(jax)
    extras = packages["extras"]
    lines.append(_line("extras", ", ".join(name for name, extra in extras.items() if extra["installed"]) or "none"))
    lines += [
        _line("", f"without {name} ({extra['for']}): {extra['install']}")
        for name, extra in extras.items()
        if not extra["installed"]
    ]
    if report["largest_config"]:
        lines.append(
            _line("fits", f"{report['largest_config']} is the largest Guanaco that trains on this GPU, by plan")
        )
    lines += [_problem(Problem(**problem)) for problem in report["problems"]]
    lines.append("training can run here" if report["can_train"] else "training cannot run here")
    return "\n".join(lines)


def _kernel_lines(jax: dict[str, Any]) -> list[str]:
    kernels = jax.get("kernels")
    if kernels is None:
        return [_line("kernels", jax["kernel_error"])] if jax.get("kernel_error") else []
    if not kernels["table"]:
        return [_line("kernels", "auto takes xla for training and for generation (no tuned table for this device)")]
    parts = []
    for use in ("training", "generation"):
        counts = kernels[use]
        chosen = ", ".join(f"{backend} for {count} products" for backend, count in counts.items())
        parts.append(f"{use}: {chosen + ', xla for the others' if chosen else 'xla'}")
    return [_line("kernels", f"auto by tuned/{kernels['table']}: {'; '.join(parts)}")]


def _problem(problem: Problem) -> str:
    return f"{'problem' if problem.stops else 'advice'}: {problem.what}; mend it: {problem.command}"


def _line(name: str, text: str) -> str:
    return f"{name:9}{text}"


def _versions(needed: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {needed[name] or 'not installed'}" for name in ("jax", "jaxlib", "flax"))


def _device(device: dict[str, Any]) -> str:
    memory = f", memory {_gib(device['memory_free_bytes'])} free" if device["memory_bytes"] else ""
    return f"{device['kind']} ({device['platform']}){memory}"


def _gpu(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, driver {gpu['driver']}, compute capability {gpu['compute_capability']}, memory "
        f"{_gib(gpu['memory_free_bytes'])} free of {_gib(gpu['memory_bytes'])}"
    )


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:,.1f} GiB"
