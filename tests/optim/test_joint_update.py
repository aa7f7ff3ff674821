"""Pages updated by one program: the bits of each are those of a program of its own, with LLVM's optimizations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_jax.optim.eightbit import adamw8bit, lion8bit
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise
from tests.optim.transformations import KNOWN, TRANSFORMATIONS

OPTAX = {name: KNOWN[name] for name, (_, cut) in TRANSFORMATIONS.items() if cut != "whole"}
EIGHT_BIT = {
    "adamw": RowWise(*adamw8bit(1e-2, 0.9, 0.99, 1e-8, 0.1)),
    "lion": RowWise(*lion8bit(1e-2, 0.9, 0.99, 0.1)),
}
SHAPES = {"a": (4, 64, 65), "b": (2, 16, 17), "c": (4, 64, 65), "d": (5, 3, 2)}  # a and c: 8-bit, some in short blocks


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


@settings(max_examples=4)
@pytest.mark.parametrize("transformations", [OPTAX, EIGHT_BIT], ids=["optax", "8-bit"])
@given(page_bytes=st.sampled_from((1 << 10, 1 << 13, 1 << 15)), data=st.data())
def test_which_pages_stay_changes_no_bit(transformations, page_bytes, data):
    """Any of them, between any that travel."""
    name = data.draw(st.sampled_from(sorted(transformations)), label="transformation")
    pages = Pages(transformations[name], tree(0), page_bytes)
    assume(len(pages) > 1)
    stay = data.draw(st.sets(st.integers(0, len(pages) - 1), min_size=2), label="stay")
    some = tuple(index in stay for index in range(len(pages)))
    whole = jax.tree.leaves(tree(0))
    rows = [[whole[piece.leaf][piece.start : piece.stop] for piece in page] for page in pages.pages]
    begun = [pages.tx.init(pages.tree(page, mine)) for page, mine in zip(pages.pages, rows, strict=True)]
    states = jax.tree.map(np.asarray, begun)
    results = []
    for resident in ((False,) * len(pages), some):
        pages.resident = lambda _, resident=resident: resident
        optimizer, params = PagedOptimizer(pages, tree(0), math.nan), tree(0)
        mine = optimizer.place(states)
        for k in range(2):
            params, mine = optimizer.update(params, tree(k + 1), mine, 0.37)
        results.append([np.asarray(x) for x in jax.tree.leaves((params, mine))])
    for alone, together in zip(*results, strict=True):
        assert alone.tobytes() == together.tobytes()
