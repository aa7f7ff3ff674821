"""Cross-entropy over target tokens, in chunks: logits of more than `chunk` tokens never exist at once.

loss = sum over target tokens t of -log softmax(head h_{t-1})[token_t]  /  number of target tokens
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from qlora_jax.models.chunks import chunk_size
from qlora_jax.models.head import Head, head_logits


def summed_loss(
    hidden: jax.Array, head: jax.Array | Head, tokens: jax.Array, loss_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood of the target tokens, and their number.

    Args:
      hidden: [B, T, D], final hidden states.
      head: [V, D].
      tokens: int32 [B, T].
      loss_mask: bool [B, T]; True where token t is a target, predicted from t - 1. Position 0 never counts.
      chunk: tokens whose logits exist at a time; recomputed in the backward pass.
    Returns:
      float32 [] nats, float32 [] count.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(total, inputs):
        rows, labels, counted = inputs
        return total + jnp.sum(token_nll(head_logits(rows, head), labels) * counted), None

    total, _ = jax.lax.scan(add_chunk, jnp.float32(0), _chunks(hidden, tokens, loss_mask, chunk))
    return total, jnp.sum(loss_mask[:, 1:]).astype(jnp.float32)


def summed_loss_and_hits(
    hidden: jax.Array, head: jax.Array | Head, tokens: jax.Array, loss_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As summed_loss, with the number of target tokens that are the likeliest between the two: float32 [] each."""

    def add_chunk(totals, inputs):
        rows, labels, counted = inputs
        logits = head_logits(rows, head)
        hits = jnp.sum((jnp.argmax(logits, axis=-1) == labels) & counted).astype(jnp.float32)
        return (totals[0] + jnp.sum(token_nll(logits, labels) * counted), totals[1] + hits), None

    start = (jnp.float32(0), jnp.float32(0))
    (nats, hits), _ = jax.lax.scan(add_chunk, start, _chunks(hidden, tokens, loss_mask, chunk))
    return nats, hits, jnp.sum(loss_mask[:, 1:]).astype(jnp.float32)


def _chunks(hidden: jax.Array, tokens: jax.Array, loss_mask: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """Hidden states [n, chunk, D], the labels of the tokens after them and whether they count [n, chunk]."""
    labels = tokens[:, 1:].reshape(-1)
    counted = loss_mask[:, 1:].reshape(-1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    chunk = min(chunk, rows.shape[0])
    padding = -rows.shape[0] % chunk
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, chunk, rows.shape[-1])
    labels = jnp.pad(labels, (0, padding)).reshape(-1, chunk)
    return rows, labels, jnp.pad(counted, (0, padding)).reshape(-1, chunk)


def loss_and_gradient(
    norm: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    head: jax.Array | Head,
    tokens: jax.Array,
    loss_mask: jax.Array,
    chunk: int,
    head_sum: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """summed_loss(norm(x), ...) and its gradient: beside x and d x, arrays of a chunk's size only.

    Where the head trains, also one chunk's gradient of it, which is added to `head_sum` at once.

    Args:
      norm: the final norm, token by token.
      x: [B, T, D], what the last layer gives. head, tokens, loss_mask, chunk: as in summed_loss.
      head_sum: float32 [V, D], the head's gradient so far; None for a frozen head.
    Returns:
      float32 [] nats, d x [B, T, D] in x's dtype, and head_sum with the head's gradient added.
    """
    rows = x.reshape(-1, x.shape[-1])
    labels = jnp.roll(tokens, -1, axis=1).reshape(-1)
    counted = jnp.roll(loss_mask.at[:, 0].set(False), -1, axis=1).reshape(-1)
    size = chunk_size(rows.shape[0], chunk)

    def add_chunk(carry, number):
        total, dx, head_sum = carry
        start = jnp.minimum(number * size, rows.shape[0] - size)  # the last chunk repeats rows: they count once
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, size)  # noqa: E731
        weight = cut(counted) & (start + jnp.arange(size) >= number * size)

        def chunk_loss(rows, head):
            return jnp.sum(token_nll(head_logits(norm(rows), head), cut(labels)) * weight)

        if head_sum is None:
            loss, fresh = jax.value_and_grad(chunk_loss)(cut(rows), head)
        else:
            loss, (fresh, of_head) = jax.value_and_grad(chunk_loss, (0, 1))(cut(rows), head)
            head_sum = head_sum + (of_head.weight if isinstance(of_head, Head) else of_head)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, cut(dx) + fresh, start, axis=0)
        return (total + loss, dx, head_sum), None

    start = (jnp.float32(0), jnp.zeros_like(rows), head_sum)
    (total, dx, head_sum), _ = jax.lax.scan(add_chunk, start, jnp.arange(-(-rows.shape[0] // size)))
    return total, dx.reshape(x.shape), head_sum


def token_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """float32 [..., V], int32 [...] -> float32 [...]: -log softmax(logits)[label], nats."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
