"""Cross-entropy over target tokens, in chunks: logits of more than `chunk` tokens never exist at once.

loss = sum over target tokens t of -log softmax(head h_{t-1})[token_t]  /  number of target tokens
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.chunks import chunk_size
from qlora_jax.models.head import Head, axes_of, rows_of, token_losses, token_losses_and_hits


def summed_loss(
    hidden: jax.Array, head: jax.Array | Head, tokens: jax.Array, loss_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood of the target tokens, and their number.

    Args:
      hidden: [B, T, D], final hidden states.
      head: [V, D].
      tokens: int32 [B, T], or [B, T + 1] with the token that follows, where hidden is of a part of each row.
      loss_mask: bool of that shape; True where token t is a target, predicted from t - 1. Position 0 never counts.
      chunk: tokens whose logits exist at a time; recomputed in the backward pass.
    Returns:
      float32 [] nats, float32 [] count.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(total, inputs):
        rows, labels, counted = inputs
        return total + jnp.sum(token_losses(rows, head, labels) * counted), None

    total, _ = jax.lax.scan(add_chunk, jnp.float32(0), _chunks(hidden, tokens, loss_mask, chunk))
    return total, jnp.sum(loss_mask[:, 1:]).astype(jnp.float32)


def summed_loss_and_hits(
    hidden: jax.Array, head: jax.Array | Head, tokens: jax.Array, loss_mask: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As summed_loss, with the number of target tokens that are the likeliest between the two: float32 [] each.

    Logits are computed of target tokens alone. Not for differentiation: the loop is as long as there are targets.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), _targets(hidden, head, tokens, loss_mask, chunk)

    def add_chunk(number, totals):
        chosen, labels, counted, _ = targets.chunk(number)
        losses, are_hits = token_losses_and_hits(targets.take(rows, chosen), head, labels)
        hits = jnp.sum(are_hits & counted).astype(jnp.float32)
        return totals[0] + jnp.sum(losses * counted), totals[1] + hits

    nats, hits = jax.lax.fori_loop(0, targets.chunks, add_chunk, (jnp.float32(0), jnp.float32(0)))
    return nats, hits, targets.total.astype(jnp.float32)


class _Targets(NamedTuple):
    """Which tokens predict a target, first of all: beyond them a chunk has nothing to compute.

    In a chat an answer is a small part of a row, and a head of 262,144 tokens is a fifth of a model of 4B.
    """

    places: jax.Array  # int32 [chunks * size]: of tokens in [B * T] that predict a target, rising; then numbers beyond
    labels: jax.Array  # int32 [B * T]
    total: jax.Array  # int32 []
    size: int  # tokens of a chunk
    axis: tuple[str, ...]  # of a mesh, whose devices go through as many chunks as the one that has most targets

    @classmethod
    def of(
        cls, T: int, tokens: jax.Array, loss_mask: jax.Array, chunk: int, axis: tuple[str, ...] = ()
    ) -> "_Targets":
        counted = jnp.roll(loss_mask.at[:, 0].set(False), -1, axis=1)[:, :T].reshape(-1)
        n = counted.size
        size = chunk_size(n, chunk)
        number = jnp.arange(-(-n // size) * size, dtype=jnp.int32)
        # no two are alike, those beyond neither: a scatter may rely on that
        places = jnp.sort(jnp.where(jnp.pad(counted, (0, number.size - n)), number, number + number.size))
        return cls(places, jnp.roll(tokens, -1, axis=1)[:, :T].reshape(-1), jnp.sum(counted), size, axis)

    @property
    def chunks(self) -> jax.Array:
        """int32 []: so many have targets."""
        mine = (self.total + self.size - 1) // self.size
        return mine if not self.axis else jax.lax.pmax(mine, self.axis)

    def take(self, rows: jax.Array, chosen: jax.Array) -> jax.Array:
        """Rows [B * T, D] of a chunk [size, D]: zeros where another device has targets, and this one has none."""
        if not self.axis:
            return jnp.take(rows, chosen, axis=0)
        return rows.at[chosen].get(mode="fill", fill_value=0)

    def chunk(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """[size] each: which rows to compute, their labels, which of them count, and places for what is computed.

        The last chunk is filled up with the first row that counts: whatever is wrong in others is not met.
        """
        first = number * self.size
        places = jax.lax.dynamic_slice_in_dim(self.places, first, self.size)
        counted = first + jnp.arange(self.size) < self.total
        rows = jnp.where(counted, places, self.places[0])
        return rows, jnp.take(self.labels, rows, mode="clip"), counted, places


def _targets(x: jax.Array, head: Any, tokens: jax.Array, loss_mask: jax.Array, chunk: int) -> _Targets:
    return _Targets.of(x.shape[1], tokens, loss_mask, chunk, rows_of(axes_of(head)))


def _chunks(hidden: jax.Array, tokens: jax.Array, loss_mask: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """Hidden states [n, chunk, D], the labels of the tokens after them and whether they count [n, chunk]."""
    labels = tokens[:, 1:].reshape(-1)
    counted = loss_mask[:, 1:].reshape(-1)
    rows = hidden[:, : tokens.shape[1] - 1].reshape(-1, hidden.shape[-1])
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
    """summed_loss(norm(x), ...) and its gradient: beside x and d x, arrays of a chunk's size only, of targets alone.

    Where the head trains, also one chunk's gradient of it, which is added to `head_sum` at once.

    Args:
      norm: the final norm, token by token.
      x: [B, T, D], what the last layer gives. head, tokens, loss_mask, chunk: as in summed_loss.
      head_sum: float32 [V, D], the head's gradient so far; None for a frozen head.
    Returns:
      float32 [] nats, d x [B, T, D] in x's dtype, and head_sum with the head's gradient added.
    """
    rows, targets = x.reshape(-1, x.shape[-1]), _targets(x, head, tokens, loss_mask, chunk)

    def add_chunk(number, carry):
        total, dx, head_sum = carry
        chosen, labels, counted, places = targets.chunk(number)

        def chunk_loss(rows, head):
            return jnp.sum(token_losses(norm(rows), head, labels) * counted)

        if head_sum is None:
            loss, fresh = jax.value_and_grad(chunk_loss)(targets.take(rows, chosen), head)
        else:
            loss, (fresh, of_head) = jax.value_and_grad(chunk_loss, (0, 1))(targets.take(rows, chosen), head)
            head_sum = head_sum + (of_head.weight if isinstance(of_head, Head) else of_head)
        dx = dx.at[places].set(fresh, mode="drop", unique_indices=True, indices_are_sorted=True)
        return total + loss, dx, head_sum

    start = (jnp.float32(0), jnp.zeros_like(rows), head_sum)
    total, dx, head_sum = jax.lax.fori_loop(0, targets.chunks, add_chunk, start)
    return total, dx.reshape(x.shape), head_sum
