"""What a pack of A adapters takes on a GPU: the base once, and of adapters, optimizer state and activations A each.

    A is at most what `largest_pack` finds; the planner of a grid cuts its points into packs of that size.

Stands on the pack's own program, compiled for the GPU: optimizer state never leaves the device, and XLA's buffer
assignment counts what selecting between old and new state takes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.mesh.axes import Axes
from qlora_jax.models.dropout import DropoutRate
from qlora_jax.models.sizes import linear_weights
from qlora_jax.packs.run import STEPS_A_CALL
from qlora_jax.packs.step import (
    Member,
    MemberState,
    Optimizer,
    Steps,
    initial_optimizer,
    pack_evaluation_of,
    steps_of,
)
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.memory import base_bytes, usable_bytes
from qlora_jax.planning.roofline import roofline
from qlora_jax.planning.topology import compile_for, on_gpu
from qlora_jax.train.backward import compiler_options
from qlora_jax.train.checks import check_values
from qlora_jax.train.shapes import AbstractModel, BatchShape, abstract_model
from qlora_jax.train.spec import RunSpec, read_spec


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Of one pack on one GPU."""

    A: int
    device_peak_bytes: int
    device_usable_bytes: int
    step_seconds_roofline: float  # of all members' step
    tokens_per_step: int  # of all members

    @property
    def fits(self) -> bool:
        return self.device_peak_bytes <= self.device_usable_bytes


def plan_pack(config: Any, gpu: PlannedGpu, A: int) -> PackPlan:
    """Plans a pack of A members like `config`, the largest of them: its rank, layers and longest rows. A cut that the
    config leaves open is train/cut.default_cut.

    Raises InputError: a mistake in the config, a model whose sizes are not known, no compiler for the GPU.
    """
    check_values(config, jax.default_backend() if gpu.is_here else "gpu")
    Axes.of_one(config.mesh, "a pack trains on")
    spec = read_spec(config)
    model = abstract_model(spec.model)
    over = "map" if gpu.is_here and jax.default_backend() == "cpu" else "vmap"
    peak = _peak_bytes(_compile_steps(config, spec, model, gpu, A, over))
    if spec.evaluation is not None:
        optimizer = _bytes(jax.eval_shape(lambda x: initial_optimizer(config.optimizer, x), _stacked(model.adapter, A)))
        peak = max(peak, optimizer + _peak_bytes(_compile_evaluation(config, spec, model, gpu, A, over)))
    return PackPlan(A, peak, usable_bytes(gpu), _seconds(spec, model, gpu, A), A * spec.batch.tokens)


def largest_pack(config: Any, gpu: PlannedGpu, most: int) -> PackPlan | None:
    """The plan of the largest pack of at most `most` members that fits; None where one alone does not.

    Compiles packs of one and two: what each further member adds is their difference. Then the found size, and smaller
    ones for as long as that does not fit.
    """
    one = plan_pack(config, gpu, 1)
    if not one.fits or most == 1:
        return one if one.fits else None
    two = plan_pack(config, gpu, 2)
    if not two.fits:
        return one
    added = max(two.device_peak_bytes - one.device_peak_bytes, 1)
    A = min(most, 1 + (one.device_usable_bytes - one.device_peak_bytes) // added)
    while A > 2:
        plan = plan_pack(config, gpu, A)
        if plan.fits:
            return plan
        A = min(A - 1, A * 9 // 10)
    return two


def steps_program(config: Any, spec: RunSpec, model: AbstractModel, A: int, over: str) -> tuple[Any, tuple[Any, ...]]:
    """The program that trains a pack, to be jitted with its first argument donated, and the shapes of its arguments."""
    adapter = _stacked(model.adapter, A)
    optimizer = jax.eval_shape(lambda x: initial_optimizer(config.optimizer, x), adapter)
    state = MemberState(adapter, optimizer, _shape((A,), jnp.bool_))
    number, batch = _shape((A,), jnp.float32), spec.batch
    keys = jax.eval_shape(jax.vmap(jax.random.key), _shape((A,), jnp.int32))
    member = Member(number, DropoutRate(_shape((A,), jnp.int32), number), keys, number, number, _shape((A,), jnp.int32))
    shape = (A, STEPS_A_CALL, batch.G, batch.B, batch.T)
    count = _shape((), jnp.int32)
    tokens = _shape(shape, jnp.int32)
    segments = tokens if batch.packed else None
    of = Steps(_shape(shape[:2], jnp.float32), tokens, _shape(shape, jnp.bool_), segments, count, count)
    has_dropout = spec.model.lora.dropout > 0
    optimizer_kind = Optimizer.of(config.optimizer)
    function = steps_of(model.graph, optimizer_kind, config.train.loss_chunk, has_dropout, over)
    return function, (state, model.base, member, of)


def _compile_steps(config: Any, spec: RunSpec, model: AbstractModel, gpu: PlannedGpu, A: int, over: str) -> Any:
    function, arguments = steps_program(config, spec, model, A, over)
    options = compiler_options(spec.model.remat)
    return compile_for(gpu, function, *on_gpu(gpu, arguments), compiler_options=options, donate_argnums=(0,))


def _compile_evaluation(config: Any, spec: RunSpec, model: AbstractModel, gpu: PlannedGpu, A: int, over: str) -> Any:
    assert spec.evaluation is not None
    shape = (spec.evaluation.B, spec.evaluation.T)
    tokens = _shape(shape, jnp.int32)
    function = pack_evaluation_of(model.graph, config.train.loss_chunk, over)
    arguments = (
        _stacked(model.adapter, A), model.base, _shape((A,), jnp.float32), _shape((A,), jnp.bool_),
        tokens, _shape(shape, jnp.bool_), tokens if spec.evaluation.packed else None,
    )  # fmt: skip
    return compile_for(gpu, function, *on_gpu(gpu, arguments))


def _seconds(spec: RunSpec, model: AbstractModel, gpu: PlannedGpu, A: int) -> float:
    """Roofline of a step over all rows: the base moves once, each adapter and its state for itself."""
    batch = BatchShape(spec.batch.G, A * spec.batch.B, spec.batch.T)
    base = base_bytes(model)
    packed = base["codes"] + base["scales"] or base["linear_16bit"]
    adapter = sum(leaf.size for leaf in jax.tree.leaves(model.adapter))
    rows = dataclasses.replace(spec, batch=batch)
    once = roofline(rows, gpu, packed, linear_weights(spec.model.sizes), adapter, 0)
    return once.seconds + (A - 1) * 24 * adapter / gpu.bytes_per_second


def _peak_bytes(compiled: Any) -> int:
    """Arguments, results and temporaries; what is updated in place counts once."""
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def _stacked(tree: Any, A: int) -> Any:
    return jax.tree.map(lambda leaf: _shape((A, *leaf.shape), leaf.dtype), tree)


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
