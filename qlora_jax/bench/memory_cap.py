"""A smaller GPU out of a larger one: JAX's allocator held to so many bytes of its memory."""

import ctypes
import os
import re

from qlora_jax.errors import InputError

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str, flag: str) -> int:
    """ "48GiB" -> 48 * 2^30, "48GB" -> 48 * 10^9. Raises InputError that names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise InputError(f"{flag}={text}: expected a size with its unit, as 48GiB (48 * 2^30) or 48GB (48 * 10^9)")
    return round(float(match[1]) * UNITS[match[2]])


def gpu_memory_bytes() -> int | None:
    """Of the first GPU that this process may use, as JAX's allocator counts it; None where it will compute on no GPU.

    Asks the driver itself: JAX would take the memory that the question is about.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "").lower()
    if platforms and not any(name in platforms for name in ("cuda", "gpu")):
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return None if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device) else size.value


def set_cap(cap: int, memory: int, flag: str) -> None:
    """Holds JAX, which must not have started, to `cap` of the GPU's `memory` bytes. Raises InputError for more."""
    if cap > memory:
        raise InputError(f"{flag}: this GPU has {memory / 2**30:.2f} GiB ({memory / 1e9:.2f} GB): give at most that")
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the old name of the same; JAX refuses both together
    os.environ["XLA_CLIENT_MEM_FRACTION"] = repr(cap / memory)


def check_cap(cap: int, limit: int | None, flag: str) -> None:
    """Raises InputError unless JAX, started, keeps to the cap: `limit` is what its allocator says it may give out."""
    if limit is None or limit > 1.001 * cap:
        found = "states no limit" if limit is None else f"gives out {limit / 2**30:.2f} GiB"
        raise InputError(
            f"{flag}: JAX's allocator {found}; take XLA_PYTHON_CLIENT_ALLOCATOR, or what else sets it, away"
        )
