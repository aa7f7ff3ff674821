"""Real optimizer steps on a model of random weights: the loop's own programs, its optimizer and its decisions, timed.

Every step has the tokens of the longest batch, all of them targets; the learning rate, dropout and paging are the
config's. What is left out of a run is what is not the device's: data, checkpoints, evaluation, logs.
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.bench.synthetic import random_model
from qlora_jax.bench.trace import kernel_seconds
from qlora_jax.errors import InputError
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages
from qlora_jax.optim.residency import RESERVED, decide
from qlora_jax.optim.schedules import make_optimizer, paging
from qlora_jax.train.backward import compiler_options
from qlora_jax.train.memory import Program, memory_limit, out_of_memory_said, peak_device_bytes, peak_host_bytes
from qlora_jax.train.shapes import BatchShape
from qlora_jax.train.spec import RunSpec
from qlora_jax.train.step import evaluation_of, gradient_of


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of the timed steps; those of the warm-up before them are only in `losses`."""

    gradient_seconds: tuple[float, ...]
    update_seconds: tuple[float, ...]
    losses: tuple[float, ...]  # nats a target token
    grad_norms: tuple[float, ...]
    peak_device_bytes: int
    peak_source: str  # allocator | compiler
    peak_host_bytes: int
    residency: str  # which part of the optimizer's state stays on the device, and why
    optimizer_bytes: int
    pages: int
    pages_resident: int
    page_traffic_bytes: int  # each way, an update
    resident_update_seconds: tuple[float, ...] | None  # of an optimizer that pages nothing; None: all is on the device
    # already, or it does not fit there
    trainable_params: int
    gradient_bytes: int  # of the compiled gradient: arguments, results and temporaries
    peaks: dict[str, int]  # the allocator's peak after each stage of the first step; empty where none is counted
    kernel_seconds: dict[str, float]  # of a step that was profiled, the longest first; empty without one

    @property
    def step_seconds(self) -> tuple[float, ...]:
        return tuple(sum(pair) for pair in zip(self.gradient_seconds, self.update_seconds, strict=True))

    def tokens_per_second(self, batch: BatchShape) -> float:
        """Of the median step."""
        return batch.tokens / statistics.median(self.step_seconds)


def measure(
    config: Any,
    spec: RunSpec,
    steps: int,
    warmup: int,
    tick: Callable[[], None] = lambda: None,
    seed: int = 0,
    trace: bool = False,
) -> Measured:
    """Makes the model, takes `warmup` + `steps` optimizer steps and times the latter.

    Args:
      config: as configs/base.py. spec: `read_spec` of it.
      tick: called after each step.
      trace: profile one step more.
    Raises:
      InputError: the model or a step does not fit the device, or a loss that is not finite, with its step.
    """
    with out_of_memory_said():
        return Bench(config, spec, seed).run(steps, warmup, tick, trace)


class Bench:
    """The state of a run on random weights."""

    def __init__(self, config: Any, spec: RunSpec, seed: int = 0):
        self.config, self.spec, self.seed = config, spec, seed
        self.peaks: dict[str, int] = {}
        model = random_model(spec.model, seed)
        self.adapter, self.base = model.adapter, model.base
        jax.block_until_ready(self.base)
        self._note_peak("model")
        self.has_dropout = spec.model.lora.dropout > 0
        self.gradient = Program(
            gradient_of(model.graph, config.train.loss_chunk, config.optimizer.max_grad_norm),
            compiler_options(spec.model.remat),
        )
        self.evaluation = Program(evaluation_of(model.graph, config.train.loss_chunk))
        self.pages = Pages(
            make_optimizer(config.optimizer, config.train.steps), self.adapter, config.optimizer.page_bytes
        )
        self.optimizer, self.residency = self._make_optimizer()
        self._note_peak("compiled")
        self.states = self.optimizer.init(self.adapter)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def run(self, steps: int, warmup: int, tick: Callable[[], None], trace: bool = False) -> Measured:
        gradient_seconds, update_seconds = [], []
        grads: Any = None
        for step in range(warmup + steps):
            del grads  # not beside the next ones
            grads, factor, gradient, update = self._step(step)
            if step >= warmup:
                gradient_seconds.append(gradient)
                update_seconds.append(update)
            tick()
        kernels: dict[str, float] = {}
        if trace:
            del grads
            grads, factor, kernels = self._traced_step(warmup + steps)
        peak, source = peak_device_bytes(self.gradient.peak_bytes + self.optimizer.resident_bytes)
        host = peak_host_bytes()
        resident = sum(self.optimizer.resident)
        return Measured(
            tuple(gradient_seconds),
            tuple(update_seconds),
            tuple(self.losses[: warmup + steps]),
            tuple(self.norms[: warmup + steps]),
            peak,
            source,
            host,
            self.residency,
            sum(self.pages.bytes),
            len(self.pages),
            resident,
            traffic_bytes(self.optimizer),
            self._time_resident(grads, factor, steps),
            sum(leaf.size for leaf in jax.tree.leaves(self.adapter)),
            self.gradient.peak_bytes,
            self.peaks,
            kernels,
        )

    def _note_peak(self, stage: str) -> None:
        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            self.peaks.setdefault(stage, stats["peak_bytes_in_use"])

    def _make_optimizer(self) -> tuple[PagedOptimizer, str]:
        """As the loop makes it: residency follows from the largest programs, that of evaluation among them."""
        tokens, mask, key = self._batch(0)
        self.gradient.compile(self.adapter, self.base, tokens, mask, key)
        if (evaluation := self.spec.evaluation) is not None:
            shape = (evaluation.B, evaluation.T)
            batch = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.bool_)]
            self.evaluation.compile(self.adapter, self.base, *batch)
        programs = max(self.gradient.peak_bytes, self.evaluation.peak_bytes)
        residency = decide(paging(self.config.optimizer), self.pages, memory_limit(), programs)
        return PagedOptimizer(self.pages, self.adapter, residency.resident_bytes), residency.reason

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """Tokens int32 [G, B, T], mask bool [G, B, T], dropout key of a step."""
        batch = self.spec.batch
        shape = (batch.G, batch.B, batch.T)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(step,)))
        tokens = rng.integers(0, self.spec.model.sizes.V, shape, np.int32)
        key = jax.random.fold_in(jax.random.key(self.config.train.seed + 1), step) if self.has_dropout else None
        return tokens, np.ones(shape, bool), key

    def _step(self, step: int) -> tuple[Any, Any, float, float]:
        """Gradient sums and their factor; seconds of the gradient and of the update."""
        tokens, mask, key = self._batch(step)
        begun = time.perf_counter()
        grads, metrics = self.gradient(self.adapter, self.base, tokens, mask, key)
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        computed = time.perf_counter()
        self._note_peak("gradient")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step + 1}: loss {loss}, gradient norm {norm} on random weights; lower optimizer.learning_rate, "
                "or take fewer steps"
            )
        self.losses.append(loss)
        self.norms.append(norm)
        self.adapter, self.states = self.optimizer.update(self.adapter, grads, self.states, metrics.factor)
        jax.block_until_ready(self.adapter)
        updated = time.perf_counter()
        self._note_peak("update")
        return grads, metrics.factor, computed - begun, updated - computed

    def _traced_step(self, step: int) -> tuple[Any, Any, dict[str, float]]:
        """Gradient sums and their factor, and what each kernel of the step took."""
        with tempfile.TemporaryDirectory(prefix="trace-") as folder:
            with jax.profiler.trace(folder):
                grads, factor, _, _ = self._step(step)
            return grads, factor, kernel_seconds(Path(folder))

    def _time_resident(self, grads: Any, factor: Any, updates: int) -> tuple[float, ...] | None:
        """Seconds of updates whose state stays on the device; None where it did already, or does not fit."""
        stats = jax.devices()[0].memory_stats() or {}
        if all(self.optimizer.resident) or not fits_resident(self.pages, stats):
            return None
        self.states.clear()
        optimizer = PagedOptimizer(self.pages, self.adapter)
        states, seconds = optimizer.init(self.adapter), []
        for _ in range(updates + 1):
            begun = time.perf_counter()
            self.adapter, states = optimizer.update(self.adapter, grads, states, factor)
            jax.block_until_ready(self.adapter)
            seconds.append(time.perf_counter() - begun)
        return tuple(seconds[1:])  # the first compiles


def fits_resident(pages: Pages, stats: dict[str, int]) -> bool:
    """Whether all of the state fits beside what a device holds between a gradient and its update; `stats` is its
    memory_stats(), empty where it counts none."""
    if "bytes_limit" not in stats:
        return True
    free = (1 - RESERVED) * stats["bytes_limit"] - stats["bytes_in_use"]
    return sum(pages.bytes) + max(pages.bytes) <= free


def traffic_bytes(optimizer: PagedOptimizer) -> int:
    """What an update brings to the device, and as much back: the state of the pages that live in host memory, but for
    scalars, which never move."""
    pages = optimizer.pages
    travelling = [page for page, stays in zip(pages.pages, optimizer.resident, strict=True) if not stays]
    leaves = [leaf for page in travelling for leaf in jax.tree.leaves(pages.state_shapes(page))]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim > pages.axis)
