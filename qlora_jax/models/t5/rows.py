"""A row of a batch, prompt and answer one after the other, as encoder and decoder take it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.t5.pair import Pair


class Rows(NamedTuple):
    source: jax.Array  # int32 [B, S], padded at the right
    seen: jax.Array  # bool [B, S]: a token of the prompt
    inputs: jax.Array  # int32 [B, T]: the labels behind the start token
    labels: jax.Array  # int32 [B, T]
    counted: jax.Array  # bool [B, T]: a label that is learned


def split_rows(tokens: jax.Array, loss_mask: jax.Array, pair: Pair, source_len: int = 0, target_len: int = 0) -> Rows:
    """Cuts each row before its first target.

    Args:
      tokens: int32 [B, T]. loss_mask: bool [B, T], True for targets; the first place is none, as for decoders. A row
        without targets is all padding.
      source_len, target_len: tokens that a prompt and an answer have at most; 0: as many as the row.
    """
    loss_mask, width = loss_mask.at[:, 0].set(False), tokens.shape[1]
    S, T = (min(width, most) if most else width for most in (source_len, target_len))
    first = jnp.argmax(loss_mask, axis=1)[:, None]  # 0 of a row without targets
    seen = jnp.arange(S) < first
    places = first + jnp.arange(T)
    inside = jnp.minimum(places, width - 1)
    labels = jnp.take_along_axis(tokens, inside, axis=1)
    counted = jnp.take_along_axis(loss_mask, inside, axis=1) & (places < width)
    start = jnp.full((len(tokens), 1), pair.start_id, tokens.dtype)
    source = jnp.where(seen, tokens[:, :S], pair.pad_id)
    return Rows(source, seen, jnp.concatenate([start, labels[:, :-1]], axis=1), labels, counted)
