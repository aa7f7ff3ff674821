"""Device memory of a run by kind, from XLA's own buffer assignment of its programs for the GPU.

A run has four phases, and its peak is the largest of theirs:

    loading     the quantized model, and one tensor in 16 bits with what quantizing it takes
    gradient    base, adapter, summed gradients, block inputs, temporaries; and optimizer state that stays on the device
    update      base, adapter, summed gradients, resident state, the pages in flight, temporaries of the update of
                what is resident or of a page in flight
    evaluation  base, adapter, resident state, and the temporaries of a batch of held-out examples

XLA gives arguments, results and temporaries of a program as totals; arguments and results are the arrays that a run
holds, so what is left are its temporaries. What the card's allocator takes beside them is in allocator.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.io.peaks import load_device_peak_bytes, load_host_peak_bytes
from qlora_jax.lora import linear, whole_matrices
from qlora_jax.mesh.wire import wire_bytes
from qlora_jax.models.layers import Frozen
from qlora_jax.optim.pages import Pages
from qlora_jax.optim.residency import decide
from qlora_jax.planning.allocator import allocator_bytes
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.program import compile_evaluation, compile_gradient, compile_updates
from qlora_jax.planning.topology import traced_for
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.cut import log_sums
from qlora_jax.train.memory import MEMORY_FRACTION
from qlora_jax.train.shapes import AbstractModel, abstract_model
from qlora_jax.train.spec import RunSpec

KINDS = (
    "codes",
    "scales",
    "linear_16bit",  # linear layers that are not quantized
    "embeddings_and_head",
    "norms",
    "adapters",
    "modules_to_save",  # embedding and head that train, in float32
    "gradients",
    "optimizer",
    "block_inputs",
    "temporaries",
    "allocator",  # beside the temporaries (planning/allocator.py)
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What stands on the device at once in one phase of a run."""

    name: str
    bytes: dict[str, int]  # by kind

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of a run, on each of its GPUs."""

    phases: tuple[Phase, ...]
    page_bytes: tuple[int, ...]  # optimizer state of each page
    resident: tuple[bool, ...]  # which of them stay on the device
    optimizer_bytes: int  # all of its state, wherever it lives
    pinned_host_bytes: int  # paged state, and offloaded block inputs
    load_host_peak_bytes: int
    wire: dict[str, int]  # bytes that a device receives from others in a step (mesh/wire.py), by what they are

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def held_bytes(self) -> int:
        """Base, adapters and gradients: what no other batch, length, remat or paging makes smaller."""
        return self._in_gradient("optimizer", "block_inputs", "temporaries", "allocator")

    @property
    def gradient_bytes(self) -> int:
        """Of the gradient's program, but for optimizer state that stays on the device."""
        return self._in_gradient("optimizer", "allocator")

    def _in_gradient(self, *without: str) -> int:
        gradient = next(phase for phase in self.phases if phase.name == "gradient").bytes
        return sum(size for kind, size in gradient.items() if kind not in without)


def held_bytes(spec: RunSpec) -> int:
    """Base, adapters and gradients of a run on each device, whatever its cut into micro-batches."""
    model = abstract_model(spec.model, spec.axes).of_one()
    return _bytes(model.base) + 2 * _bytes(model.adapter)


def base_bytes(model: AbstractModel) -> dict[str, int]:
    """The frozen model by kind."""
    whole = model.merged()
    found = dict.fromkeys(("codes", "scales", "linear_16bit", "embeddings_and_head", "norms"), 0)
    for name in whole.config.linears:
        w = linear(whole, name).weight.get_value()
        if isinstance(w, QuantizedTensor):
            found["codes"] += _bytes(w.codes)
            found["scales"] += _bytes((w.absmax, w.nested_absmax, w.offset))
        else:
            found["linear_16bit"] += _bytes(w)
    frozen = [matrix for matrix in (whole.embedding, whole.head) if isinstance(matrix, Frozen)]
    found["embeddings_and_head"] = sum(_bytes(matrix.get_value()) for matrix in frozen)
    found["norms"] = _bytes(model.base) - sum(found.values())
    return found


def plan_memory(
    spec: RunSpec, gpu: PlannedGpu, tx: optax.GradientTransformation, page_bytes: int, paging: str, run: dict[str, Any]
) -> Memory:
    """Compiles the run's programs for `gpu`, as many as the run has, and adds up.

    Args:
      spec: sizes.
      tx, page_bytes, paging: of the optimizer.
      run: loss_chunk, max_grad_norm.
    """
    model = abstract_model(spec.model, spec.axes)
    mine = model.of_one()
    base, adapter = base_bytes(mine), _bytes(mine.adapter)
    matrices = _bytes(whole_matrices(mine.adapter))
    held = base | {"adapters": adapter - matrices, "modules_to_save": matrices}
    compiled = compile_gradient(gpu, model, spec.batch, spec.model.lora.dropout > 0, **run)
    wire = {} if model.shards is None else dict(wire_bytes(compiled.as_text()))
    gradient = compiled.memory_analysis()
    offloaded = gradient.host_temp_size_in_bytes
    inputs = 0
    if spec.model.remat in ("block", "selective"):  # of the temporaries, what is known
        itemsize = 2 if spec.model.is_16bit else 4
        one = spec.of_one().model
        with traced_for(gpu):
            sums = log_sums(one, spec.batch.T)
        shape = (spec.batch.B, one.part(spec.batch.T), itemsize, one.low_rank, sums)
        inputs = int(kept_bytes(one.sizes, one.remat, *shape) * spec.model.kept_share(spec.batch.T))
    in_gradient = held | {
        "gradients": adapter,
        "block_inputs": inputs,
        "temporaries": gradient.temp_size_in_bytes - inputs,
    }
    evaluation = 0
    if spec.evaluation is not None:
        evaluation = _temporaries(compile_evaluation(gpu, model, spec.evaluation, run["loss_chunk"]))

    # of one device's parts: a run's pages are of whole arrays, and each device has its share of each
    pages = Pages(tx, mine.adapter, max(page_bytes * adapter // max(_bytes(model.adapter), 1), 1))
    programs = max(sum(in_gradient.values()), sum(held.values()) + evaluation)
    resident = pages.resident(decide(paging, pages, usable_bytes(gpu), programs).resident_bytes)
    stays = sum(size for size, is_kept in zip(pages.bytes, resident, strict=True) if is_kept)
    update = max(map(_temporaries, compile_updates(gpu, pages, resident)))
    itemsize = jnp.dtype(spec.model.kept_dtype).itemsize
    loading = load_device_peak_bytes(spec.model.sizes, spec.model.quant, spec.form, itemsize, itemsize)
    loading -= _bytes(model.base)
    beside = lambda temporaries: {"allocator": allocator_bytes(gpu, temporaries)}  # noqa: E731
    phases = (
        Phase("loading", base | {"temporaries": loading}),
        Phase("gradient", in_gradient | {"optimizer": stays} | beside(gradient.temp_size_in_bytes)),
        Phase(
            "update",
            held
            | {"gradients": adapter, "optimizer": stays + pages.in_flight_bytes(resident), "temporaries": update}
            | beside(update),
        ),
        Phase("evaluation", held | {"optimizer": stays, "temporaries": evaluation} | beside(evaluation)),
    )
    paged = sum(pages.bytes) - stays
    pinned = paged + offloaded
    return Memory(
        tuple(_ordered(phase) for phase in phases),
        tuple(pages.bytes),
        resident,
        sum(pages.bytes),
        pinned,
        load_host_peak_bytes(spec.model.sizes, spec.form, itemsize) + pinned,
        wire,
    )


def _temporaries(compiled: Any) -> int:
    """Bytes on the device beside a program's arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def _ordered(phase: Phase) -> Phase:
    return Phase(phase.name, {kind: phase.bytes[kind] for kind in KINDS if phase.bytes.get(kind)})


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(memory: Memory, gpu: PlannedGpu) -> bool:
    """Whether the peak is within what a run may take."""
    return memory.peak.total <= usable_bytes(gpu)


def usable_bytes(gpu: PlannedGpu) -> int:
    """What JAX's allocator may take; the rest is for CUDA's context, cuBLAS's workspace and the loaded programs."""
    return gpu.memory_bytes if gpu.is_here else math.floor(MEMORY_FRACTION * gpu.memory_bytes)
