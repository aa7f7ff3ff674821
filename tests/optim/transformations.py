"""Optax transformations of every kind that pages must bear, with how far their updates may be cut."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.optim.pages import RowWise

RATE = optax.linear_schedule(1e-2, 1e-3, 5)


class Eight(NamedTuple):
    codes: jax.Array  # uint8, as the parameter
    absmax: jax.Array  # float32 [..., 1]


def eight_bit_momentum(rate: float) -> optax.GradientTransformation:
    """Momentum that is kept as 8-bit codes with a float32 scale for each vector of the last axis."""

    def load(m: Eight) -> jax.Array:
        return (m.codes.astype(jnp.float32) - 128) / 127 * m.absmax

    def store(m: jax.Array) -> Eight:
        absmax = jnp.abs(m).max(-1, keepdims=True)
        return Eight(jnp.round(m / jnp.where(absmax == 0, 1, absmax) * 127 + 128).astype(jnp.uint8), absmax)

    def init(params):  # zeros, stored
        return jax.tree.map(lambda p: Eight(jnp.full(p.shape, 128, jnp.uint8), jnp.zeros((*p.shape[:-1], 1))), params)

    def update(grads, state, params=None):
        m = jax.tree.map(lambda g, s: 0.9 * load(s) + g, grads, state)
        return jax.tree.map(lambda m: -rate * m, m), jax.tree.map(store, m)

    return optax.GradientTransformation(init, update)


def by_name(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "fast" if path[0].key in "ac" else "slow", params)


TRANSFORMATIONS = {
    "adamw": (optax.adamw(RATE, weight_decay=0.1), "rows"),
    "lion": (optax.lion(RATE), "rows"),
    "sgd": (optax.sgd(RATE, momentum=0.9), "rows"),
    "plain sgd": (optax.sgd(RATE), "rows"),
    "8-bit momentum": (eight_bit_momentum(1e-2), "rows"),
    "adam, decay by a mask of names": (
        optax.chain(optax.adam(RATE), optax.add_decayed_weights(-0.1, {"a": True, "b": False, "c": False, "d": True})),
        "rows",
    ),
    "rates by name": (optax.partition({"fast": optax.adam(1e-2), "slow": optax.sgd(1e-3)}, by_name), "rows"),
    "accumulating adam": (optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(), "rows"),
    "adam with injected rate": (optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), "rows"),
    "adafactor": (optax.adafactor(RATE, min_dim_size_to_factor=4), "leaves"),
    "lamb": (optax.lamb(RATE), "leaves"),
    "clipped adam": (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(RATE)), "whole"),
    "clipped after accumulation": (
        optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), every_k_schedule=4
        ).gradient_transformation(),
        "whole",
    ),
}
# for tests of something else: the probe that finds how far an update may be cut takes longer than most of them, and
# that it finds "rows" of each of these is held once (tests/optim/test_pages.py)
KNOWN = {name: RowWise(*tx) if cut == "rows" else tx for name, (tx, cut) in TRANSFORMATIONS.items()}


def known_cut(tx: optax.GradientTransformation, params: Any = None) -> str:
    """In place of pages.separability, of KNOWN."""
    return next(cut for known, cut in TRANSFORMATIONS.values() if known.update is tx.update)


def tree(seed: int) -> dict[str, jax.Array]:
    """Arrays of five rows, and one of three, none of a round size."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 6, 7), "b": (5, 1, 3), "c": (3, 9, 5), "d": (5, 2, 2)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
