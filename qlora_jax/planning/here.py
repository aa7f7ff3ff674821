"""This process's own device as one to plan for, its rates measured."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.train.memory import host_memory_bytes

_TURNS = 5


def gpu_here() -> PlannedGpu:
    """The first device: its memory; bytes/s of a large copy, FLOP/s of a large bfloat16 (on CPUs float32) product."""
    device: Any = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    limit = (device.memory_stats() or {}).get("bytes_limit") or host_memory_bytes()
    width, elements = (8192, 2**28) if on_gpu else (1024, 2**24)
    matrix = jnp.ones((width, width), jnp.bfloat16 if on_gpu else jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    flops = 2 * width**3 / _least_seconds(lambda: multiply(matrix))
    negate = jax.jit(lambda a: -a, donate_argnums=0)
    buffer = [jnp.ones(elements, jnp.float32)]

    def copy() -> jax.Array:
        buffer[0] = negate(buffer[0])
        return buffer[0]

    bytes_per_second = 8 * elements / _least_seconds(copy)
    capability = str(getattr(device, "compute_capability", "0.0")).split(".")
    return PlannedGpu(
        device.device_kind,
        (int(capability[0]), int(capability[1])),
        getattr(device, "core_count", 0) or 0,
        limit,
        bytes_per_second,
        flops,
        0,
        0.0,
        is_here=True,
    )


def _least_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_TURNS):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
