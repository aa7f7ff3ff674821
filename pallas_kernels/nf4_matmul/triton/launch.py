"""What both launchers of Triton kernels need: the GPU that programs are for, jax-triton, its options, the scales.

Nothing here imports Triton before a kernel is really called, so that every other path works without it.
"""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul.config import Gpu
from pallas_kernels.nf4_matmul.operands import Codec, Packed

# compute capabilities of GPUs that programs are lowered for where there is none: the abstract device has only a name
CAPABILITIES = {"A100": 80, "A6000": 86, "RTX 3090": 86, "RTX 4090": 89, "L40": 89, "H100": 90, "H200": 90, "A10": 86}


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


def backend_options(compute_capability: int) -> dict[str, Any]:
    """What Triton's compiler is told.

    enable_fp_fusion: a multiply-add would round once where the reference rounds twice; dot products are not concerned.
    ptx_version: XLA's ptxas compiles the PTX, not Triton's, which may be newer (3.9 writes PTX 9.4 for Hopper, CUDA
    13.0 takes 9.0). CUDA from 12.4 on takes 8.4; Blackwell begins at 8.7.
    """
    return {"enable_fp_fusion": False, "ptx_version": 84 if compute_capability < 100 else 87}


def scale_operands(packed: Packed, codec: Codec) -> tuple[jax.Array | None, ...]:
    """absmax, scale_map, nested_absmax, offset as they are stored; plain scales are absmax alone."""
    if packed.nested_absmax is None:
        return packed.absmax, None, None, None
    return packed.absmax, jnp.asarray(np.asarray(codec.absmax_map, np.float32)), packed.nested_absmax, packed.offset
