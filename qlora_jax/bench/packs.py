"""Real steps of a pack on a model of random weights: the pack's own program, timed; see benchmark.py."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.bench.synthetic import random_model
from qlora_jax.errors import InputError
from qlora_jax.models.dropout import DropoutRate
from qlora_jax.packs.run import STEPS_A_CALL
from qlora_jax.packs.step import (
    Member,
    MemberState,
    Optimizer,
    Steps,
    initial_optimizer,
    over_members,
    steps_of,
)
from qlora_jax.train.backward import compiler_options
from qlora_jax.train.memory import Program, out_of_memory_said, peak_device_bytes
from qlora_jax.train.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class MeasuredPack:
    """Of the timed steps."""

    members: int
    over: str  # how the program goes over members: map | vmap
    step_seconds: tuple[float, ...]  # of all members' step, update included
    losses: tuple[float, ...]  # of the last step, nats a target token, one a member
    peak_device_bytes: int
    peak_source: str  # allocator: of this process so far | compiler

    def tokens_per_second(self, tokens_per_step: int) -> float:
        """Of the median step; `tokens_per_step` is one member's."""
        return self.members * tokens_per_step / statistics.median(self.step_seconds)


def measure_pack(
    config: Any, spec: RunSpec, A: int, steps: int, warmup: int, tick: Callable[[], None] = lambda: None, seed: int = 0
) -> MeasuredPack:
    """Makes the model and A adapters, takes `warmup` + `steps` steps of all of them, and times the latter.

    Args:
      config: as configs/base.py, of every member; each has tokens of its own. spec: `read_spec` of it.
      tick: called after each step.
    Raises:
      InputError: the model or a step does not fit the device, or a loss that is not finite.
    """
    with out_of_memory_said():
        model = random_model(spec.model, seed)
        adapter = jax.tree.map(lambda leaf: jnp.stack([leaf] * A), model.adapter)
        over = over_members("auto")
        state = MemberState(adapter, initial_optimizer(config.optimizer, adapter), jnp.ones(A, bool))
        del adapter
        has_dropout = spec.model.lora.dropout > 0
        program = Program(
            steps_of(model.graph, Optimizer.of(config.optimizer), config.train.loss_chunk, has_dropout, over),
            compiler_options(spec.model.remat),
            donate_argnums=(0,),
        )
        settings, seconds = _settings(config, spec, A, warmup + steps), []
        loss = np.zeros(A)
        for step in range(warmup + steps):
            of = _one_step(config, spec, A, step, seed)
            begun = time.perf_counter()
            state, taken = program(state, model.base, settings, of)
            loss = np.asarray(taken.loss)[:, 0]
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begun)
            if not np.isfinite(loss).all():
                raise InputError(f"step {step + 1} of the pack: losses {loss.tolist()}; lower optimizer.learning_rate")
            tick()
        peak, source = peak_device_bytes(program.peak_bytes)
        return MeasuredPack(A, over, tuple(seconds[warmup:]), tuple(map(float, loss)), peak, source)


def _settings(config: Any, spec: RunSpec, A: int, steps: int) -> Member:
    rate = DropoutRate.of(spec.model.lora.dropout)

    def column(value: float, dtype: Any) -> np.ndarray:
        return np.full(A, value, dtype)

    return Member(
        column(spec.model.lora.scale, np.float32),
        DropoutRate(column(rate.threshold, np.int32), column(rate.kept_scale, np.float32)),
        jax.random.split(jax.random.key(config.train.seed + 1), A),
        column(config.optimizer.max_grad_norm, np.float32),
        column(config.optimizer.weight_decay, np.float32),
        column(steps, np.int32),
    )


def _one_step(config: Any, spec: RunSpec, A: int, step: int, seed: int) -> Steps:
    """A run's call, of which one step is to be taken, every token a target."""
    batch = spec.batch
    shape = (A, STEPS_A_CALL, batch.G, batch.B, batch.T)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))
    tokens = np.zeros(shape, np.int32)
    tokens[:, :1] = rng.integers(0, spec.model.sizes.V, (A, 1, *shape[2:]), np.int32)
    rates = np.full(shape[:2], config.optimizer.learning_rate, np.float32)
    return Steps(rates, tokens, np.ones(shape, bool), None, np.int32(step), np.int32(1))
