"""Gradients of the adapter, layer by layer: reverse mode written out over the stacked layers.

    x_0 = embedding;  x_{l+1} = layer_l(x_l);  loss = head(x_L)          forward: only x_0 .. x_{L-1} are kept
    d x_L = d loss;  (d adapter_l, d x_l) = pullback of layer_l at x_l   backward: each layer is computed once more

Each layer's gradient is added to its place in the accumulators as soon as it is there. Differentiating the whole scan
would make a fresh gradient of the whole adapter beside the accumulators, for every micro-batch: 3.2 GB of a 65B model.
Where embedding or head train (lora.modules_to_save), the head's gradient is added with each chunk of the loss, d x_0 to
the rows of the embedding that the tokens took.

Where model.remat is "block+offload", x_0 .. x_{L-1} go to pinned host memory as they come and return one by one. Where
it is "selective", the forward pass also keeps those values of each layer that spare the backward pass all products with
frozen weights but those of d x (models/kept.NAMES). Of sequences that go through a layer in chunks x_l alone is kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.models.kept import NAMES, joined, keeping, taken_apart, with_kept
from qlora_jax.models.mixtures.router import STATISTICS, balancing_loss, start_of_balance
from qlora_jax.train.loss import loss_and_gradient


def compiler_options(remat: str) -> dict[str, str]:
    """XLA's options for a program that calls add_gradient.

    What is computed again is written out here. XLA's own pass for it takes host memory for device memory: where inputs
    are offloaded it looks for minutes for what it cannot find (70B at 65,536 tokens: 287 s of compilation, not 31).
    Who offloads is short of memory: fusions with several results are off too, which on Ampere dequantize a weight for
    the forward and the backward product at once (33B: 0.2 GB).
    """
    passes = "rematerialization,multi_output_fusion"
    return {"xla_disable_hlo_passes": passes} if remat == "block+offload" else {}


def kept_bytes(
    sizes: ModelConfig, remat: str, B: int, T: int, itemsize: int, low_rank: int = 0, log_sums: int = 0
) -> int:
    """Bytes of what is kept of all layers: x_0 .. x_{L-1}, and where remat is "selective" the named values.

    They lie in pinned host memory where remat is "block+offload", else on the device. A compiled program's
    host_temp_size_in_bytes says the same, and its temp_size_in_bytes holds what of them is on the device even so. Of
    "none" JAX decides what is kept: more than this. T as the layers see it (Decoder.pad), itemsize of activations;
    low_rank: the ranks of a layer's adapters together. log_sums: float32 numbers that flash attention keeps of a token,
    one for each query head.
    """
    widths = sizes.D
    if remat == "selective":
        gates = 1 if sizes.kind.linear.keys() & {"gate", "gate_up"} else 0
        feed_forward = 0 if sizes.sparse else (1 + gates) * sizes.F  # experts are computed again from what they took
        attended = 0 if sizes.kind.parallel else sizes.D
        widths += 2 * sizes.N * sizes.H + 2 * sizes.K * sizes.H + attended + feed_forward + low_rank
    sums = log_sums if remat == "selective" else 0
    return sizes.L * B * T * (widths * itemsize + 4 * sums)


def add_gradient(
    model: Decoder,
    total: Any,
    tokens: jax.Array,
    loss_mask: jax.Array,
    key: jax.Array | DropoutKey | None,
    loss_chunk: int,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Adds one micro-batch's gradient of the summed loss to `total`.

    Args:
      model: with an adapter on its blocks; everything else is frozen.
      total: gradients so far, a state like the adapter of `lora.split`; its buffers are updated in place.
      tokens: int32 [B, T]. loss_mask: bool [B, T].
      key: of dropout; None is no dropout. A DropoutKey says which rows of a step's batch these are.
      loss_chunk: see summed_loss.
      segments: int32 [B, T], see Decoder; None: a row is one example.
    Returns:
      float32 [] summed nats of the target tokens, and the new total. Where model.router_aux_loss_coef is not 0, each
      target token's nats have that much of the auxiliary loss added (models/router.py).
    """
    lengths = model.lengths(tokens, segments)
    tokens, loss_mask = model.pad(tokens), model.pad(loss_mask)
    segments = None if segments is None else model.pad(segments)
    context = model.context(tokens, segments=segments, lengths=lengths)
    block, adapter, frozen = model.layers(nnx.LoRAParam, ...)
    key = None if key is None else DropoutKey.of(key).for_layers(model.config.L)  # drawn once, not in each layer
    apply_layer = partial(model.apply_layer, block, context, key)
    layers = _Layers(model, frozen)
    numbers = jnp.arange(model.config.L)
    offload = model.remat == "block+offload"
    names = NAMES if model.remat == "selective" else ()
    balance = start_of_balance(model.router_aux_loss_coef, model.config.kind.experts, loss_mask)
    tokens, targets = model.own(tokens), (model.followed(tokens), model.followed(loss_mask))
    if balance is not None:
        balance = balance._replace(counted=model.own(balance.counted))
        names, apply_layer = (*names, STATISTICS), partial(apply_layer, balance=balance)

    def forward(carry, layer):
        (x, here), (mine, others, number) = carry, layer
        here, ahead = layers.here(here, others, number + 1)
        compute = lambda x: apply_layer((layers.whole(mine), here[0]), x, number, stacks=here[1])[0]  # noqa: E731
        y, kept = keeping(compute, names)(x)
        of_routers = kept.pop(f"{STATISTICS} 0", None)
        if offload:
            return (y, ahead), (jax.device_put(x, jax.memory.Space.Host), of_routers)
        return (y, ahead), (joined({"x": x, **kept}), of_routers)

    start = (model.embed(tokens, context.positions), layers.gathered(0))
    (x, last), (inputs, of_routers) = jax.lax.scan(forward, start, (adapter, layers.cut, numbers))

    head = "embedding" if model.head is None else "head"
    head_sum = jax.tree.leaves(total[head])[0] if head in total else None
    loss, dx, head_sum = loss_and_gradient(model.norm, x, model.head_weight(), *targets, loss_chunk, head_sum)

    if balance is not None:
        weight = jnp.sum(targets[1][:, 1:]).astype(jnp.float32) * model.router_aux_loss_coef
        sums = of_routers, jnp.sum(balance.counted), weight
        of_routers, counted, all_targets = sums if model.shards is None else model.shards.total(sums)
        uneven, pull = balancing_loss(of_routers, counted)
        loss = loss + weight * uneven  # of all devices together: as often as there are targets
        apply_layer = partial(apply_layer, balance=balance._replace(gradient=all_targets * pull))

    def backward(carry, layer):
        (dx, total, here), (kept, mine, others, number) = carry, layer
        here, ahead = layers.here(here, others, number - 1)
        kept = {"x": jax.device_put(kept, jax.memory.Space.Device)} if offload else taken_apart(kept)
        x = kept.pop("x")
        compute = lambda mine, x: apply_layer((layers.whole(mine), here[0]), x, number, stacks=here[1])[0]  # noqa: E731
        _, pullback = jax.vjp(with_kept(compute, kept), mine, x)
        gradient, dx = pullback(dx)
        return (dx, jax.tree.map(partial(_added, number), total, gradient), ahead), None

    blocks = (inputs, adapter, layers.cut, numbers)
    (dx, sums, _), _ = jax.lax.scan(backward, (dx, total["blocks"], last), blocks, reverse=True)
    total["blocks"] = sums
    if head_sum is not None:
        total[head] = jax.tree.map(lambda _: head_sum, total[head])
    if "embedding" in total:
        dx = model.embedding_gradient(tokens, context.positions, dx)
        total["embedding"] = jax.tree.map(
            lambda sums: model.add_to_embedding(sums, tokens, dx), total["embedding"]
        )
    return loss, total


class _Layers:
    """The frozen arrays of one layer after the other.

    Where a device has all of them the scan cuts them. Where it has parts each layer is gathered while the one before is
    computed, and handed on: what the forward pass gathers last is what the backward pass begins with.
    """

    def __init__(self, model: Decoder, frozen: Any):
        self._model, self._frozen = model, frozen
        self._shards = model.shards if model.shards is not None and model.shards.gathers else None
        self.cut = frozen if self._shards is None else None  # what the scan cuts

    def gathered(self, number: Any) -> Any:
        """(frozen arrays, stacks of experts) of a layer from all devices, of the nearest where there is none of that
        number; None where the scan cuts them."""
        if self._shards is None:
            return None
        return self._shards.layer(self._frozen, number), self._model.gathered_stacks(number)

    def here(self, gathered: Any, cut: Any, following: Any) -> tuple[Any, Any]:
        """A layer's (frozen arrays, stacks of experts), and what the step after it begins with."""
        return ((cut, None), None) if self._shards is None else (gathered, self.gathered(following))

    def whole(self, adapter: Any) -> Any:
        """A layer's adapter from all devices."""
        return adapter if self._shards is None else self._shards.adapter(adapter, self._model.compute_dtype)


def _added(number: jax.Array, sums: jax.Array, gradient: jax.Array) -> jax.Array:
    """sums [L, ...] with a layer's gradient added in its place. A scatter would look first whether the place exists."""
    here = jax.lax.dynamic_index_in_dim(sums, number, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(sums, here + gradient.astype(sums.dtype), number, axis=0)
