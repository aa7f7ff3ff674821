"""What a prompt's draws depend on: the seed and the prompt, not its batch, its place in a file or who stands beside it.

The random key of a draw is the seed, then a number made of the prompt's ids and of how often the same prompt came
before it, then the step. So a file that is resumed, split or answered in other batches gets the same draws, and a
prompt that stands in a file twice gets two answers. A prompt with a seed of its own draws by that seed instead, as if
it stood alone: equal prompts with equal seeds of their own draw alike.
"""

import collections
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np


class Draws(NamedTuple):
    """Where a prompt's random keys begin: two numbers of 32 bits."""

    seed: int
    number: int


def draws_of(prompt: Sequence[int], seed: int, earlier: int = 0) -> Draws:
    """Draws of a prompt that came `earlier` times before."""
    ids = np.asarray(prompt, "<i4").tobytes()
    digest = hashlib.sha256(ids + earlier.to_bytes(8, "little")).digest()
    return Draws(seed, int.from_bytes(digest[:4], "little"))


def draws_of_all(
    prompts: Sequence[Sequence[int]], seed: int, own_seeds: Sequence[int | None] | None = None
) -> list[Draws]:
    """Draws of each prompt of a list; `own_seeds`: of those that have one, None for the others."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    draws = []
    for prompt, own in zip(prompts, own_seeds or [None] * len(prompts), strict=True):
        if own is not None:
            draws.append(draws_of(prompt, own))
            continue
        draws.append(draws_of(prompt, seed, seen[tuple(prompt)]))
        seen[tuple(prompt)] += 1
    return draws


def row_keys(draws: Sequence[Draws], fill: int = 0) -> jax.Array:
    """Keys [B] of the rows of a batch; `fill` rows that draw nothing are added."""
    return _keys(*(np.asarray([*column, *[0] * fill], np.uint32) for column in zip(*draws, strict=True)))


@jax.jit
@jax.vmap
def _keys(seed: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)
