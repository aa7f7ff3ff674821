"""A mixture's auxiliary loss in training: whether it is on, and which tokens it counts."""

import jax
import jax.numpy as jnp

from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.router import Balance


def check_router_loss(coefficient: float, remat: str, sequence_chunk: int, sizes: ModelConfig) -> None:
    """Raises InputError where model.router_aux_loss_coef cannot be had."""
    if not coefficient:
        return
    if not sizes.sparse:
        raise InputError(f"model.router_aux_loss_coef is {coefficient}, but this model has no experts: set it to 0")
    if sequence_chunk or remat == "none":
        key, value = ("sequence_chunk", "0") if sequence_chunk else ("remat", "block")
        raise InputError(
            f"model.router_aux_loss_coef is {coefficient}: that loss is summed over whole sequences, layer by layer; "
            f"set model.{key}={value}"
        )


def start_of_balance(model: Decoder, loss_mask: jax.Array) -> Balance | None:
    """What the forward pass takes; None where there is no auxiliary loss.

    Tokens up to a row's last target count: padding stands behind it. loss_mask: bool [B, T].
    """
    if not model.router_aux_loss_coef:
        return None
    assert model.config.kind.experts is not None
    counted = jax.lax.cummax(loss_mask.astype(jnp.int32), axis=1, reverse=True) > 0
    return Balance(counted, jnp.zeros(model.config.kind.experts.count, jnp.float32))
