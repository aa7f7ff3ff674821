"""Where a page lives changes not one bit of the numbers; what is on the device is bounded; transfers come in time."""

import math
from collections import Counter
from functools import cache
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import pages
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages, RowWise
from tests.optim.transformations import KNOWN, known_cut, tree

pytestmark = pytest.mark.quick_compile

UPDATES = 3
ADAM = RowWise(*optax.adam(1e-3))


@cache
def pages_of(tx, page_bytes: int) -> Pages:
    """Of `tree`, shared by optimizers: the updates of its pages are traced once."""
    with patch.object(pages, "separability", known_cut):
        return Pages(tx, tree(0), page_bytes)


def make(tx, page_bytes: int, resident_bytes: float) -> PagedOptimizer:
    return PagedOptimizer(pages_of(tx, page_bytes), tree(0), resident_bytes)


shared = cache(make)  # with the programs that it compiled: what a run begins with is not in it


def run(optimizer: PagedOptimizer, updates: int = UPDATES, params=None, states=None, first: int = 0):
    params = tree(0) if params is None else params
    states = optimizer.init(params) if states is None else states
    for k in range(first, first + updates):
        params, states = optimizer.update(params, tree(k + 1), states, 0.5)
    return params, states


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def kinds(states) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states) if leaf.ndim}


@pytest.mark.parametrize(
    ("name", "page_bytes"), [*((name, 700) for name in KNOWN), ("adamw", 1), ("adamw", 1 << 20), ("lamb", 1)]
)
def test_paged_is_unpaged_is_partly_resident_bit_for_bit_and_optax(name, page_bytes):
    tx = KNOWN[name]
    half = [800] if name == "adamw" else []  # its pages have the programs of the others
    optimizers = [shared(tx, page_bytes, resident) for resident in (0, *half, math.inf)]
    results = [run(optimizer) for optimizer in optimizers]
    for result in results[:-1]:
        assert_same_bits(result, results[-1])
    for optimizer, (_, states) in zip(optimizers, results, strict=True):
        for state, kept in zip(states, optimizer.resident, strict=True):
            assert kinds(state) <= {"device" if kept else "pinned_host"}
    params = tree(0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for k in range(UPDATES):
        updates, state = update(jax.tree.map(lambda g: 0.5 * g, tree(k + 1)), state, params)
        params = optax.apply_updates(params, updates)
    for x, y in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("resident", [0, 800, math.inf])
def test_states_of_a_checkpoint_go_on_exactly(resident):
    """Through host arrays, as a checkpoint holds them, also from a run whose pages lived elsewhere."""
    tx = KNOWN["adamw"]
    whole = run(shared(tx, 700, resident), updates=4)
    params, states = run(shared(tx, 700, 1500), updates=2)
    stored = jax.tree.map(np.array, (params, states))
    again = make(tx, 700, resident)
    placed = again.place(stored[1])
    assert kinds(placed) == {0: {"pinned_host"}, 800: {"pinned_host", "device"}}.get(resident, {"device"})
    assert_same_bits(run(again, 2, jax.tree.map(jnp.array, stored[0]), placed, first=2), whole)


def test_pages_are_placed_without_passing_through_the_device(monkeypatch):
    tx = KNOWN["adamw"]
    stored = jax.tree.map(np.array, make(tx, 700, 0).init(tree(0)))
    optimizer, original, moved = make(tx, 700, 0), jax.device_put, []

    def recorded(leaves, shardings):
        moved.extend((type(x), x.ndim, s.memory_kind) for x, s in zip(leaves, shardings, strict=True))
        return original(leaves, shardings)

    monkeypatch.setattr(jax, "device_put", recorded)
    optimizer.place(stored)
    assert set(moved) == {(np.ndarray, 3, "pinned_host"), (np.ndarray, 0, "device")}
    assert len(moved) == len(jax.tree.leaves(stored))


EQUAL_ROWS = {name: (16, 6, 7) for name in "ab"}
A_ROW = 2 * 4 * 42  # bytes of Adam's state


def equal_rows(value: float) -> dict[str, jax.Array]:
    return {name: jnp.full(shape, value, jnp.float32) for name, shape in EQUAL_ROWS.items()}


def of_equal_rows(tx, resident_bytes: float) -> PagedOptimizer:
    return PagedOptimizer(Pages(tx, equal_rows(0), 2 * A_ROW + 8), equal_rows(0), resident_bytes)


@pytest.mark.parametrize(("resident", "kept"), [(0, 0), (10 * A_ROW, 4), (math.inf, 16)])
def test_one_program_for_what_stays_and_one_for_pages_alike_that_travel(resident, kept, monkeypatch):
    """Rows of equal layers of any array share a compiled update; what stays on the device takes one call."""
    optimizer = of_equal_rows(ADAM, resident)
    assert len(optimizer.pages) == 16 and sum(optimizer.resident) == kept
    params = equal_rows(0)
    states = optimizer.init(params)
    counts = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(self, *arguments, **options):
            counts[name] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(jax.stages.Lowered, "compile")
    count(jax.stages.Compiled, "__call__")
    for _ in range(3):
        params, states = optimizer.update(params, equal_rows(1), states)
    assert counts == {"compile": (kept > 0) + (kept < 16), "__call__": 3 * ((kept > 0) + 16 - kept)}


def test_pages_that_a_mask_tells_apart_have_programs_of_their_own():
    tx = RowWise(*optax.masked(optax.adam(1e-3), {"a": True, "b": False}))
    optimizer = of_equal_rows(tx, 0)
    params, _ = optimizer.update(equal_rows(0), equal_rows(1), optimizer.init(equal_rows(0)))
    np.testing.assert_allclose(params["a"], -1e-3, rtol=1e-3)
    np.testing.assert_array_equal(params["b"], 1)  # outside the mask gradients pass unchanged


def live_bytes(kind: str) -> int:
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == kind and not x.is_deleted())


class Logged(PagedOptimizer):
    """Says in which order things are dispatched and awaited, and how many bytes are on the device at each."""

    log: list[tuple[str, int]]
    device_bytes: list[int]

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.watch()

    def watch(self) -> None:
        self.log, self.device_bytes = [], []

    def _note(self, what: str, index: int) -> None:
        self.log.append((what, index))
        self.device_bytes.append(live_bytes("device"))

    def _fetch(self, index, states):
        state = super()._fetch(index, states)
        self._note("fetch", index)
        return state

    def _advance(self, indices, *arguments):
        states = super()._advance(indices, *arguments)
        for index in indices:
            self._note("update", index)
        return states

    def _leave(self, index, state):
        state = super()._leave(index, state)
        self._note("leave", index)
        return state

    def _wait(self, index, state):
        super()._wait(index, state)
        self._note("wait", index)


@pytest.mark.parametrize("resident_rows", [0, 13])
def test_transfers_overlap_and_a_state_of_any_size_keeps_to_three_pages(resident_rows):
    """The state is 5 times what may be on the device during an update."""
    params, grads = jax.device_put((equal_rows(0), equal_rows(1)), jax.devices()[0])  # bound to it: not moved again
    optimizer = Logged(Pages(ADAM, params, 2 * A_ROW + 8), params, resident_rows * A_ROW)
    count, page = len(optimizer.pages), 2 * A_ROW + 4
    in_flight = optimizer.pages.in_flight_bytes(optimizer.resident)
    assert in_flight == 3 * page and sum(optimizer.pages.bytes) > 5 * in_flight
    kept = sum(optimizer.resident)
    assert kept == resident_rows // 2
    states = optimizer.init(params)
    params, states = optimizer.update(params, grads, states)
    on_device = [x.nbytes for x in jax.tree.leaves(states) if x.sharding.memory_kind == "device"]
    others = live_bytes("device") - sum(on_device)
    optimizer.watch()
    params, states = optimizer.update(params, grads, states)

    place = {event: number for number, event in enumerate(optimizer.log)}
    assert len(place) == len(optimizer.log) == 4 * (count - kept) - 1 + kept
    for i in range(count - kept, count):
        assert place["fetch", 0] < place["update", i] < place["fetch", 1], "what stays is updated as the first arrives"
    for i in range(1, count - kept):
        assert place["fetch", i] < place["update", i - 1], "the next page is on its way before this one is updated"
        assert place["update", i] < place["wait", i - 1], "nothing waits for the page that was just updated"
        if 2 <= i < count - 1 - kept:
            assert place["wait", i - 2] < place["fetch", i + 1], "a fourth page would be on the device"
    scalars = 4 * count + 4  # step counts, the factor
    most = max(optimizer.device_bytes) - others - scalars - kept * 2 * A_ROW
    assert 2 * (2 * A_ROW) <= most <= in_flight  # a page that leaves is no longer seen here, but waited for


def test_host_memory_holds_each_page_once():
    params = equal_rows(0)
    optimizer = of_equal_rows(ADAM, 0)
    before, most, original = live_bytes("pinned_host"), 0, optimizer._advance
    states = optimizer.init(params)

    def watched(*arguments):
        nonlocal most
        most = max(most, live_bytes("pinned_host") - before)
        return original(*arguments)

    optimizer._advance = watched
    optimizer.update(params, equal_rows(1), states)
    assert states == [None] * len(optimizer.pages)
    assert 0 < most <= sum(optimizer.pages.bytes)


def pack_of(seeds) -> dict[str, jax.Array]:
    return jax.tree.map(lambda *x: jnp.stack(x), *map(tree, seeds))


@pytest.mark.parametrize("name", ["adam with injected rate", "8-bit momentum", "lamb", "accumulating adam"])
def test_a_pack_is_its_adapters_one_by_one(name):
    """Each with its own factor and, where it is injected, its own learning rate."""
    tx = KNOWN[name]
    rates, factors, results = [1e-2, 3e-3, 1e-3], [1.0, 0.5, 0.25], []
    injected = name == "adam with injected rate"
    with patch.object(pages, "separability", known_cut):
        packed = Pages(tx, pack_of((0, 10, 20)), 700, pack=True)
    assert len(packed) > 3
    for resident in (0, 4000, math.inf):
        params = pack_of((0, 10, 20))
        optimizer = PagedOptimizer(packed, params, resident)
        states = optimizer.init(params)
        states = optimizer.set(states, learning_rate=np.asarray(rates)) if injected else states
        for k in range(UPDATES):
            grads = pack_of((k + 1, k + 11, k + 21))
            params, states = optimizer.update(params, grads, states, np.asarray(factors))
        assert kinds([s for s, kept in zip(states, optimizer.resident, strict=True) if not kept]) - {"device"} <= {
            "pinned_host"
        }
        results.append((params, states))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])
    for place, (rate, factor) in enumerate(zip(rates, factors, strict=True)):
        params = tree(10 * place)
        single = shared(tx, 700, 0)
        states = single.init(params)
        states = single.set(states, learning_rate=rate) if injected else states
        for k in range(UPDATES):
            params, states = single.update(params, tree(k + 1 + 10 * place), states, factor)
        for x, y in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(x[place], y, atol=1e-6, rtol=1e-5)
