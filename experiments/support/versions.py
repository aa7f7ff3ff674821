"""What a measurement ran on, for the files that keep it."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence

from qlora_jax.config_file import REPOSITORY

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin", "bitsandbytes")


def installed(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions by package (PACKAGES and `more`), of Python and of the NVIDIA driver; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"driver": _driver()}


def commit() -> str | None:
    """The code's git commit, with "+changes" where files differ from it; None where it is not in git."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
