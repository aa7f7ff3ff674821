"""The next token from logits: greedy, or drawn from what top-k, nucleus and min-p leave.

The filters come in the order of transformers: temperature, top_k, top_p (nucleus; Holtzman et al., 2020), min_p (Nguyen
et al., 2024). Each sees what the one before it left, renormalised. Equal probabilities rank by token id, so what is
kept is unique (transformers keeps every token that equals the k-th); the most probable token is always kept.
Everything is float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qlora_jax.errors import InputError

_COLDEST = 1e-6  # a lower temperature would divide by a denormal, which some devices take for zero


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the paper's for Guanaco.

    max_new_tokens: of one answer.
    temperature: divides the logits; 0 is greedy.
    top_p: probability that the nucleus reaches, above 0; 1 keeps all tokens.
    seed: of the draws (generate/seeds.py says what else they depend on).
    top_k: how many of the most probable tokens are kept; 0 keeps all.
    min_p: tokens less probable than this share of the most probable one's probability are left out; 0 keeps all.

    Raises InputError for a value outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1 (1 keeps every token)")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}; expected a number of tokens, or 0 (keeps every token)")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; expected 0 (keeps every token) to 1")
        check_seed(self.seed, "seed")


def check_seed(seed: int, name: str) -> None:
    """Raises InputError unless the seed fits in 32 bits."""
    if not 0 <= seed < 2**32:
        raise InputError(f"{name} is {seed}; expected 0 to {2**32 - 1}")


def next_tokens(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    top_k: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Draws a token a row.

    Args:
      logits: float32 [B, V].
      keys: random keys [B], one a row.
      temperature: float32 []; 0 takes the most probable token, the lowest id among equals.
      top_p, top_k, min_p: float32 [], int32 [], float32 [], as in Sampling.
    Returns:
      int32 [B].
    """

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        kept = filtered(shifted / jnp.maximum(temperature, _COLDEST), top_p, top_k, min_p)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sampled, greedy)


def filtered(logits: jax.Array, top_p: jax.Array, top_k: jax.Array, min_p: jax.Array) -> jax.Array:
    """float32 [B, V], tempered -> the same, -inf where a filter leaves the token out."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    of_k = (rank < top_k) | (top_k <= 0)
    p = jax.nn.softmax(jnp.where(of_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of what ranks higher
    # at top_p 1 the sum's rounding must not cut the tail; the first is kept even where top_p rounds to 0
    in_nucleus = (before < top_p) | (top_p >= 1) | (rank == 0)
    likely = ranked - ranked[:, :1] >= jnp.log(min_p)
    kept = of_k & in_nucleus & likely
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(kept).at[rows, order].set(kept), logits, -jnp.inf)
