"""One optimizer step's gradient: summed over micro-batches, with the factor that makes it the clipped mean.

The factor is applied where the sums are used, page by page: multiplied here, they would stand in memory twice.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from qlora_jax.mesh.place import Devices, on_mesh
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.divided.part import own_part
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.train.backward import add_gradient
from qlora_jax.train.loss import summed_loss, summed_loss_and_hits


class StepMetrics(NamedTuple):
    loss: jax.Array  # float32 [], nats a target token
    grad_norm: jax.Array  # float32 [], global norm before clipping
    target_tokens: jax.Array  # float32 []
    factor: jax.Array  # float32 [], what makes the summed gradient the mean over target tokens, clipped


def make_gradient(
    graph: Any,
    loss_chunk: int,
    max_grad_norm: float | jax.Array,
    merge: Callable[..., Decoder] = nnx.merge,
    devices: Devices | None = None,
) -> Callable[..., tuple[Any, StepMetrics]]:
    """The function to jit: gradients of the adapter alone.

    Args:
      graph: of `lora.split`.
      loss_chunk: see summed_loss.
      max_grad_norm: global norm above which gradients are scaled down to it; 0 does not clip.
      merge: makes the model of (graph, adapter, base).
      devices: of a model that has `shards`: they divide B among them, or the tokens of each row.
    Returns:
      gradient(adapter, base, tokens int32 [G, B, T], loss_mask bool [G, B, T], key or None, segments int32 [G, B, T] or
      None) -> (sums, StepMetrics), G being micro-batches, segments as Decoder takes them. The gradient is
      metrics.factor * sums: the mean over all target tokens of the G * B sequences. However these are cut it is
      the same within rounding: a row's dropout too depends on its place among the G * B alone.
    """

    def merged(graph, adapter, base):
        return own_part(merge(graph, adapter, base))

    def micro_loss(adapter, base, tokens, loss_mask, key, segments):
        return loss_of(merged(graph, adapter, base), tokens, loss_mask, key, segments, loss_chunk)[0]

    def gradient(adapter, base, tokens, loss_mask, key, segments=None):
        shards = getattr(merge(graph, adapter, base), "shards", None)

        def add(total, inputs):
            micro_tokens, micro_mask, index, micro_segments = inputs
            rows = micro_tokens.shape[0]
            first = index * rows if shards is None else index * rows * shards.row_parts + shards.first_row(rows)
            micro_key = None if key is None else DropoutKey(key, first)
            model = merged(graph, adapter, base)
            if model.remat == "none" or type(model) is not Decoder:  # add_gradient knows a decoder's layers alone
                loss, grads = jax.value_and_grad(micro_loss)(
                    adapter, base, micro_tokens, micro_mask, micro_key, micro_segments
                )
                return jax.tree.map(jnp.add, total, (loss, grads)), None
            loss, grads = add_gradient(model, total[1], micro_tokens, micro_mask, micro_key, loss_chunk, micro_segments)
            return (total[0] + loss, grads), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter))
        (loss, grads), _ = jax.lax.scan(add, zero, (tokens, loss_mask, jnp.arange(tokens.shape[0]), segments))
        count = jnp.sum(loss_mask[:, :, 1:]).astype(jnp.float32)
        if shards is not None:
            loss, count, grads = shards.total(loss), shards.total_of_rows(count), shards.summed(grads)
        scale = 1 / jnp.maximum(count, 1)
        norm = (optax.tree.norm(grads) if shards is None else shards.norm(grads)) * scale
        clip = jnp.where((max_grad_norm > 0) & (norm > max_grad_norm), max_grad_norm / norm, 1.0)
        return grads, StepMetrics(loss * scale, norm, count, scale * clip)

    return gradient if devices is None else on_mesh(gradient, devices, lambda adapter: (adapter, PartitionSpec()))


def make_evaluation(
    graph: Any, loss_chunk: int, devices: Devices | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """evaluate(adapter, base, tokens int32 [B, T], loss_mask bool [B, T], segments int32 [B, T] or None) -> (summed
    nats, target tokens), without dropout. `devices` divide B among them."""

    def evaluate(adapter, base, tokens, loss_mask, segments=None):
        model = own_part(nnx.merge(graph, adapter, base))
        nats, _, count = loss_and_hits(model, tokens, loss_mask, segments, loss_chunk)
        shards = getattr(model, "shards", None)
        return (nats, count) if shards is None else shards.total((nats, count))

    return evaluate if devices is None else on_mesh(evaluate, devices, lambda adapter: PartitionSpec())


def loss_of(
    model: Any,
    tokens: jax.Array,
    loss_mask: jax.Array,
    key: jax.Array | DropoutKey | None,
    segments: jax.Array | None,
    loss_chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(summed nats, target tokens) of rows; of an encoder its own `loss`, and rows in place of tokens."""
    if hasattr(model, "loss"):
        return model.loss(tokens, loss_mask, dropout_key=key, segments=segments, chunk=loss_chunk)
    hidden, tokens, loss_mask = _predicted(model, tokens, loss_mask, key, segments)
    return summed_loss(hidden, model.head_weight(), tokens, loss_mask, loss_chunk)


def loss_and_hits(
    model: Any, tokens: jax.Array, loss_mask: jax.Array, segments: jax.Array | None, loss_chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(summed nats, targets that were the likeliest, targets) without dropout; not for differentiation."""
    if hasattr(model, "loss_and_hits"):
        return model.loss_and_hits(tokens, loss_mask, loss_chunk)
    hidden, tokens, loss_mask = _predicted(model, tokens, loss_mask, None, segments)
    return summed_loss_and_hits(hidden, model.head_weight(), tokens, loss_mask, loss_chunk)


def _predicted(
    model: Any, tokens: jax.Array, loss_mask: jax.Array, key: Any, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden states, tokens, mask) as summed_loss takes them: an encoder-decoder makes rows of its own."""
    if hasattr(model, "predicted"):
        return model.predicted(tokens, loss_mask, key)
    hidden = model(tokens, dropout_key=key, segments=segments)[0]
    return hidden, model.followed(tokens), model.followed(loss_mask)


def mean_loss(
    evaluation: Callable[..., Any],
    adapter: Any,
    base: Any,
    batches: Iterable[Mapping],
    parts: int = 1,
    given: Callable[[Any], Any] = lambda x: x,
) -> float | None:
    """Mean loss over the target tokens of all batches, nats; None without any batch.

    `evaluation`: of make_evaluation, compiled. `batches`: tokens and loss_mask [B, T], and segments of packed rows.
    `parts`: devices that divide B among them. `given`: puts an input where they take it.
    """
    total, count, any_batch = 0.0, 0.0, False
    for batch in batches:
        nats, targets = evaluation(adapter, base, *map(given, arrays_of(batch, parts)))
        total, count, any_batch = total + float(nats), count + float(targets), True
    return total / max(count, 1) if any_batch else None


def arrays_of(batch: Mapping[str, np.ndarray], parts: int = 1) -> list[np.ndarray]:
    """tokens and loss_mask, and the segments of packed rows; with rows that have no target, so that `parts` divide
    them."""
    arrays = [batch[name] for name in ("tokens", "loss_mask", "segments") if name in batch]
    return [np.pad(x, ((0, -len(x) % parts), (0, 0))) if len(x) % parts else x for x in arrays]


# One function for one model: JAX finds what it traced and compiled by the function, so that a second run of a model in
# one process starts where the first one ended, and a plan of it too.
_gradient_of = functools.lru_cache(maxsize=8)(make_gradient)
_evaluation_of = functools.lru_cache(maxsize=8)(make_evaluation)


def gradient_of(graph: Any, loss_chunk: int, max_grad_norm: float, devices: Devices | None = None) -> Callable:
    """make_gradient's, the same for the same arguments."""
    return _gradient_of(graph, loss_chunk, max_grad_norm, devices=devices)


def evaluation_of(graph: Any, loss_chunk: int, devices: Devices | None = None) -> Callable:
    """make_evaluation's, the same for the same arguments."""
    return _evaluation_of(graph, loss_chunk, devices)
