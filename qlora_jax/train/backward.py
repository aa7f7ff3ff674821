"""Gradients of the adapter, layer by layer: reverse mode written out over the stacked layers.

    x_0 = embedding;  x_{l+1} = layer_l(x_l);  loss = head(x_L)          forward: only x_0 .. x_{L-1} are kept
    d x_L = d loss;  (d adapter_l, d x_l) = pullback of layer_l at x_l   backward: each layer is computed once more

Each layer's gradient is added to its place in the accumulators as soon as it is there. Differentiating the whole scan
would make a fresh gradient of the whole adapter beside the accumulators, for every micro-batch: 3.2 GB of a 65B model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.llama import Llama
from qlora_jax.train.loss import summed_loss


def add_gradient(
    model: Llama, total: Any, tokens: jax.Array, loss_mask: jax.Array, key: jax.Array | None, loss_chunk: int
) -> tuple[jax.Array, Any]:
    """Adds one micro-batch's gradient of the summed loss to `total`.

    Args:
      model: with an adapter on its blocks; everything else is frozen.
      total: gradients so far, a state like the adapter of `lora.split`; its buffers are updated in place.
      tokens: int32 [B, T]. loss_mask: bool [B, T].
      key: of dropout; None is no dropout.
      loss_chunk: see summed_loss.
    Returns:
      float32 [] summed nats of the target tokens, and the new total.
    """
    block, adapter, frozen = model.layers(nnx.LoRAParam, ...)
    apply_layer = partial(model.apply_layer, block, model.context(tokens), key)
    numbers = jnp.arange(model.config.L)

    def forward(x, layer):
        mine, others, number = layer
        y, _ = apply_layer((mine, others), x, number)
        return y, x

    x, inputs = jax.lax.scan(forward, model.embed(tokens), (adapter, frozen, numbers))

    def head(x):
        return summed_loss(model.norm(x), model.head_weight(), tokens, loss_mask, loss_chunk)[0]

    loss, dx = jax.value_and_grad(head)(x)

    def backward(carry, layer):
        (dx, total), (x, mine, others, number) = carry, layer
        _, pullback = jax.vjp(lambda mine, x: apply_layer((mine, others), x, number)[0], mine, x)
        gradient, dx = pullback(dx)
        total = jax.tree.map(lambda sums, g: sums.at[number].add(g), total, gradient)
        return (dx, total), None

    blocks = (inputs, adapter, frozen, numbers)
    (_, sums), _ = jax.lax.scan(backward, (dx, total["blocks"]), blocks, reverse=True)
    total["blocks"] = sums
    return loss, total
