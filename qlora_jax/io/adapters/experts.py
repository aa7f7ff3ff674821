"""Adapters of experts in PEFT's `target_parameters` form, in which transformers 5 has them: one pair for all experts.

peft 0.21 wraps the parameters `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`. For E experts and rank r

    lora_A.weight [E r, I]   rows of expert e: e r .. e r + r - 1
    lora_B.weight [O, r E]   column of rank j and expert e: j E + e

The wrapper of the parameter that is registered first (gate_up_proj) lies inside of that of the other, so that its key
has `.base_layer` where both are there. gate and up share an A in this form; two adapters of rank r are one of rank 2 r
whose B is block-diagonal, which is how peft reads per-expert files. Source: peft 0.21, tuners/lora/layer.ParamWrapper,
utils/transformers_weight_conversion.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.lora import LoRAConfig
from qlora_jax.models.kind import Kind

STEM = "mlp.experts"  # what transformers 5 calls the experts of a layer


class Fused(NamedTuple):
    """A parameter of all experts: its name, and our stacks that are its rows, in order."""

    name: str
    members: tuple[str, ...]


def parameters(kind: Kind) -> list[Fused]:
    """Those of a family, in the order in which they are registered."""
    found: dict[str, list[str]] = {}
    for name, whole in kind.experts.fused if kind.experts else ():
        found.setdefault(whole, []).append(name)
    return [Fused(whole, tuple(members)) for whole, members in found.items()]


def needs_this_form(kind: Kind, names: Mapping[str, Any]) -> bool:
    """Whether peft on transformers 5 cannot load adapters of these stacks under the names of single experts.

    It can where there are such names, and gate and up, which it fuses, have both an adapter or neither.
    """
    if kind.experts is None or not any(map(kind.is_expert, names)):
        return False
    halves = [sum(member in names for member in fused.members) for fused in parameters(kind)]
    whole = [len(fused.members) for fused in parameters(kind)]
    return kind.experts.fused_alone or any(0 < there < all_ for there, all_ in zip(halves, whole, strict=True))


def tensor_keys(fused: Fused, others: bool, layer: str) -> dict[str, str]:
    """{"A": key, "B": key} of a parameter's adapter. `others`: whether one that is registered later has one too."""
    module = f"{layer}.{STEM}" + (".base_layer" if others else "")
    return {letter: f"{module}.lora_{letter}.weight" for letter in "AB"}


class Written(NamedTuple):
    """Adapters of experts as a folder has them: tensors, and what adapter_config.json says of them."""

    tensors: Mapping[str, np.ndarray] = {}
    settings: Mapping[str, Any] = {}


def written(kind: Kind, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], config: LoRAConfig) -> Written:
    """Of stacks A [L, E, R, I], B [L, E, O, R] by name."""
    fused = [one for one in parameters(kind) if any(member in arrays for member in one.members)]
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {"target_parameters": [one.name for one in fused]}
    for number, one in enumerate(fused):
        there = [name for name in one.members if name in arrays]
        width = arrays[there[0]][1].shape[2]
        widths: dict[str, int] = {name: width for name in one.members}  # gate and up are as wide as each other
        for index in range(len(arrays[there[0]][0])):
            layer = {name: (arrays[name][0][index], arrays[name][1][index]) for name in there}
            keys = tensor_keys(one, number + 1 < len(fused), kind.layer.format(index))
            for key, array in zip(keys.values(), join(layer, one, widths), strict=True):
                tensors[key] = np.ascontiguousarray(array)
        if len(there) > 1:
            pattern = rf".*\.{re.escape(one.name.rpartition('.')[2])}"
            settings.setdefault("rank_pattern", {})[pattern] = config.rank * len(there)
            settings.setdefault("alpha_pattern", {})[pattern] = config.alpha * len(there)
    return Written(tensors, settings)


def join(
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], fused: Fused, widths: Mapping[str, int]
) -> tuple[Any, Any]:
    """A parameter's lora_A [E r, I] and lora_B [O, r E] in one layer, of its members' A [E, R, I] and B [E, O, R].

    `widths`: O of each member. Of a member without an adapter the rows of B are zero.
    """
    there = [name for name in fused.members if name in arrays]
    a = np.concatenate([arrays[name][0] for name in there], axis=1)
    E, r, _ = a.shape
    b = np.zeros((E, sum(widths[name] for name in fused.members), r), np.float32)
    row = column = 0
    for name in fused.members:
        if name in arrays:
            own = arrays[name][1]
            b[:, row : row + own.shape[1], column : column + own.shape[2]] = own
            column += own.shape[2]
        row += widths[name]
    return a.reshape(E * r, -1), b.transpose(1, 2, 0).reshape(b.shape[1], r * E)


def cut(a: np.ndarray, b: np.ndarray, E: int, fused: Fused, widths: Mapping[str, int]) -> dict[str, tuple[Any, Any]]:
    """Back again: each member's A [E, R, I] and B [E, O, R].

    Where B is block-diagonal a member has its own ranks alone, else all of them and an A of its own, with the same
    values; a member whose rows are zero has none.
    """
    r = a.shape[0] // E
    A, B = a.reshape(E, r, -1), b.reshape(b.shape[0], r, E).transpose(2, 0, 1)
    found = {}
    own = r // len(fused.members)
    starts = np.cumsum([0, *(widths[name] for name in fused.members)])
    rows = [B[:, start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
    diagonal = (
        B.any()
        and r % len(fused.members) == 0
        and all(
            not np.delete(part, np.s_[place * own : (place + 1) * own], axis=2).any() for place, part in enumerate(rows)
        )
    )
    for place, (name, part) in enumerate(zip(fused.members, rows, strict=True)):
        if diagonal and len(fused.members) > 1:
            ranks = slice(place * own, (place + 1) * own)
            found[name] = A[:, ranks], part[:, :, ranks]
        elif part.any() or not B.any():
            found[name] = A, part
    return found
