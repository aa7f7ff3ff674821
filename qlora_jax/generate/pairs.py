"""Generation of an encoder-decoder begins here: prompts go through the encoder once, and the decoder is given its start
token. From there on it is decoded as a decoder is, a token at a time (decode.py)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@partial(jax.jit, static_argnames=("graph", "room"))
def begin(
    graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array, room: int
) -> tuple[Any, jax.Array, jax.Array]:
    """Reads prompts.

    Args:
      tokens: int32 [B, S], padded at the right. lengths: int32 [B], of the prompts.
      room: tokens that the decoder has room for, the start token among them.
    Returns:
      the cache, hidden states [B, D] behind the start token, and int32 [B] ones: how far the decoder is.
    """
    model = nnx.merge(graph, state)
    seen = jnp.arange(tokens.shape[1]) < lengths[:, None]
    cache = model.new_cache(model.encode(tokens, seen), seen, room)
    start = jnp.full((tokens.shape[0], 1), model.config.kind.pair.start_id, jnp.int32)
    hidden, cache = model(start, jnp.zeros_like(start), cache)
    return cache, hidden[:, 0], jnp.ones(tokens.shape[0], jnp.int32)
