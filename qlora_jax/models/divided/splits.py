"""How devices divide the products of a decoder: heads, and the feed-forward's width F.

q, k, v, gate and up are divided by out-features, o and down by in-features: each device has N / T query heads, K / T
key heads and F / T of the feed-forward (mesh/tensor.py).
"""

import dataclasses
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.mesh.axes import Axes
from qlora_jax.mesh.tensor import Split
from qlora_jax.models.config import ModelConfig
from qlora_jax.quant import int8, mxfp4


def splits_of(config: ModelConfig, axes: Axes, quant: Any) -> dict[str, Split]:
    """Name of each linear layer -> how it is divided; {} where nothing is.

    Args:
      config: sizes. axes: of the mesh.
      quant: has the format and block_size of packed weights.
    Raises:
      InputError: a model whose layers cannot be divided so, or by so many.
    """
    if axes.tensor == 1:
        return {}
    _check(config, axes, quant)
    by_role = _by_role(config)
    splits = {name: by_role[role] for role, name in config.kind.linear.items()}
    for name, split in splits.items():
        stored = config.kind.experts and config.kind.experts.stored and config.is_expert(name)
        block = mxfp4.BLOCK if stored else 1 if quant.format == "none" else quant.block_size
        _check_blocks(name, config.linears[name], split, axes, block)
    return splits


def local_sizes(config: ModelConfig, ways: int) -> ModelConfig:
    """Sizes of what one of so many devices computes of a layer."""
    if ways == 1:
        return config
    return dataclasses.replace(config, N=config.N // ways, K=config.K // ways, F=config.F // ways)


def vector_splits(config: ModelConfig, splits: dict[str, Split]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of config.vectors those of which a device computes with a part: name -> axis from the end, sections of it."""
    kind = config.kind
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, split in splits.items():
        if split.by == "out" and f"{name}.bias" in config.vectors:
            found[f"{name}.bias"] = -1, split.sections
    if kind.qk_norm != "head":
        axis = -1 if kind.qk_norm == "whole" else -2
        for norm in (kind.norm_of.get("q_norm"), kind.norm_of.get("k_norm")):
            found |= {name: (axis, ()) for name in (norm, f"{norm}.bias") if name in config.vectors}
    if kind.sinks:
        found[kind.sinks] = -1, ()
    return found


def _by_role(config: ModelConfig) -> dict[str, Split]:
    N, K, F = config.N * config.H, config.K * config.H, config.F
    out, of_sum = Split("out"), Split("in")
    fused = out if config.kind.qkv_layout == "groups" else Split("out", (N, K, K))
    # an expert's gate and up lie row by row side by side
    pair = out if config.kind.experts else Split("out", (F, F))
    fused_ones = {"qkv": fused, "gate_up": pair}
    return dict.fromkeys(("q", "k", "v", "gate", "up"), out) | dict.fromkeys(("o", "down"), of_sum) | fused_ones


def _check(config: ModelConfig, axes: Axes, quant: Any) -> None:
    ways, kind = axes.tensor, config.kind
    instead = f"set mesh.tensor=1 and mesh.fsdp={axes.fsdp * ways}, which divides any model's arrays"
    if kind.pair or kind.bidirectional:
        raise InputError(
            f"mesh.tensor is {ways}, and the layers of encoders and T5 are not divided here: set mesh.tensor=1, "
            f"mesh.fsdp=1 and mesh.data={axes.devices}, which divides rows alone"
        )
    if kind.alibi:
        raise InputError(
            f"mesh.tensor is {ways}, and this model's heads have slopes of their own (ALiBi), which are part of the "
            f"program and the same on all devices: {instead}"
        )
    if quant.format == int8.FORMAT:
        raise InputError(
            f"mesh.tensor is {ways}, and an int8 product rounds whole rows of activations, of which each device would "
            f"have a part: set quant.format=nf4, or {instead}"
        )
    for what, count in (("key/value heads", config.K), ("query heads", config.N), ("feed-forward's width", config.F)):
        if count % ways:
            raise InputError(f"mesh.tensor is {ways}, which does not divide this model's {count} ({what}): {instead}")


def _check_blocks(name: str, shape: tuple[int, int], split: Split, axes: Axes, block_size: int) -> None:
    O, I = shape  # noqa: E741
    ways = axes.tensor
    runs = [I // ways] if split.by == "in" else [rows // ways * I for rows in split.sections or (O,)]
    if any(run % block_size for run in runs):
        raise InputError(
            f"mesh.tensor is {ways}, and a part of {name} {[O, I]}, {min(runs)} values in a row, would cut blocks of "
            f"{block_size}: set a smaller quant.block_size, or mesh.tensor=1 and mesh.fsdp={axes.fsdp * ways}"
        )
