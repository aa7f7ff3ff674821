"""A config's plan on one GPU: memory by kind, the least time of a step, and what would make it fit."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qlora_jax.models.sizes import linear_weights
from qlora_jax.optim.pages import state_bytes
from qlora_jax.optim.residency import reserved
from qlora_jax.optim.schedules import make_optimizer, paging
from qlora_jax.planning.advice import Change, first_that_fits
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.memory import Memory, base_bytes, fits, held_bytes, plan_memory, usable_bytes
from qlora_jax.planning.roofline import Roofline, roofline
from qlora_jax.planning.topology import traced_for
from qlora_jax.settings import flatten
from qlora_jax.train.checks import check_values
from qlora_jax.train.cut import Choice, Cut, attention_of, choose, described, with_cut
from qlora_jax.train.memory import memory_limit
from qlora_jax.train.shapes import abstract_model
from qlora_jax.train.spec import RunSpec, read_spec

EFFICIENCIES = (1.0, 0.6, 0.4)  # of the roofline, for which tokens/s are stated


@dataclasses.dataclass(frozen=True)
class Plan:
    gpu: PlannedGpu
    spec: RunSpec
    memory: Memory
    time: Roofline
    change: Change | None  # what would make it fit; None where it fits, or where nothing tried does
    tried: tuple[Change, ...]  # what does not
    choice: Choice  # of the cut into micro-batches

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.gpu)

    def to_json(self, name: str) -> dict[str, Any]:
        batch = self.spec.batch
        devices = self.spec.axes.devices
        tokens = batch.tokens * self.spec.axes.row_parts
        return {
            "gpu": name,
            "devices": devices,
            "mesh": self.spec.axes._asdict(),
            "device_kind": self.gpu.device_kind,
            "fits": self.fits,
            "device_memory_bytes": self.gpu.memory_bytes,
            "device_peak_bytes": self.memory.peak.total,
            "device_peak_phase": self.memory.peak.name,
            "device_bytes": self.memory.peak.bytes,
            "phases": {phase.name: phase.bytes for phase in self.memory.phases},
            "device_usable_bytes": usable_bytes(self.gpu),
            "optimizer_state_bytes": self.memory.optimizer_bytes,
            "optimizer_pages": len(self.memory.resident),
            "optimizer_pages_resident": sum(self.memory.resident),
            "pinned_host_bytes": self.memory.pinned_host_bytes,
            "load_host_peak_bytes": self.memory.load_host_peak_bytes,
            "step_seconds_roofline": self.time.seconds,
            "step_flops": self.time.flops,
            "step_device_bytes_moved": self.time.bytes,
            "step_bus_bytes_each_way": self.time.bus_bytes,
            "step_wire_bytes_received": self.time.wire_bytes,
            "step_wire_bytes": self.memory.wire,
            "tokens_per_step": tokens,
            "micro_batch_rows": batch.B,
            "remat": self.spec.model.remat,
            "cut_reason": self.choice.reason,
            "tokens_per_second": {str(share): share * tokens / self.time.seconds for share in EFFICIENCIES},
            "batch": {"micro_batches": batch.G, "sequences": batch.B, "length": batch.T},
            "would_fit_with": None if self.change is None else self.change.keys,
            "would_not_fit_with": [change.keys for change in self.tried],
        }


def make_plan(
    config: Any,
    gpu: PlannedGpu,
    say: Callable[[str], None] = lambda line: None,
    advise: bool = True,
    length: int | None = None,
) -> Plan:
    """Plans the run that `config` (as configs/base.py) describes.

    Args:
      config: a ConfigDict; nothing it names is read but the sizes of the model, and data that alone says how long its
        rows are.
      gpu: of GPUS, or `gpu_here()`.
      say: takes lines on what is being compiled.
      length: tokens of the longest row, where the data has none as long as the config allows.
      advise: look for a change that fits, where the run does not; each try compiles.
    Raises:
      InputError: a mistake in the config, a model whose sizes are not known, no compiler for the GPU.
    """
    check_values(config, jax.default_backend() if gpu.is_here else "gpu")
    spec = read_spec(config, length)
    choice, memory = _choose_cut(config, spec, gpu, say)
    config, spec = with_cut(config, spec.to_cut, choice.cut), spec.with_cut(choice.cut)
    change: Change | None = None
    tried: list[Change] = []
    if advise and not fits(memory, gpu) and memory.held_bytes <= usable_bytes(gpu):

        def would_fit(change: Change) -> bool:
            say(f"does not fit; compiling with {change}")
            changed = _changed(config, change)
            return fits(_memory(changed, read_spec(changed), gpu), gpu)

        change, tried = first_that_fits(spec, paging(config.optimizer), would_fit)
    mine = spec.of_one()
    weights = linear_weights(mine.model.sizes)
    kinds = {kind: size for phase in memory.phases for kind, size in phase.bytes.items() if kind != "temporaries"}
    packed = kinds.get("codes", 0) + kinds.get("scales", 0) or kinds["linear_16bit"]
    paged = memory.optimizer_bytes - sum(
        size for size, stays in zip(memory.page_bytes, memory.resident, strict=True) if stays
    )
    adapter_params = kinds["adapters"] // 4
    if spec.axes.devices > 1:  # of the whole model, which each device computes, or those along tensor together
        model = abstract_model(spec.model, spec.axes)
        whole = base_bytes(model)
        packed = (whole["codes"] + whole["scales"] or whole["linear_16bit"]) // spec.axes.tensor
        adapter_params = sum(leaf.size for leaf in jax.tree.leaves(model.adapter)) // spec.axes.tensor
    time = roofline(mine, gpu, packed, weights, adapter_params, paged, sum(memory.wire.values()))
    return Plan(gpu, spec, memory, time, change, tuple(tried), choice)


def _choose_cut(config: Any, spec: RunSpec, gpu: PlannedGpu, say: Callable[[str], None]) -> tuple[Choice, Memory]:
    """As a run on this GPU cuts its batches (train/loop.py), and what it takes then."""
    memories: dict[Cut, Memory] = {}

    def take(cut: Cut) -> Memory:
        if cut not in memories:
            G, B, T = spec.to_cut.rows // cut.rows, cut.rows, spec.batch.T
            say(f"compiling a step of {G} x {B} x {T} tokens, remat {cut.remat}, for {gpu.device_kind}")
            memories[cut] = _memory(config, spec.with_cut(cut), gpu)
        return memories[cut]

    limit = None if gpu.is_here and memory_limit() is None else usable_bytes(gpu)
    held, state = held_bytes(spec), 0
    if paging(config.optimizer) == "never":
        mine = abstract_model(spec.model, spec.axes).of_one()
        state = state_bytes(make_optimizer(config.optimizer, config.train.steps), mine.adapter)

    def fits(cut: Cut) -> bool:
        return limit is None or take(cut).gradient_bytes + state <= limit - reserved(limit)

    with traced_for(gpu):
        attention = attention_of(spec.to_cut.model, spec.to_cut.T)
    wanted = spec.to_cut._replace(model=dataclasses.replace(spec.to_cut.model, attention=attention))
    choice = choose(wanted, held + state, limit, fits)
    if spec.to_cut.is_open:
        say(described(spec.to_cut, choice))
    return choice, take(choice.cut)


def _memory(config: Any, spec: RunSpec, gpu: PlannedGpu) -> Memory:
    o = config.optimizer
    tx = make_optimizer(o, config.train.steps)
    run = {"loss_chunk": config.train.loss_chunk, "max_grad_norm": o.max_grad_norm}
    return plan_memory(spec, gpu, tx, o.page_bytes, paging(o), run)


def _changed(config: Any, change: Change) -> Any:
    changed = copy.deepcopy(config)
    known = flatten(changed)
    with changed.unlocked():
        for key, value in change.keys.items():
            assert key in known, key
            changed.update_from_flattened_dict({key: value})
    return changed
