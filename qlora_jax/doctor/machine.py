"""The machine without JAX: system, Python, memory, disk, and what nvidia-smi says. The standard library alone."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SECONDS = 30.0  # that a program may take to answer
_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
Run = Callable[[Sequence[str]], str]


def run(command: Sequence[str]) -> str:
    """What a program prints. Raises OSError where there is none, RuntimeError with its last words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer within {SECONDS:.0f} s") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise RuntimeError(f"{command[0]}: {words[-1]}")
    return done.stdout


def machine(folder: Path, run: Run = run) -> dict[str, Any]:
    """{"system", "python", "python_path", "cpus", "memory_bytes", "memory_free_bytes", "disk_free_bytes", "gpus",
    "nvidia_smi"}; None for what cannot be told.

    `folder`: whose disk counts. "nvidia_smi": why it gave no GPU, or "".
    """
    total, free = _memory()
    gpus, said = _gpus(run)
    return {
        "system": _system(),
        "python": platform.python_version(),
        "python_path": sys.executable,
        "cpus": _cpus(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "disk_free_bytes": _disk(folder),
        "gpus": gpus,
        "nvidia_smi": said,
    }


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = platform.platform()
    return f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"


def _cpus() -> int | None:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> tuple[int | None, int | None]:
    """Bytes of the machine, and those of them that new work can have."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (OSError, ValueError):
        return None, None


def _disk(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gpus(run: Run) -> tuple[list[dict[str, Any]], str]:
    """What nvidia-smi lists, and why it lists none."""
    try:
        text = run(["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"])
    except OSError:
        return [], "there is no nvidia-smi"
    except RuntimeError as error:
        return [], str(error)
    gpus = [_gpu(line) for line in text.splitlines() if line.strip()]
    return [gpu for gpu in gpus if gpu is not None], "" if any(gpus) else f"nvidia-smi lists no GPU: {text.strip()!r}"


def _gpu(line: str) -> dict[str, Any] | None:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS):
        return None
    name, driver, capability, total, free = cells
    return {
        "name": name,
        "driver": driver,
        "compute_capability": capability,
        "memory_bytes": _mib(total),
        "memory_free_bytes": _mib(free),
    }


def _mib(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None
