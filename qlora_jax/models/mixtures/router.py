"""Which experts a token takes, and by which weights: every token takes as many as the model says, none is dropped.

    logits = W x (+ b)                                                        W [E, D] in 16 bits, logits float32
    weights = top(softmax(logits)), summing to one or not;  or softmax(top(logits))

The auxiliary loss (transformers' load_balancing_loss_func; Fedus et al., 2021, equations 4 to 6) is

    E * sum_e f_e p_e      f_e: share of tokens that take expert e, p_e: mean of softmax(logits)_e, in all layers

f has no gradient, so that of a layer's softmax is E f_e / tokens whatever the layer: once all layers were computed it
is one array [E], which `Balance` hands to the layers as they are computed again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.errors import InputError
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.kind import Experts
from qlora_jax.models.layers import Frozen

STATISTICS = "router_statistics"  # name (models/kept) of what the auxiliary loss is made of, float32 [2, E] a layer


class Balance(NamedTuple):
    """What a step's auxiliary loss asks of each layer's router."""

    counted: jax.Array  # bool [B, T]: no padding
    gradient: jax.Array  # float32 [E], of the loss by the sum of softmax(logits) over the tokens that count


class Router(nnx.Module):
    """weight: [E, D]. bias: [E] or None."""

    def __init__(self, weight: jax.Array, bias: jax.Array | None = None):
        self.weight = Frozen(weight)
        if bias is not None:
            self.bias = Frozen(bias)

    def __call__(self, x: jax.Array, experts: Experts, balance: Balance | None) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> experts int32 [B * T, k] and their weights float32 [B * T, k] of each token."""
        logits = dense_matmul(x, self.weight.get_value().astype(x.dtype), 1, jnp.float32)
        if hasattr(self, "bias"):
            logits = logits + self.bias.get_value().astype(jnp.float32)
        logits = logits.reshape(-1, experts.count)
        if balance is not None:
            logits = _balanced(logits, experts.per_token, balance)
        if experts.chosen_alone:
            top, chosen = jax.lax.top_k(logits, experts.per_token)
            return chosen, jax.nn.softmax(top, axis=-1)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts.per_token)
        if experts.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return chosen, weights


def _balanced(logits: jax.Array, k: int, balance: Balance) -> jax.Array:
    """logits [M, E], whose gradient has the auxiliary loss's added; its statistics get their name."""
    counted = balance.counted.reshape(-1, 1).astype(jnp.float32)
    shares = jax.nn.softmax(logits, axis=-1)
    taken = jax.nn.one_hot(jax.lax.top_k(shares, k)[1], logits.shape[-1], dtype=jnp.float32).sum(1)
    statistics = checkpoint_name(jnp.stack([jnp.sum(taken * counted, 0), jnp.sum(shares * counted, 0)]), STATISTICS)
    return _pulled(logits, statistics[1], balance.gradient)


@jax.custom_vjp
def _pulled(logits: jax.Array, sums: jax.Array, gradient: jax.Array) -> jax.Array:
    """logits; going back, `sums` gets `gradient`."""
    return logits


_pulled.defvjp(
    lambda logits, sums, gradient: (logits, gradient),
    lambda gradient, d_logits: (d_logits, gradient, jnp.zeros_like(gradient)),
)


def balancing_loss(statistics: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The auxiliary loss float32 [], and its gradient by each layer's sums of softmax(logits), float32 [E].

    Args:
      statistics: float32 [L, 2, E], of all layers: tokens that took an expert, and sums of softmax(logits).
      tokens: int32 [], that count.
    """
    L, _, E = statistics.shape
    taken, sums = jnp.sum(statistics, axis=0)
    rows = jnp.maximum(L * tokens, 1).astype(jnp.float32)
    return E * jnp.sum(taken / rows * (sums / rows)), E * taken / rows / rows


def check_router_loss(section: Any, sizes: ModelConfig) -> None:
    """Raises InputError where router_aux_loss_coef of a config's `model` section cannot be had."""
    coefficient, chunk = section.router_aux_loss_coef, section.sequence_chunk
    if not coefficient:
        return
    if not sizes.sparse:
        raise InputError(f"model.router_aux_loss_coef is {coefficient}, but this model has no experts: set it to 0")
    if chunk or section.remat == "none":
        key, value = ("sequence_chunk", "0") if chunk else ("remat", "block")
        raise InputError(
            f"model.router_aux_loss_coef is {coefficient}: that loss is summed over whole sequences, layer by layer; "
            f"set model.{key}={value}"
        )


def start_of_balance(coefficient: float, experts: Experts | None, loss_mask: jax.Array) -> Balance | None:
    """What the forward pass takes; None where there is no auxiliary loss.

    Tokens up to a row's last target count: padding stands behind it. loss_mask: bool [B, T].
    """
    if not coefficient:
        return None
    assert experts is not None
    counted = jax.lax.cummax(loss_mask.astype(jnp.int32), axis=1, reverse=True) > 0
    return Balance(counted, jnp.zeros(experts.count, jnp.float32))
