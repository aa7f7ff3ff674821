"""Tensors that hold the experts of a layer in one, read as a tensor for each expert: what is read is a part of a file.

Files of transformers 4, and the hub's, have `mlp.experts.3.up_proj.weight` [F, D] for each expert. transformers 5 keeps
`mlp.experts.gate_up_proj` [E, 2 F, D] and `mlp.experts.down_proj` [E, D, F] in memory, and writes them where
save_original_format is false. gpt-oss has nothing else, [E, D, 2 F] there with gate and up in turns, or in MXFP4
`..._blocks` uint8 [E, 2 F, D / 32, 16] and `..._scales` uint8 [E, 2 F, D / 32] (quant/mxfp4).
"""

import math
from collections.abc import Mapping

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.io.header import Place, numpy_dtype
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.kind import Experts

BLOCKS, SCALES = ".blocks", ".scales"  # ends of the keys of a weight's parts in MXFP4


def split(config: ModelConfig, places: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """Key of a tensor of all experts -> keys of `expected_shapes`, and where each lies.

    Raises InputError where such a tensor has another shape than the model's.
    """
    experts = config.kind.experts
    found: dict[str, dict[str, Place]] = {}
    for index in range(config.L) if experts else ():
        assert experts is not None
        for fused, members in _members(experts, config).items():
            for end in ("", "_blocks", "_scales"):
                key = config.module(index, fused) + end
                if key in places:
                    found[key] = _parts(key, places[key], config, index, members, end)
        theirs = config.module(index, "mlp.gate.weight")  # Mixtral's in the names of transformers 5
        if theirs in places and theirs != (ours := config.key(index, experts.router)):
            found[theirs] = {ours: places[theirs]}
    return found


def in_mxfp4(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Key of each weight that a file has in MXFP4 -> shapes of its parts, by the ends of their keys."""
    if not config.kind.experts or not config.kind.experts.stored:
        return {}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in filter(config.is_expert, config.linears):
        O, I = config.linears[name]
        found |= {key: {BLOCKS: (O, I // 32, 16), SCALES: (O, I // 32)} for key in config.slots(name)}
    return found


def _members(experts: Experts, config: ModelConfig) -> dict[str, list[str]]:
    """A fused tensor's name -> stacks that it is made of, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name, fused in experts.fused:
        found.setdefault(fused, []).append(name)
    return found


def _parts(key: str, place: Place, config: ModelConfig, index: int, members: list[str], end: str) -> dict[str, Place]:
    shapes = [config.stored(name) for name in members]
    if end:
        cut = 3 if end == "_blocks" else 2
        shapes = [(O, -(-I // 32), 16)[:cut] for O, I in (config.linears[name] for name in members)]
    whole = (config.copies(members[0])[0], sum(shape[0] for shape in shapes), *shapes[0][1:])
    if place.shape != whole:
        raise InputError(f"{key} is {list(place.shape)}, expected {list(whole)}")
    itemsize = numpy_dtype(place.dtype).itemsize
    parts, start = {}, place.start
    for units in zip(*map(config.units, members), strict=True):
        for unit, shape in zip(units, shapes, strict=True):
            stop = start + math.prod(shape) * itemsize
            name = config.key(index, unit) + {"": "", "_blocks": BLOCKS, "_scales": SCALES}[end]
            parts[name] = Place(place.dtype, shape, start, stop)
            start = stop
    return parts


class Joined:
    """Weights of `expected_shapes` -> tensors as the family's files have them: where experts lie in one, once all are
    there."""

    def __init__(self, config: ModelConfig):
        self._whole: dict[str, tuple[str, int]] = {}  # key of a weight -> that of the tensor, and which expert's it is
        self._held: list[np.ndarray] = []
        self._count = config.kind.experts.count if config.kind.experts else 0
        if config.kind.experts and config.kind.experts.fused_alone:
            for name, whole in config.kind.experts.fused:
                for key, (index, expert) in config.slots(name).items():
                    self._whole[key] = config.module(index, whole), expert

    def add(self, key: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """Key and tensor to write, or {} while experts are missing. Those of a tensor come one after the other."""
        if key not in self._whole:
            return {key: value}
        whole, expert = self._whole[key]
        assert expert == len(self._held)
        self._held.append(value)
        if len(self._held) < self._count:
            return {}
        held, self._held = self._held, []
        return {whole: np.stack(held)}
