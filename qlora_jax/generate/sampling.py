"""The next token from logits: greedy, or nucleus sampling (Holtzman et al., 2020).

Nucleus sampling draws from the smallest set of most probable tokens whose probabilities reach top_p. Equal
probabilities rank by token id, so the set is unique; the most probable token is always in it. Everything is float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qlora_jax.errors import InputError

_COLDEST = 1e-6  # a lower temperature would divide by a denormal, which some devices take for zero


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    max_new_tokens: of one answer.
    temperature: divides the logits; 0 is greedy.
    top_p: probability that the nucleus reaches, above 0; 1 keeps all tokens.
    seed: of the draws; row and step are folded in, so an answer does not depend on what stands beside it in the batch.

    Raises InputError for a value outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1 (1 keeps every token)")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected 0 to {2**32 - 1}")


def next_tokens(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws a token a row.

    Args:
      logits: float32 [B, V].
      keys: random keys [B], one a row.
      temperature: float32 []; 0 takes the most probable token, the lowest id among equals.
      top_p: float32 [], above 0.
    Returns:
      int32 [B].
    """

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        nucleus = in_nucleus(shifted / jnp.maximum(temperature, _COLDEST), top_p)
        return jax.vmap(jax.random.categorical)(keys, nucleus).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sampled, greedy)


def in_nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """float32 [B, V] -> the same, -inf outside the nucleus."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of what ranks higher
    # at top_p 1 the sum's rounding must not cut the tail; the first is kept even where top_p rounds to 0
    kept = (before < top_p) | (top_p >= 1) | (jnp.arange(p.shape[-1]) == 0)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(kept).at[rows, order].set(kept), logits, -jnp.inf)
