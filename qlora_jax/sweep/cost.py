"""What a pack takes on a GPU: bytes and the least time, from its configs alone. Nothing is loaded or compiled; data is
read only where it alone says how long its rows are.

    base       packed codes and scales, embeddings, head, norms: once, whatever the pack's size
    a member   float32 adapter, gradient and optimizer state, at the pack's largest rank, all on the device; of its
               micro-batch what is kept of the layers (remat), one layer's activations, a chunk of logits (train/cut.py)
    shared     one dequantized weight

Where train.grad_accum or model.remat are "auto", points are packed by the cut that takes least, and a pack's cut is
then the fastest that fits it: members first, then rows.

planning/pack.py compiles a pack's program for the GPU and knows better, at a minute or more a pack; a grid has
hundreds.
Held against it (rank 64, 1 x 576 tokens, an H100), GB here and by XLA's buffers: Llama 7B alone 7.1 and 6.9, packs of 8
33.4 and 32.6; Llama 3 8B, packs of 4, 22.3 and 22.1. A pack's program holds one more copy of the adapters.

A step's time is the roofline's (planning/roofline.py) of the pack's rows together, its bytes of the base once.
Compilation, loading, data and evaluation are not in it. No pack has run on a GPU yet.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.io.peaks import model_bytes
from qlora_jax.lora import rank_one_parameters, select_targets
from qlora_jax.models.sizes import linear_bytes, linear_weights
from qlora_jax.optim.schedules import OPTIMIZERS
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.roofline import roofline
from qlora_jax.sweep.grid import Point
from qlora_jax.train.cut import Choice, Cut, ToCut, choose, cuts, temporary_bytes, unasked
from qlora_jax.train.memory import host_memory_bytes
from qlora_jax.train.shapes import BatchShape
from qlora_jax.train.spec import RunSpec, read_spec

# bytes of optimizer state a parameter; 8-bit moments with their scales
_STATE = {"adamw": 8.0, "lion": 4.0, "adamw8bit": 2.1, "lion8bit": 1.1, "sgd": 4.0}
_STACKED = 4  # bytes a parameter that a pack's program holds beside adapters, gradients and state
_HOST_SHARE, _PROCESS_BYTES = 0.8, 10**9  # of the host's memory; interpreter, JAX and data of a worker
_SECTIONS = ("model", "quant", "lora", "data", "train", "eval")
# keys that change no size: members that differ in these alone share what is computed here
_SIZELESS = {
    "lora": ("alpha", "dropout", "use_rslora", "init_from", "rank", "targets"),
    "train": ("seed", "steps", "checkpoint_every", "keep_checkpoints", "log_every"),
    "data": ("seed", "path", "revision", "format", "train_on_source", "group_by_length", "max_examples"),
    "eval": ("every",),
}
_ORDER_ALONE = ("seed", "group_by_length")  # of data, where it is the data set that says how long rows are


@dataclasses.dataclass(frozen=True, eq=False)  # one for each text below: itself is what it is known by
class _Shape:
    """Of a config, without its adapter."""

    spec: RunSpec
    base_bytes: int
    packed_bytes: int  # codes and scales of the linear layers
    weights: int  # of the linear layers

    @functools.cached_property
    def to_cut(self) -> ToCut:
        return unasked(self.spec.to_cut)

    @functools.cached_property
    def least_cut(self) -> Cut:
        """The one that takes least memory."""
        return min(cuts(self.to_cut), key=lambda cut: temporary_bytes(self.to_cut, cut))


@functools.cache
def _shape(text: str) -> _Shape:
    """`text`: JSON of the sections that decide sizes."""
    plain = json.loads(text)
    for section, keys in _SIZELESS.items():
        if section in plain:
            plain[section] = {key: _NEUTRAL[key] for key in keys if key in _NEUTRAL} | plain[section]
    spec = read_spec(ConfigDict(plain))
    model = spec.model
    config = model.sizes
    base = model_bytes(config, model.quant, model.itemsize)
    packed, _ = linear_bytes(config, model.quant.format, model.quant.block_size, model.quant.double_quant)
    weights = linear_weights(config)
    return _Shape(spec, base, packed, weights)


_NEUTRAL = {
    "alpha": 1.0, "dropout": 0.0, "use_rslora": False, "init_from": "", "rank": 1, "targets": ["all-linear"],
    "seed": 0, "steps": 1, "path": "", "revision": "main",
}  # fmt: skip


@functools.cache  # packing asks for each point many times
def _of(point: Point) -> _Shape:
    plain = point.config
    data = plain["data"]
    has_length = data["batches"] or (data["max_source_len"] and data["max_target_len"])
    sizeless = _SIZELESS if has_length else _SIZELESS | {"data": _ORDER_ALONE}
    kept = {
        section: {key: value for key, value in plain[section].items() if key not in sizeless.get(section, ())}
        for section in _SECTIONS
    }
    return _shape(json.dumps(kept, sort_keys=True))


@functools.cache
def _adapter_width(shape: _Shape, targets: tuple[str, ...]) -> int:
    """Parameters of an adapter of rank 1."""
    config = shape.spec.model.sizes
    return sum(rank_one_parameters(config, name) for name in select_targets(targets, config))


def _adapter_params(point: Point, rank: int) -> int:
    return rank * _adapter_width(_of(point), tuple(point.config["lora"]["targets"]))


def pack_cut(points: Sequence[Point], limit: int | None) -> Choice:
    """How each member's rows are cut (packs/run.py); `limit` as of train/cut.choose: None on CPUs."""
    return choose(_longest(points).to_cut, _held_bytes(points), limit, members=len(points))


def pack_bytes(points: Sequence[Point], cut: Cut | None = None) -> int:
    """Device bytes of a pack at its peak, see above; without a cut by the one that takes least."""
    longest = _longest(points)
    return _held_bytes(points) + temporary_bytes(longest.to_cut, cut or longest.least_cut, len(points))


def _longest(points: Sequence[Point]) -> _Shape:
    """Of the member with the longest rows: all are padded to it."""
    return max((_of(point) for point in points), key=lambda shape: shape.spec.batch.T)


def _held_bytes(points: Sequence[Point]) -> int:
    """What stands there in every cut."""
    rank = max(point.config["lora"]["rank"] for point in points)
    stacked = _STACKED if len(points) > 1 else 0
    total = float(_of(points[0]).base_bytes)
    for point in points:
        name = point.config["optimizer"]["name"].removeprefix("paged_")
        if name not in _STATE:
            raise InputError(f"optimizer.name is {name!r}; known: {', '.join(OPTIMIZERS)}")
        total += (8 + stacked + _STATE[name]) * _adapter_params(point, rank)
    return math.ceil(total)


def pack_seconds(points: Sequence[Point], gpu: PlannedGpu, cut: Cut | None = None) -> float:
    """Least seconds of a pack's steps on `gpu`: of its longest member, at its largest rank, all members throughout.
    `cut`: of each member's rows; None is that of read_spec."""
    shape = _of(points[0])
    rank = max(point.config["lora"]["rank"] for point in points)
    params = max(_adapter_params(point, rank) for point in points)
    steps = max(point.config["train"]["steps"] for point in points)
    spec = shape.spec if cut is None else shape.spec.with_cut(cut)
    batch = spec.batch
    rows = dataclasses.replace(spec, batch=BatchShape(batch.G, batch.B * len(points), batch.T))
    time = roofline(rows, gpu, shape.packed_bytes, shape.weights, params, 0)
    others = 24 * params * (len(points) - 1) / gpu.bytes_per_second  # their optimizers
    return steps * (time.seconds + others)


def host_limit(workers: int) -> int:
    """Bytes that a pack may take of this machine's memory, where `workers` processes share it."""
    return max(int(_HOST_SHARE * host_memory_bytes() / workers) - _PROCESS_BYTES, 0)
