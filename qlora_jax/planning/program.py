"""The train step's programs, compiled from shapes alone for a GPU."""

from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.optim.pages import Pages
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.topology import compile_for, on_gpu
from qlora_jax.train.backward import compiler_options as remat_options
from qlora_jax.train.shapes import AbstractModel, BatchShape
from qlora_jax.train.step import make_evaluation, make_gradient


def compile_gradient(
    gpu: PlannedGpu,
    model: AbstractModel,
    batch: BatchShape,
    dropout: bool,
    loss_chunk: int = 1024,
    max_grad_norm: float = 0.3,
    extra_options: dict[str, str] | None = None,
) -> Any:
    """`train/step.make_gradient`, as the loop calls it, compiled for `gpu`: a jax.stages.Compiled.

    Of its memory_analysis() host_temp_size_in_bytes is pinned host memory (block inputs where remat offloads them), not
    part of temp_size_in_bytes. `extra_options` are the compiler's, beside those of the loop.
    """
    gradient = make_gradient(model.graph, loss_chunk, max_grad_norm)
    shape = (batch.G, batch.B, batch.T)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0)) if dropout else None
    segments = tokens if batch.packed else None
    arguments = on_gpu(gpu, (model.adapter, model.base, tokens, mask, key, segments))
    options = remat_options(model.merged().remat) | (extra_options or {})
    return compile_for(gpu, gradient, *arguments, compiler_options=options)


def compile_evaluation(gpu: PlannedGpu, model: AbstractModel, batch: BatchShape, loss_chunk: int = 1024) -> Any:
    """`train/step.make_evaluation` of one batch [B, T], compiled for `gpu`."""
    shape = (batch.B, batch.T)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    segments = tokens if batch.packed else None
    arguments = on_gpu(gpu, (model.adapter, model.base, tokens, mask, segments))
    return compile_for(gpu, make_evaluation(model.graph, loss_chunk), *arguments)


def compile_update(gpu: PlannedGpu, pages: Pages) -> Any:
    """The update of the page with the most state, compiled for `gpu`."""
    program = pages.update_program(pages.largest)
    arguments = on_gpu(gpu, program.arguments)
    return compile_for(gpu, program.function, *arguments, donate_argnums=program.donate_argnums)
