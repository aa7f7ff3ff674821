"""Writes constraints.txt: the exact versions of this environment's packages, and of the CUDA extras' packages.

The CUDA packages need not be installed (they are gigabytes): pip resolves them from their metadata alone.
Versions only, no addresses: an index is the business of the machine that installs.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "constraints.txt"
CUDA_EXTRAS = ("cuda13", "cuda12")
# pip itself and what builds packages are chosen by the machine that installs
NOT_PINNED = {"pip", "setuptools", "wheel", "qlora_jax"}


def pip(*arguments: str) -> list[dict]:
    result = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"pip {arguments[0]} failed; {TARGET.name} is left as it was")
    found = json.loads(result.stdout)
    return found["install"] if isinstance(found, dict) else found


def installed_versions() -> dict[str, str]:
    packages = pip("list", "--format=json", "--disable-pip-version-check")
    return {p["name"]: p["version"] for p in packages if p["name"] not in NOT_PINNED}


def cuda_versions(extra: str, pinned: dict[str, str]) -> dict[str, str]:
    """What `jax[extra]` needs beyond `pinned`, at the versions that fit it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={number}\n" for name, number in pinned.items())
        constraints.flush()
        options = ("-qq", "--dry-run", "--ignore-installed", "--report", "-", "-c", constraints.name)
        packages = pip("install", *options, f"jax[{extra}]=={version('jax')}")
    found = {p["metadata"]["name"]: p["metadata"]["version"] for p in packages}
    return {name: number for name, number in found.items() if name not in pinned}


def main() -> None:
    installed = installed_versions()
    cuda = {name: v for extra in CUDA_EXTRAS for name, v in cuda_versions(extra, installed).items()}
    lines = [f"# Exact versions that the tests passed with (Python {sys.version_info[0]}.{sys.version_info[1]}, "]
    lines[0] += f"{sys.platform}); made by `make constraints`."
    lines += sorted((f"{name}=={number}" for name, number in installed.items()), key=str.lower)
    lines += ["# The extras " + " and ".join(CUDA_EXTRAS)]
    lines += sorted((f"{name}=={number}" for name, number in cuda.items()), key=str.lower)
    TARGET.write_text("\n".join(lines) + "\n")
    print(f"{TARGET.name}: {len(installed)} packages, and {len(cuda)} of the CUDA extras")


if __name__ == "__main__":
    main()
