"""What may be cut, where, and how many bytes that makes."""

import jax
import jax.numpy as jnp
import optax
import pytest

from configs import base
from qlora_jax.optim.pages import Pages, RowWise, separability, state_bytes
from qlora_jax.optim.schedules import OPTIMIZERS, make_optimizer
from tests.optim.transformations import TRANSFORMATIONS, tree

pytestmark = pytest.mark.quick_compile

SGD = RowWise(*optax.sgd(1.0, momentum=0.9))  # where the probe is not what is asked for


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_how_far_an_update_may_be_cut(name):
    tx, expected = TRANSFORMATIONS[name]
    assert separability(tx, tree(0)) == expected


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("paged_")])
def test_what_a_config_names_needs_no_probe(name):
    """The probe finds what RowWise says, also where rows are no whole blocks of 8-bit state."""
    config = base.get_config().optimizer
    config.name, config.weight_decay = name, 0.1
    tx = make_optimizer(config, 100)
    params = [jnp.zeros((3, 7, 64))]
    assert isinstance(tx, RowWise) and separability(tx, params) == "rows"
    assert separability(optax.GradientTransformation(*tx), params) == "rows"


def test_clip_that_bites_later_than_the_first_update():
    """A global norm that only large gradients reach must be found too."""
    tx = optax.chain(optax.clip_by_global_norm(50.0), optax.sgd(1.0))
    assert separability(tx) == "whole"


def test_what_never_changes_anything_is_not_cut():
    assert separability(optax.set_to_zero(), tree(0)) == "whole"


def test_states_in_blocks_are_cut_only_between_whole_blocks():
    """One scale for 256 elements in a row of the flattened array."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(-(-p.size // 256)), params)

    def update(grads, state, params=None):
        def scaled(g):
            blocks = jnp.pad(g.ravel(), (0, -g.size % 256)).reshape(-1, 256)
            return (blocks / jnp.abs(blocks).max(1, keepdims=True)).ravel()[: g.size].reshape(g.shape)

        return jax.tree.map(scaled, grads), state

    tx = optax.GradientTransformation(init, update)
    assert separability(tx, [jnp.zeros((3, 64, 64))]) == "rows"
    assert separability(tx, [jnp.zeros((3, 64, 64)), jnp.zeros((3, 7, 64))]) == "leaves"


@pytest.mark.parametrize("page_bytes", [1, 100, 700, 1500, 1 << 20])
def test_pages_cover_every_row_once_and_keep_to_their_size(page_bytes):
    """Or are one row, where that takes more."""
    pages = Pages(RowWise(*optax.adam(1e-3)), tree(0), page_bytes)
    covered = [(piece.leaf, row) for page in pages.pages for piece in page for row in range(piece.start, piece.stop)]
    assert sorted(covered) == [(leaf, row) for leaf, x in enumerate(pages.shapes) for row in range(x.shape[0])]
    for page, size in zip(pages.pages, pages.bytes, strict=True):
        assert size <= page_bytes or sum(piece.rows for piece in page) == 1
        assert size == state_bytes(pages.tx, pages.piece_shapes(page))
    assert len(pages) == {1: 18, 1 << 20: 1}.get(page_bytes, len(pages))
    assert pages.bytes[pages.largest(range(len(pages)))] == max(pages.bytes)


def test_large_arrays_are_cut_evenly_and_small_ones_gathered():
    """So that equal arrays have equal pages; a remainder is left where equal pages would be half empty."""
    shapes = {"a": (80, 10), "b": (4, 10), "c": (80, 10), "d": (3, 10), "e": (7, 10), "f": (4, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for rows, of_80, gathered in ((15, 10, ["bde", "f"]), (7, 5, ["bd", "e", "f"]), (11, 10, ["bd", "ef"])):
        pages = Pages(SGD, params, 40 * rows)
        found = [(["abcdef"[piece.leaf] for piece in page], [piece.rows for piece in page]) for page in pages.pages]
        for name in "ac":
            assert [rows for names, rows in found if names == [name]] == [[of_80]] * (80 // of_80)
        assert ["".join(names) for names, _ in found if names not in (["a"], ["c"])] == gathered
    pages = Pages(SGD, params, 40 * 6)
    assert [[piece.rows for piece in page] for page in pages.pages if page[0].leaf == 4] == [[6], [1]]


def test_arrays_are_never_cut_where_they_must_stay_whole():
    tx, _ = TRANSFORMATIONS["adafactor"]
    for page_bytes in (1, 300):
        pages = Pages(tx, tree(0), page_bytes)
        assert all((p.start, p.stop) == (0, pages.shapes[p.leaf].shape[0]) for page in pages.pages for p in page)
        assert len(pages) == 4 if page_bytes == 1 else 1 < len(pages) <= 4
    assert len(Pages(TRANSFORMATIONS["clipped adam"][0], tree(0), 1)) == 1


def test_shapes_are_enough():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
    for axis in (0, 1):
        given = jax.tree.map(lambda x, axis=axis: jax.ShapeDtypeStruct((4,) * axis + x.shape, x.dtype), shapes)
        pages = Pages(RowWise(*optax.adamw(1e-3)), given, 3000, pack=bool(axis))
        for indices in (range(len(pages)), [pages.largest(range(len(pages)))]):
            program = pages.update_program(indices)
            params, states = jax.eval_shape(program.function, *program.arguments)
            assert (params, states) == (program.arguments[1], program.arguments[3])
            for index, state in zip(indices, states, strict=True):
                assert sum(x.size * x.dtype.itemsize for x in state) == pages.bytes[index] <= 3000


def test_what_stays_and_what_is_under_way():
    pages = Pages(SGD, [jnp.zeros((6, 25))], 100)
    assert pages.bytes == [100] * 6
    assert pages.resident(float("inf")) == (True,) * 6 and pages.resident(0) == (False,) * 6
    kept = pages.resident(299)
    assert kept == (False, False, False, False, True, True)
    assert [pages.in_flight_bytes(x) for x in (kept, (True,) * 6, (False,) + (True,) * 5)] == [300, 0, 100]
    uneven = Pages(SGD, [jnp.zeros((1, n)) for n in (25, 1, 25, 1, 25)], 100)
    assert uneven.bytes == [100, 4, 100, 4, 100]
    assert uneven.in_flight_bytes((False, True) * 2 + (False,)) == uneven.in_flight_bytes((False,) * 5) == 300


@pytest.mark.parametrize(("pack", "wanted"), [(False, "[L, ...]"), (True, "[A, L, ...]")])
def test_a_parameter_without_rows_is_refused(pack, wanted):
    with pytest.raises(ValueError, match=r"shape \[4?\]; pages need") as refused:
        Pages(optax.sgd(1.0), [jnp.zeros((4,) * pack)], 100, pack)
    assert wanted in str(refused.value)
