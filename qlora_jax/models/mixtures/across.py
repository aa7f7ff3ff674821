"""A mixture whose experts are on several devices of a mesh: each has E / ways of them, and rows of its own.

    from_all    the tokens of all these devices, with what their routers chose: each goes through its own experts
    here        which of the chosen experts are this device's
    back        each device's own rows, summed over what all made of them

`ways` is the number of devices along the mesh's expert axis, 1 where a device has all experts; inside `shard_map`
alone, otherwise. A row's neighbours along that axis are its neighbours in the batch: it is the last of mesh.axes.ROWS.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import InputError
from qlora_jax.mesh.axes import EXPERT, Axes
from qlora_jax.mesh.gather import from_all as gathered
from qlora_jax.models.config import ModelConfig


def from_all(ways: int, arrays: Any) -> Any:
    """[M, ...] of this device -> [ways * M, ...], by device."""
    return arrays if ways == 1 else jax.tree.map(lambda x: gathered(x, EXPERT, 0), arrays)


def back(ways: int, x: jax.Array) -> jax.Array:
    """[ways * M, ...], to which each device adds something -> this device's [M, ...]."""
    return x if ways == 1 else jax.lax.psum_scatter(x, EXPERT, tiled=True)


def first_here(ways: int, count: int) -> Any:
    """The number, among all, of the first of this device's `count` experts."""
    return 0 if ways == 1 else jax.lax.axis_index(EXPERT) * count


def here(ways: int, chosen: jax.Array, count: int) -> jax.Array:
    """Numbers of experts among all -> among the `count` of this device; `count` itself stands for all others."""
    if ways == 1:
        return chosen
    own = chosen - first_here(ways, count)
    return jnp.where((own >= 0) & (own < count), own, count)


def first_row(ways: int, mine: Any, B: int) -> Any:
    """The row of a step's batch that `from_all` begins with, where this device's B rows begin with `mine`."""
    return mine if ways == 1 else mine - jax.lax.axis_index(EXPERT) * B


def check_experts(axes: Axes, sizes: ModelConfig) -> None:
    """Raises InputError where a mesh divides experts that a model does not have, or not evenly."""
    if axes.expert == 1:
        return
    experts, keep, all_fsdp = sizes.kind.experts, axes.expert * axes.fsdp, f"mesh.fsdp={axes.expert * axes.fsdp}"
    if experts is None:
        raise InputError(
            f"mesh.expert is {axes.expert}, but this model has no experts: set mesh.expert=1 and {all_fsdp}"
        )
    if experts.count % keep:
        raise InputError(
            f"{experts.count} experts cannot be divided among mesh.expert = {axes.expert} x mesh.fsdp = {axes.fsdp} "
            f"devices, as many on each: change these, or set mesh.expert=1 and {all_fsdp}"
        )
