"""Paging changes where the state lives, and not one bit of the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim.paged import PagedOptimizer, make_pages, separability, state_bytes

RATE = optax.linear_schedule(1e-2, 1e-3, 5)
TRANSFORMATIONS = {
    "adamw": (optax.adamw(RATE, weight_decay=0.1), "rows"),
    "lion": (optax.lion(RATE), "rows"),
    "sgd": (optax.sgd(RATE, momentum=0.9), "rows"),
    "plain sgd": (optax.sgd(RATE), "rows"),
    "adafactor": (optax.adafactor(RATE, min_dim_size_to_factor=4), "leaves"),
    "lamb": (optax.lamb(RATE), "leaves"),
    "clipped adam": (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(RATE)), "whole"),
}
UPDATES = 3


def tree(seed: int) -> dict[str, jax.Array]:
    """Arrays of five rows, and one of three, none of a round size."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 6, 7), "b": (5, 1, 3), "c": (3, 9, 5), "d": (5, 2, 2)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def run(optimizer: PagedOptimizer, updates: int = UPDATES, params=None, states=None, first: int = 0):
    params = tree(0) if params is None else params
    states = optimizer.init(params) if states is None else states
    for k in range(first, first + updates):
        params, states = optimizer.update(params, tree(k + 1), states)
    return params, states


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def kinds(states) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states) if leaf.ndim}


@pytest.mark.parametrize(
    ("name", "page_bytes"), [*((name, 700) for name in TRANSFORMATIONS), ("adamw", 1), ("adamw", 1 << 20), ("lamb", 1)]
)
def test_paged_is_unpaged_bit_for_bit_and_optax(name, page_bytes):
    tx, _ = TRANSFORMATIONS[name]
    results = [run(PagedOptimizer(tx, tree(0), page_bytes, paged)) for paged in (True, False)]
    assert_same_bits(*results)
    assert kinds(results[0][1]) <= {"pinned_host"} and kinds(results[1][1]) <= {"device"}
    params = tree(0)
    state = tx.init(params)
    for k in range(UPDATES):
        updates, state = tx.update(tree(k + 1), state, params)
        params = optax.apply_updates(params, updates)
    for x, y in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_how_far_an_update_may_be_cut(name):
    tx, expected = TRANSFORMATIONS[name]
    assert separability(tx) == expected


def test_clip_that_bites_later_than_the_first_update():
    """A global norm that only large gradients reach must be found too."""
    tx = optax.chain(optax.clip_by_global_norm(50.0), optax.sgd(1.0))
    assert separability(tx) == "whole"


@pytest.mark.parametrize("page_bytes", [1, 100, 700, 1500, 1 << 20])
def test_pages_cover_every_row_once_and_keep_to_their_size(page_bytes):
    tx, leaves = optax.adam(1e-3), jax.tree.leaves(tree(0))
    pages = make_pages(tx, leaves, page_bytes)
    covered = [(piece.leaf, row) for page in pages for piece in page for row in range(piece.start, piece.stop)]
    assert covered == [(leaf, row) for leaf, x in enumerate(leaves) for row in range(x.shape[0])]
    for page in pages:
        cut = [leaves[piece.leaf][piece.start : piece.stop] for piece in page]
        rows = sum(piece.stop - piece.start for piece in page)
        assert state_bytes(tx, cut) <= page_bytes or rows == 1
    assert len(pages) == 1 if page_bytes == 1 << 20 else len(pages) > 1


def test_pages_are_filled():
    """No page could take the first row of the next one as well."""
    tx, leaves = optax.adam(1e-3), jax.tree.leaves(tree(0))
    pages = make_pages(tx, leaves, 1500)
    for page, following in zip(pages, pages[1:], strict=False):
        first = following[0]
        together = [leaves[p.leaf][p.start : p.stop] for p in page] + [
            leaves[first.leaf][first.start : first.start + 1]
        ]
        assert sum(2 * 4 * x.size for x in together) + 4 * (len(together) + 1) > 1500


def test_arrays_are_never_cut_where_they_must_stay_whole():
    tx, leaves = TRANSFORMATIONS["adafactor"][0], jax.tree.leaves(tree(0))
    for page_bytes in (1, 300):
        pages = make_pages(tx, leaves, page_bytes)
        assert all((piece.start, piece.stop) == (0, leaves[piece.leaf].shape[0]) for page in pages for piece in page)
        assert len(pages) == 4 if page_bytes == 1 else 1 < len(pages) <= 4
    assert len(make_pages(TRANSFORMATIONS["clipped adam"][0], leaves, 1)) == 1


@pytest.mark.parametrize("paged", [True, False])
def test_states_of_a_checkpoint_go_on_exactly(paged):
    """Through host arrays, as a checkpoint holds them, also from a run that was paged otherwise."""
    tx = TRANSFORMATIONS["adamw"][0]
    whole = run(PagedOptimizer(tx, tree(0), 700, paged), updates=4)
    params, states = run(PagedOptimizer(tx, tree(0), 700, not paged), updates=2)
    stored = jax.tree.map(np.asarray, (params, states))
    again = PagedOptimizer(tx, tree(0), 700, paged)
    placed = again.place(stored[1])
    assert kinds(placed) == {"pinned_host" if paged else "device"}
    assert_same_bits(run(again, 2, jax.tree.map(jnp.asarray, stored[0]), placed, first=2), whole)


def test_one_program_for_pages_alike():
    """Rows of equal layers share a compiled update; a step count that moved would compile twice."""
    params = {"a": jnp.zeros((8, 6, 7)), "b": jnp.zeros((8, 6, 7))}
    optimizer = PagedOptimizer(optax.adam(1e-3), params, 2 * 4 * 42 * 2 + 8, paged=True)
    assert len(optimizer.pages) == 8
    states = optimizer.init(params)
    for _ in range(3):
        params, states = optimizer.update(params, jax.tree.map(jnp.ones_like, params), states)
    assert optimizer._update._cache_size() == 1
