"""What a measurement ran on, for the files that keep it."""

import importlib.metadata
import platform
import subprocess

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin", "bitsandbytes")


def installed() -> dict[str, str | None]:
    """Versions by package, of Python and of the NVIDIA driver; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"driver": _driver()}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
