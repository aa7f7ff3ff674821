"""What follows from what a machine has: problems, each with the command that mends it, and what fits there."""

from typing import Any, NamedTuple

from qlora_jax.doctor.packages import cuda_of, install

# Device bytes of the Guanaco configs on an RTX 4090 at the least, one row of 576 tokens a micro-batch, by
# experiments.plan (docs/memory.md)
GUANACO = {"7b": 5.83e9, "13b": 10.14e9, "33b": 22.31e9, "65b": 42.86e9}
_ROOM = 0.95  # of a GPU's memory, that JAX's allocator may have
_LEAST_DRIVER = {"cuda12": 525, "cuda13": 580}  # CUDA's release notes: the least driver of each major version
_LEAST_PYTHON = (3, 12)


class Problem(NamedTuple):
    """`stops`: whether training cannot run before it is mended."""

    what: str
    command: str
    stops: bool


def problems(machine: dict[str, Any], packages: dict[str, Any], jax: dict[str, Any]) -> list[Problem]:
    """What is wrong, the worst first. Arguments: of machine.machine, packages.packages and devices.devices."""
    found = _python(machine["python"]) + _needed(packages["needed"]) + _imports(jax) + _gpu(machine, packages, jax)
    return sorted(found, key=lambda problem: not problem.stops)


def _python(version: str) -> list[Problem]:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= _LEAST_PYTHON:
        return []
    return [Problem(f"Python {version} is too old, 3.12 or newer is needed", "make test finds or names one", True)]


def _needed(needed: dict[str, str | None]) -> list[Problem]:
    missing = [name for name, version in needed.items() if version is None]
    if not missing:
        return []
    return [Problem(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}", True)]


def _imports(jax: dict[str, Any]) -> list[Problem]:
    if jax.get("crash"):
        command = (
            "pip install --force-reinstall jax jaxlib, or JAX_PLATFORMS=cpu in the environment to go without a GPU"
        )
        return [Problem(jax["crash"], command, True)]
    broken = [(name, error) for name, error in jax.get("imports", {}).items() if error]
    if broken:
        name, error = broken[0]  # the others fail because of it
        package = "jax" if name == "jaxlib" else name.partition(".")[0]
        again = "pip install -e ." if package == "qlora_jax" else f"pip install --force-reinstall {package}"
        return [Problem(f"{name} cannot be imported: {error}", again, True)]
    if jax.get("device_error"):
        return [Problem(f"JAX finds no device: {jax['device_error']}", "JAX_PLATFORMS=cpu goes without a GPU", True)]
    return []


def _gpu(machine: dict[str, Any], packages: dict[str, Any], jax: dict[str, Any]) -> list[Problem]:
    """A GPU that is there and not used trains on the CPU: slow, but it runs."""
    gpus, extra = machine["gpus"], cuda_of(packages["cuda"])
    devices = jax.get("devices", [])
    if any(device["platform"] == "gpu" for device in devices):
        return (
            []
            if packages["extras"]["triton"]["installed"]
            else [
                Problem(
                    "kernels scratch and triton need jax-triton, auto takes xla without it", install("triton"), False
                )
            ]
        )
    if not gpus:
        said = machine["nvidia_smi"]
        driver = said and "no nvidia-smi" not in said
        return [Problem(said, "install or restart the NVIDIA driver", False)] if driver else []
    name, driver = gpus[0]["name"], gpus[0]["driver"]
    wanted = "cuda13" if _major(driver) >= _LEAST_DRIVER["cuda13"] else "cuda12"
    if extra is None:
        return [Problem(f"{name} is not used: JAX has no CUDA here", install(wanted), False)]
    if _major(driver) < _LEAST_DRIVER[extra]:
        what = f"{name} is not used: {extra} needs driver {_LEAST_DRIVER[extra]} or newer, {driver} is there"
        return [Problem(what, f"a newer driver, or {install('cuda12')}", False)]
    if jax.get("crash") or not devices:
        return []
    said = next(iter(jax.get("warnings", [])), "JAX does not say why (is JAX_PLATFORMS set?)")
    return [Problem(f"{name} is not used: {said}", f"pip install --force-reinstall 'jax[{extra}]'", False)]


def _major(driver: str) -> int:
    first = driver.partition(".")[0]
    return int(first) if first.isdigit() else 0


def largest_that_fits(jax: dict[str, Any], machine: dict[str, Any]) -> tuple[str, float] | None:
    """(config, bytes it takes) of the largest Guanaco that trains on the first GPU; None without one, or for none."""
    sizes = [gpu["memory_bytes"] for gpu in machine["gpus"] if gpu["memory_bytes"]]
    sizes += [d["memory_bytes"] / _ROOM for d in jax.get("devices", []) if d["platform"] == "gpu" and d["memory_bytes"]]
    if not sizes:
        return None
    fitting = [(f"configs/guanaco_{name}.py", need) for name, need in GUANACO.items() if need <= _ROOM * sizes[0]]
    return fitting[-1] if fitting else None
