"""Which array is cut along which of its axes, by its name. Whatever the rules do not cut stands whole on each device.

    embedding, head, head_bias      the vocabulary: each device knows its own tokens' rows
    blocks.NAME.weight.codes ...    packed bytes and scales, along the run of values: no byte is cut
    blocks.NAME.weight              in 16 bits: out-features
    blocks.NAME.lora_a, lora_b      in-features of A [.., R, I], out-features of B [.., O, R]

An array whose axis the devices do not divide stands whole, too. Names are paths in the model's own tree.
"""

from typing import Any

import jax
import jax.numpy as jnp

BLOCKS = "blocks."
_VOCABULARY = ("embedding", "head", "head_bias")
_PACKED = ("codes", "absmax", "nested_absmax")


def split_axis(name: str, leaf: Any, ways: int) -> int | None:
    """The axis along which `ways` devices divide an array, counted from its end; None: each holds all of it.

    `leaf`: what has its shape and dtype.
    """
    axis = _axis(name, leaf) if ways > 1 else None
    return None if axis is None or leaf.shape[axis] % ways else axis


def _axis(name: str, leaf: Any) -> int | None:
    if name in _VOCABULARY:
        return -len(leaf.shape)
    if not name.startswith(BLOCKS):
        return None
    last = name.rpartition(".")[2]
    if last in _PACKED:
        return -2 if leaf.dtype == jnp.int8 else -1
    if last == "lora_a":
        return -1
    if last == "lora_b" or (last == "weight" and len(leaf.shape) > 2):
        return -2
    return None


def named(tree: Any, root: str = "") -> list[tuple[str, Any]]:
    """(name, array) of each array of a state, in the order of jax.tree.leaves."""
    return [(root + name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def name_of(path: Any) -> str:
    """A path in a state as the rules have it: "blocks.self_attn.q_proj.weight.codes"."""
    steps = [jax.tree_util.keystr((step,), simple=True) for step in path]
    return ".".join(step for step in steps if step != "value")
