"""The attention kernels in Triton's interpreter, launched as pallas_kernels/attention/triton/launch.py does."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.attention import config
from pallas_kernels.attention.triton import launch
from tests.kernels import interpreter

GPU = gpu.Gpu("a GPU", 86, 1)
TILES = config.KernelTiles(*[config.Tiles(16, 32, 4, 1), config.Tiles(32, 16, 4, 1), config.Tiles(16, 32, 4, 1)])


def in_the_interpreter(monkeypatch: pytest.MonkeyPatch, tiles: config.KernelTiles = TILES) -> list[str]:
    """Puts the interpreter in jax-triton's place; the list has the name of every kernel that runs."""
    ran: list[str] = []

    def triton_call(*arrays: Any, kernel: Any, out_type: Any, grid: Any, name: str, T: int, **others: Any) -> Any:
        names = [parameter.name for parameter in kernel.params]
        constants = {key: value for key, value in others.items() if key in names}

        def compute(*given: Any) -> Any:
            ran.append(name)
            outputs = [np.full(like.shape, np.nan, like.dtype) for like in out_type]
            values = iter(given)
            inputs = [None if array is None else np.array(next(values)) for array in arrays]
            arguments = dict(zip(names, [*inputs, *outputs, T], strict=False))
            interpreter.run(kernel, grid, arguments | constants)
            return outputs

        return jax.pure_callback(compute, list(out_type), *[array for array in arrays if array is not None])

    monkeypatch.setattr(launch, "current_gpu", lambda backend: GPU)
    monkeypatch.setattr(launch, "load_jax_triton", lambda backend: SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(config, "tiles", lambda H, shared: tiles)
    return ran


def normal(*shape: int, seed: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
