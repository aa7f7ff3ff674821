"""The GPU that programs are for, and Triton for it: what launchers of kernels share.

Nothing here imports Triton before a kernel is really called, so that every other path works without it.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import jax


class Gpu(NamedTuple):
    """What the choice of tiles depends on."""

    name: str  # JAX's device_kind
    compute_capability: int  # 80, 86, 89, 90, ...
    cores: int  # streaming multiprocessors


# bytes of shared memory that a program may take, by compute capability
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# compute capabilities of GPUs that programs are lowered for where there is none: the abstract device has only a name
CAPABILITIES = {
    "A100": 80,
    "A6000": 86,
    "RTX 3090": 86,
    "RTX 4090": 89,
    "L40": 89,
    "H100": 90,
    "H200": 90,
    "A10": 86,
    "B200": 100,
    "RTX 5090": 120,
}


def current_gpu(backend: str = "triton") -> Gpu:
    """The GPU that programs are traced for: the abstract mesh's, or this process's first.

    Raises RuntimeError, which names the backend, where there is none, or one before compute capability 8.0.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores is not None:
        known = [capability for name, capability in CAPABILITIES.items() if name in abstract.device_kind]
        if not known:
            raise RuntimeError(f"{abstract.device_kind} is none of {', '.join(CAPABILITIES)}, which can be lowered for")
        return Gpu(abstract.device_kind, known[0], abstract.num_cores)
    device: Any = jax.devices()[0]
    needs = f'backend "{backend}" needs'
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        raise RuntimeError(f"{needs} an NVIDIA GPU, this process computes on {device.device_kind}")
    capability = int(float(device.compute_capability) * 10 + 0.5)
    if capability < 80:
        raise RuntimeError(f"{needs} compute capability 8.0, {device.device_kind} has {capability / 10}")
    return Gpu(device.device_kind, capability, device.core_count)


def load_jax_triton(backend: str) -> ModuleType:
    """The module jax_triton. Raises ImportError, which names the backend, where it or Triton is missing."""
    try:
        driver = importlib.import_module("triton.backends.nvidia.driver")
        if not hasattr(driver, "TMA_TF32"):
            # Triton 3.6: jax-triton 0.4 imports this name for tensor descriptors, which are not used here, and without
            # it would take Triton's whole NVIDIA backend for missing
            vars(driver)["TMA_TF32"] = 11
        return importlib.import_module("jax_triton")
    except ImportError as error:
        raise ImportError(f'backend "{backend}" needs jax-triton ({error}): pip install jax-triton==0.4.1') from error


def device_kind() -> str:
    """Of the device that programs are traced for: the abstract mesh's, or this process's first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if abstract is None else abstract.device_kind


def has_jax_triton() -> bool:
    """Whether jax-triton is installed."""
    return importlib.util.find_spec("jax_triton") is not None


def ptx_version(compute_capability: int) -> int:
    """The version that PTX is written in: XLA's ptxas compiles it, not Triton's, which may be newer.

    (3.9 writes PTX 9.4 for Hopper, CUDA 13.0 takes 9.0.) CUDA from 12.4 on takes 8.4; Blackwell begins at 8.7.
    """
    return 84 if compute_capability < 100 else 87


def shared_limit(compute_capability: int) -> int:
    """Bytes of shared memory that a program may take; for a GPU that is not known, the least of the known."""
    return SHARED_BYTES.get(compute_capability, min(SHARED_BYTES.values()))
