"""Which array is cut along which of its axes, by its name. Whatever the rules do not cut stands whole on each device.

    embedding, head, head_bias      the vocabulary: each device knows its own tokens' rows
    blocks.STEM.experts.NAME        a mixture's stacks [L, E, ...], of weights, biases and adapters: by experts, which
                                    devices along expert keep; those along fsdp and sequence gather a layer's of them
    blocks.NAME.weight, lora_a/b    the first axis behind the layers': packed bytes and scales [L, n] along the run of
                                    values (no byte is cut), 16-bit weights and B [L, O, R] by out-features, A [L, R, I]
                                    by ranks: along fsdp, expert and sequence

The first axis behind the layers', since gathering along another turns the whole stack around in memory first. An array
whose axis the devices do not divide stands whole, too.

Along tensor each keeps its part: of the vocabulary, of packed weights that were laid out part by part, of 16-bit
weights and B by out-features, of 16-bit weights and A by in-features (mesh/tensor.py).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from qlora_jax.mesh.axes import EXPERT, FSDP, SEQUENCE, TENSOR, Axes
from qlora_jax.mesh.tensor import Split

BLOCKS = "blocks."
_EXPERTS = ".experts."  # ends the stem of their names in every family
_VOCABULARY = ("embedding", "head", "head_bias")
NO_SPLITS: Mapping[str, Split] = MappingProxyType({})
_PARTS = ("codes", "absmax", "nested_absmax", "offset", "weight", "lora_a", "lora_b")


class Cut(NamedTuple):
    """How devices divide an array: along axes of it counted from its end. One axis may be divided twice, the parts
    that are kept into those that are gathered.

    gathered: the axis of which each device along `among` holds a part; None: it holds all. kept: the one of which each
    device has and uses its own part alone, along this axis of the mesh.
    """

    gathered: int | None = None
    kept: int | None = None
    along: str = ""
    among: tuple[str, ...] = (FSDP,)

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the mesh, along which it is divided."""
        return ((self.along,) if self.kept is not None else ()) + (self.among if self.gathered is not None else ())

    def of_each(self, ndim: int) -> list[tuple[str, ...]]:
        """Along which axes of the mesh each axis of an array is divided."""
        along: list[tuple[str, ...]] = [()] * ndim
        if self.kept is not None:
            along[self.kept] += (self.along,)
        if self.gathered is not None:
            along[self.gathered] += self.among
        return along


def cut_of(name: str, leaf: Any, axes: Axes, splits: Mapping[str, Split] = NO_SPLITS) -> Cut:
    """By the rules, of an array of that name; `leaf`: what has its shape. `splits`: of linear layers, along tensor."""
    among = (FSDP,) if axes.expert == 1 or is_of_experts(name) else (FSDP, EXPERT)
    among = among if axes.sequence == 1 else (*among, SEQUENCE)
    kept: int | None
    if axes.expert > 1 and is_of_experts(name):
        along, parts, kept = EXPERT, axes.expert, 1 - len(leaf.shape)
    else:
        along, parts, kept = TENSOR, axes.tensor, _kept_axis(name, leaf, axes, splits)
    if kept is None:
        along, parts = "", 1
    gathered = _gathered_axis(name, leaf, axes.along(among), parts, kept)
    return Cut(None, kept, along) if gathered is None else Cut(gathered, kept, along, among)


def is_of_experts(name: str) -> bool:
    """Whether an array of that name has a part for each of a mixture's experts, [L, E, ...]."""
    return name.startswith(BLOCKS) and _EXPERTS in name


def _kept_axis(name: str, leaf: Any, axes: Axes, splits: Mapping[str, Split]) -> int | None:
    """The axis of which the devices along tensor have a part each."""
    if name in _VOCABULARY:
        divides = axes.tensor > 1 and leaf.shape[0] % (axes.tensor * axes.along((FSDP, EXPERT, SEQUENCE))) == 0
        return -len(leaf.shape) if divides else None
    linear, _, part = name.removeprefix(BLOCKS).rpartition(".")
    if linear.endswith(".weight"):
        return -1 if linear.removesuffix(".weight") in splits and part != "offset" else None
    if (split := splits.get(linear)) is None:
        return None
    by_out = {"weight": -2} if len(split.sections) > 1 else {"weight": -2, "lora_b": -2}
    return (by_out if split.by == "out" else {"weight": -1, "lora_a": -1}).get(part)


def _gathered_axis(name: str, leaf: Any, ways: int, parts: int, kept: int | None) -> int | None:
    """The axis along which devices, so many, divide an array that they gather; the axis `kept` has `parts` already."""
    shape = leaf.shape
    if name in _VOCABULARY:
        axis = 0
    elif is_of_experts(name):
        axis = 1
    elif name.startswith(BLOCKS) and name.rpartition(".")[2] in _PARTS and (".weight." in name or len(shape) > 2):
        axis = 1  # of what has a weight's parts, or is a stack of matrices: no norm's vectors
    else:
        return None
    axis -= len(shape)
    equal = -axis <= len(shape) and axis < 0 and shape[axis] % (ways * (parts if axis == kept else 1)) == 0
    return axis if ways > 1 and equal else None


def named(tree: Any) -> list[tuple[str, Any]]:
    """(name, array) of each array of a state, in the order of jax.tree.leaves."""
    return [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def name_of(path: Any) -> str:
    """A path in a state as the rules have it: "blocks.self_attn.q_proj.weight.codes"."""
    steps = [jax.tree_util.keystr((step,), simple=True) for step in path]
    return ".".join(step for step in steps if step != "value")
