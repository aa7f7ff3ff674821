"""What is installed: versions as the packages' metadata has them, nothing is imported."""

import importlib.metadata
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any

NEEDED = (
    "absl-py", "ml_collections", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers",
    "safetensors", "grain",
)  # fmt: skip
# extra of setup.cfg -> (what it is for, what it installs; a test compares them with setup.cfg)
EXTRAS = {
    "plan": (
        "plans for GPUs that are not here",
        ("jax-cuda13-plugin>=0.11.2,<0.12", "nvidia-cuda-nvcc>=13.0.48", "nvidia-nvvm>=13.0.48"),
    ),
    "triton": ("the kernels scratch and triton", ("jax-triton>=0.4.1,<0.5", "triton>=3.6,<3.10")),
    "eval": ("EleutherAI's harness", ("lm_eval>=0.4.12,<0.5",)),
    "sweep": ("sweeps over GPUs and machines", ("optuna", "ray[tune]")),
    "sentencepiece": ("tokenizer.model files", ("sentencepiece",)),
    "tensorboard": ("a logger", ("tensorboardX",)),
    "wandb": ("a logger", ("wandb",)),
    "mlflow": ("a logger", ("mlflow",)),
}
CUDA = {"cuda13": "jax[cuda13]>=0.11.2,<0.12", "cuda12": "jax[cuda12]>=0.11.2,<0.12"}
_CUDA = ("jax-cuda{}-plugin", "jax-cuda{}-pjrt")
_CUDA_NAMES = ("jax-cuda12", "jax-cuda13", "nvidia-")
Version = Callable[[str], str | None]


def version(name: str) -> str | None:
    """Of an installed package, None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(extra: str) -> str:
    """The command that installs what an extra brings, wherever the project came from."""
    parts = (CUDA[extra],) if extra in CUDA else EXTRAS[extra][1]
    return f"pip install {' '.join(map(shlex.quote, parts))}"


def packages(version: Version = version, names: Iterable[str] | None = None) -> dict[str, Any]:
    """{"needed": {package: version or None}, "extras": {extra: {"installed", "missing", "for", "install"}}, "cuda":
    {package: version}}.

    `names`: of all installed packages, to find CUDA's among them; asked of the environment by default.
    """
    extras = {}
    for extra, (purpose, parts) in EXTRAS.items():
        missing = [name for name in map(name_of, parts) if version(name) is None]
        extras[extra] = {
            "installed": not missing,
            "missing": missing,
            "for": purpose,
            "install": install(extra) if missing else None,
        }
    found = sorted({name.lower().replace("_", "-") for name in (_installed() if names is None else names)})
    return {
        "needed": {name: version(name) for name in NEEDED},
        "extras": extras,
        "cuda": {name: version(name) for name in found if name.startswith(_CUDA_NAMES)},
    }


def name_of(requirement: str) -> str:
    """ "ray[tune]" and "ray>=2" -> "ray"."""
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]


def cuda_of(cuda: dict[str, str | None]) -> str | None:
    """The extra ("cuda12" or "cuda13") whose JAX plugin and CUDA libraries are all installed; None for none.

    The plugin alone, as the extra `plan` brings it, compiles for GPUs and runs on none.
    """
    for number in ("13", "12"):
        parts = [part.format(number) in cuda for part in _CUDA]
        if all(parts) and any(name.startswith(("nvidia-cublas", "nvidia-cuda-runtime")) for name in cuda):
            return f"cuda{number}"
    return None


def _installed() -> list[str]:
    names = []
    for found in importlib.metadata.distributions():
        try:
            names.append(found.metadata["Name"] or "")
        except Exception:  # a folder of metadata that is damaged
            continue
    return names
