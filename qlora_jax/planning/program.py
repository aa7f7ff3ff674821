"""The train step's programs, compiled from shapes alone for a GPU."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.mesh.place import Devices, mesh_of
from qlora_jax.optim.pages import Pages
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.topology import compile_for, described_devices, on_gpu
from qlora_jax.train.backward import compiler_options as remat_options
from qlora_jax.train.shapes import AbstractModel, BatchShape
from qlora_jax.train.step import evaluation_of, gradient_of


def compile_gradient(
    gpu: PlannedGpu,
    model: AbstractModel,
    batch: BatchShape,
    dropout: bool,
    loss_chunk: int = 1024,
    max_grad_norm: float = 0.3,
    extra_options: dict[str, str] | None = None,
) -> Any:
    """`train/step.gradient_of`, as the loop calls it, compiled for `gpu`: a jax.stages.Compiled.

    Of its memory_analysis() host_temp_size_in_bytes is pinned host memory (block inputs where remat offloads them), not
    part of temp_size_in_bytes. `extra_options` are the compiler's, beside those of the loop.
    """
    devices = devices_of(gpu, model)
    gradient = gradient_of(model.graph, loss_chunk, max_grad_norm, devices=devices)
    shape = (batch.G, batch.B * parts_of(model), batch.T)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0)) if dropout else None
    segments = (tokens,) if batch.packed else ()  # a run calls it without where there are none
    arguments = _placed(gpu, model, devices, (tokens, mask, key, *segments))
    options = remat_options(model.merged().remat) | (extra_options or {})
    return compile_for(gpu, gradient, *arguments, compiler_options=options, devices=devices and devices.mesh)


def compile_evaluation(gpu: PlannedGpu, model: AbstractModel, batch: BatchShape, loss_chunk: int = 1024) -> Any:
    """`train/step.evaluation_of` of one batch [B, T], compiled for `gpu`."""
    shape = (batch.B * parts_of(model), batch.T)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    segments = (tokens,) if batch.packed else ()
    devices = devices_of(gpu, model)
    arguments = _placed(gpu, model, devices, (tokens, mask, *segments))
    evaluation = evaluation_of(model.graph, loss_chunk, devices)
    return compile_for(gpu, evaluation, *arguments, devices=devices and devices.mesh)


def devices_of(gpu: PlannedGpu, model: AbstractModel) -> Devices | None:
    """Described ones for a model on a mesh; None for one device."""
    if model.shards is None:
        return None
    axes = model.shards.axes
    return Devices(mesh_of(axes, None if gpu.is_here else described_devices(gpu, axes.devices)), model.shards)


def parts_of(model: AbstractModel) -> int:
    """Devices that divide the rows of a batch."""
    return 1 if model.shards is None else model.shards.row_parts


def _placed(gpu: PlannedGpu, model: AbstractModel, devices: Devices | None, inputs: tuple[Any, ...]) -> Any:
    """A program's arguments: adapter, base and inputs."""
    if devices is None:
        return on_gpu(gpu, (model.adapter, model.base, *inputs))
    states = [on_gpu(gpu, tree, devices.shardings(tree)) for tree in (model.adapter, model.base)]
    return (*states, *(on_gpu(gpu, x, jax.tree.map(devices.rows, x)) for x in inputs))


def compile_updates(gpu: PlannedGpu, pages: Pages, resident: Sequence[bool]) -> list[Any]:
    """The updates of an optimizer's state, compiled for `gpu`: of all pages that stay on the device together, and of
    that with the most state of those that travel."""
    staying = [index for index, kept in enumerate(resident) if kept]
    travelling = [index for index, kept in enumerate(resident) if not kept]
    compiled = []
    for indices in ([staying] if staying else []) + ([[pages.largest(travelling)]] if travelling else []):
        program = pages.update_program(indices)
        arguments = on_gpu(gpu, program.arguments)
        compiled.append(compile_for(gpu, program.function, *arguments, donate_argnums=program.donate_argnums))
    return compiled
