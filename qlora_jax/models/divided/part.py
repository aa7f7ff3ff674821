"""What of a decoder one device computes with, of those that compute its products together: inside `shard_map`.

Arrays that a mesh divides are this device's part already (mesh/rules.py). Here what is fixed about a model becomes that
of the part, and of small arrays that stand whole on each device (biases, norms and sinks of heads) its own are taken.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.mesh.axes import TENSOR
from qlora_jax.mesh.tensor import own
from qlora_jax.models.divided.splits import local_sizes, vector_splits
from qlora_jax.models.layers import Linear, part_of
from qlora_jax.quant.tensor import QuantizedTensor


def own_part(model: Any) -> Any:
    """A model that was just merged, as this device computes it; itself where no product is divided."""
    shards = getattr(model, "shards", None)
    if shards is None or not shards.split:
        return model
    whole, block, ways, splits = model.config, model.blocks, shards.axes.tensor, dict(shards.split)
    for name, (axis, sections) in vector_splits(whole, splits).items():
        owner, attribute = _place(block, name)
        _replace(owner, attribute, own(getattr(owner, attribute).get_value(), axis, sections))
    for name, split in splits.items():
        linear: Linear = part_of(block, name)
        linear.split = split
        weight = linear.weight.get_value()
        if isinstance(weight, QuantizedTensor):
            _replace(linear, "weight", dataclasses.replace(weight, shape=split.shape(weight.shape, ways)))
        if split.by == "in" and whole.is_expert(name) and hasattr(linear, "bias"):  # which is added before the sum
            bias = linear.bias.get_value()
            _replace(linear, "bias", jnp.where(jax.lax.axis_index(TENSOR) == 0, bias, jnp.zeros_like(bias)))
    if whole.kind.qk_norm == "whole":
        for role in ("q_norm", "k_norm"):
            if role in whole.kind.norm_of:
                part_of(block, whole.kind.norm_of[role]).divided = True
    model.config = local_sizes(whole, ways)
    block.N, block.K = model.config.N, model.config.K
    return model


def _place(block: Any, name: str) -> tuple[Any, str]:
    """Where one of config.vectors stands: whose attribute, and which."""
    owner, _, last = name.rpartition(".")
    if last == "bias":
        return part_of(block, owner), last
    found = part_of(block, name)
    return (found, "weight") if hasattr(found, "weight") else (part_of(block, owner) if owner else block, last)


def _replace(owner: Any, attribute: str, value: Any) -> None:
    """Another variable of the same kind: those that were given are of the program around."""
    setattr(owner, attribute, type(getattr(owner, attribute))(value))
