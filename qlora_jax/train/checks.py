"""What no run can have: values of a config that are refused before anything is read."""

import math
from typing import Any

import jax

from pallas_kernels import nf4_matmul
from pallas_kernels.gpu import has_jax_triton
from qlora_jax import lora
from qlora_jax.data.chat_examples import TEMPLATES
from qlora_jax.data.examples import Lengths
from qlora_jax.errors import InputError
from qlora_jax.feed.sources import sources_of
from qlora_jax.mesh.axes import Axes
from qlora_jax.models import attention
from qlora_jax.models.decoder import REMAT
from qlora_jax.models.divided import tokens
from qlora_jax.optim.paged import PAGING
from qlora_jax.optim.schedules import paging
from qlora_jax.quant.tensor import check_kernel
from qlora_jax.settings import AUTO
from qlora_jax.train import mmlu
from qlora_jax.train.loggers import check_loggers

_CHOICES = {
    ("model", "compute_dtype"): ("bfloat16", "float32"),
    ("model", "remat"): (*REMAT, AUTO),
    ("model", "attention"): attention.IMPLEMENTATIONS,
    ("model", "kernel"): nf4_matmul.BACKENDS,
    ("data", "template"): TEMPLATES,
    ("optimizer", "paging"): PAGING,
}
_AT_LEAST_ONE = (
    ("train", "steps"), ("train", "batch_size"), ("train", "loss_chunk"),
    ("train", "checkpoint_every"), ("train", "keep_checkpoints"), ("train", "log_every"),
    ("optimizer", "page_bytes"), ("eval", "batch_size"), ("eval", "mmlu_batch_size"),
)  # fmt: skip


def check_config(config: Any) -> None:
    """Raises InputError for what no run can have, before anything is read."""
    if not config.model.path:
        raise InputError("model.path is empty; give a checkpoint folder or a hub name: --config.model.path=...")
    if not config.data.path and not config.data.batches:
        raise InputError("data.path is empty; give a data file or a hub data set: --config.data.path=...")
    check_loggers(config.train.loggers)
    check_values(config)


def check_values(config: Any, backend: str | None = None) -> None:
    """Raises InputError for values that no run can have, whatever model and data it names.

    `backend` is what the run will compute on ("gpu", "cpu"); None asks JAX, which starts it.
    """
    for (section, key), allowed in _CHOICES.items():
        if config[section][key] not in allowed:
            raise InputError(f"{section}.{key} is {config[section][key]!r}; expected {' or '.join(allowed)}")
    for section, key in _AT_LEAST_ONE:
        if config[section][key] < 1:
            raise InputError(f"{section}.{key} is {config[section][key]}; expected at least 1")
    _check_cut(config)
    Lengths.of(config.data)
    if config.data.path and not config.data.batches:
        sources_of(config.data)
    mmlu.check(config.eval)
    paging(config.optimizer)
    lora.select_modules(config.lora.modules_to_save, adds_tokens=False, tied=False)
    _check_optimizer(config.optimizer)
    if not 0 <= config.model.router_aux_loss_coef < math.inf:
        raise InputError(f"model.router_aux_loss_coef is {config.model.router_aux_loss_coef}; expected 0 or more")
    if config.model.sequence_chunk < 0:
        raise InputError(f"model.sequence_chunk is {config.model.sequence_chunk}; expected tokens, or 0 for off")
    if config.model.sequence_chunk and config.model.attention not in ("auto", "chunked"):
        raise InputError(
            f"model.attention is {config.model.attention!r}, which needs the whole sequence's queries, but "
            f"model.sequence_chunk is {config.model.sequence_chunk}: set model.attention=chunked, or sequence_chunk=0"
        )
    if config.data.packing:
        _check_packing(config)
    if config.model.attention == "flash":
        _check_flash(config.model)
    needs_gpu = [key for key in ("kernel", "attention") if config.model[key] not in ("xla", "auto", "chunked")]
    if needs_gpu and (backend := backend or jax.default_backend()) != "gpu":
        key = needs_gpu[0]
        raise InputError(
            f"model.{key} is {config.model[key]!r}, which needs an NVIDIA GPU; this process computes on "
            f"{backend}: set model.{key}=xla"
        )
    check_kernel(config.quant.format, config.model.kernel)
    _check_mesh(config)


def _check_mesh(config: Any) -> None:
    axes = Axes.of(config.mesh)
    if axes.sequence > 1 and config.model.attention not in tokens.IMPLEMENTATIONS:
        raise InputError(
            f"model.attention is {config.model.attention!r}, which takes whole rows alone, and mesh.sequence = "
            f"{axes.sequence} divides their tokens: set model.attention=auto"
        )
    if axes.fsdp * axes.expert * axes.sequence == 1:
        return
    if config.model.remat == "none":
        raise InputError(
            f'model.remat "none" keeps every layer that was gathered, and the mesh ({axes}) divides the model\'s '
            f"arrays: set model.remat=block, or divide rows alone by {axes.all_rows()}"
        )


def _check_flash(section: Any) -> None:
    if section.compute_dtype == "float32":
        raise InputError(
            'model.attention is "flash", which computes in 16 bits, and model.compute_dtype is "float32": set '
            "model.compute_dtype=bfloat16, or model.attention=auto"
        )
    if not has_jax_triton():
        raise InputError(
            'model.attention is "flash", whose kernels need jax-triton: pip install jax-triton==0.4.1, or set '
            "model.attention=auto"
        )


def _check_cut(config: Any) -> None:
    G = config.train.grad_accum
    if G == AUTO:
        return
    if not isinstance(G, int) or G < 1:
        raise InputError(f"train.grad_accum is {G!r}; expected at least 1, or {AUTO}")
    if not config.data.batches and config.train.batch_size % G:
        raise InputError(
            f"train.batch_size {config.train.batch_size} cannot be cut into train.grad_accum {G} equal micro-batches; "
            "make it a multiple"
        )


def _check_optimizer(section: Any) -> None:
    """Numbers of which NaN is none: a comparison with it is never true."""
    if not (0 < section.learning_rate < math.inf and 0 <= section.max_grad_norm < math.inf):
        raise InputError("optimizer.learning_rate must be positive and optimizer.max_grad_norm 0 (no clipping) or more")
    if not 0 <= section.weight_decay < math.inf:
        raise InputError(f"optimizer.weight_decay is {section.weight_decay}; expected 0 or more")
    for key in ("beta1", "beta2"):
        if not 0 <= section[key] < 1:
            raise InputError(f"optimizer.{key} is {section[key]}; expected 0 to below 1")
    if not 0 < section.eps < math.inf:
        raise InputError(
            f"optimizer.eps is {section.eps}; expected a positive number: gradients of a fresh adapter's A are zero, "
            "and Adam would divide 0 by 0"
        )


def _check_packing(config: Any) -> None:
    if config.model.attention == "cudnn":
        raise InputError(
            'data.packing needs attention that stays within an example, and model.attention is "cudnn", whose form in '
            "JAX has none: set model.attention=auto, or data.packing=False"
        )
    if config.data.batches:
        raise InputError("data.packing is True, but data.batches is a file of ready rows: set data.packing=False")
