"""A config's plan on one GPU: memory by kind, the least time of a step, and what would make it fit."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qlora_jax.models.sizes import linear_weights
from qlora_jax.optim.schedules import make_optimizer, paging
from qlora_jax.planning.advice import Change, first_that_fits
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.memory import Memory, fits, plan_memory, usable_bytes
from qlora_jax.planning.roofline import Roofline, roofline
from qlora_jax.settings import flatten
from qlora_jax.train.setup import check_values
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

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.gpu)

    def to_json(self, name: str) -> dict[str, Any]:
        batch = self.spec.batch
        tokens = batch.tokens
        return {
            "gpu": name,
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
            "tokens_per_step": tokens,
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
    say(f"compiling a step of {spec.batch.G} x {spec.batch.B} x {spec.batch.T} tokens for {gpu.device_kind}")
    memory = _memory(config, spec, gpu)
    change: Change | None = None
    tried: list[Change] = []
    if advise and not fits(memory, gpu) and memory.held_bytes <= usable_bytes(gpu):

        def would_fit(change: Change) -> bool:
            say(f"does not fit; compiling with {change}")
            changed = _changed(config, change)
            return fits(_memory(changed, read_spec(changed), gpu), gpu)

        change, tried = first_that_fits(spec, paging(config.optimizer), would_fit)
    weights = linear_weights(spec.model.sizes)
    kinds = {kind: size for phase in memory.phases for kind, size in phase.bytes.items() if kind != "temporaries"}
    packed = kinds.get("codes", 0) + kinds.get("scales", 0) or kinds["linear_16bit"]
    paged = memory.optimizer_bytes - sum(
        size for size, stays in zip(memory.page_bytes, memory.resident, strict=True) if stays
    )
    time = roofline(spec, gpu, packed, weights, kinds["adapters"] // 4, paged)
    return Plan(gpu, spec, memory, time, change, tuple(tried))


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
