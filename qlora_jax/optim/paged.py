"""The paged optimizer: state of any optax transformation in host memory, on the device only page by page.

Parameters are cut into pages: runs along the leading (layer) axis of each array, of about `page_bytes` of optimizer
state. Each page has its own optax state and its own update. Unpaged, the pages stay on the device and the same compiled
programs run, so that paging changes where the state lives and not one bit of the numbers.

The update of page i is queued while page i + 1 is on its way to the device and page i - 1 on its way back: at most
three pages are on the device, and the host waits for none of them but the one that must leave first. Transfers are
explicit `device_put`s between the memory kinds "pinned_host" and "device". Scalars (step counts) stay on the device.

Transformations that look at more than one element of one parameter at a time cannot be cut anywhere: what `tx` allows
is found by a probe (`separability`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PAGING = ("never", "always", "auto")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows start..stop of the leading axis of one parameter array."""

    leaf: int
    start: int
    stop: int


Page = tuple[Piece, ...]


def separability(tx: optax.GradientTransformation) -> str:
    """How far the update may be cut without changing it.

    Returns:
      "rows": each row of a leading axis for itself (Adam, Lion, SGD, ...); "leaves": each array for itself (Adafactor,
      LAMB); "whole": not at all (a global norm inside the transformation). Found by comparing three updates of random
      arrays.
    """
    rng = np.random.default_rng(0)

    def draw(row_scale: float, leaf_scale: float) -> list[jax.Array]:
        scales = [leaf_scale**leaf * np.asarray([1, row_scale]).reshape(2, 1, 1) for leaf in range(2)]
        return [jnp.asarray(rng.normal(size=(2, 136, 144)) * scale, jnp.float32) for scale in scales]

    def alike(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b).max() <= 1e-3 * np.abs(a).max())  # programs of other shapes round otherwise

    params, gradients = draw(3, 1), [draw(3, 100) for _ in range(3)]

    def updates(cut):
        """cut: list of (leaf, slice) groups, updated each for itself; returned in the order of the groups."""
        results: list[np.ndarray] = []
        for group in cut:
            pick = lambda tree, group=group: [tree[leaf][rows] for leaf, rows in group]  # noqa: E731
            state = tx.init(pick(params))
            for g in gradients:
                out, state = tx.update(pick(g), state, pick(params))
            results.extend(np.asarray(u) for u in out)
        return results

    everything = slice(0, 2)
    whole = updates([[(0, everything), (1, everything)]])
    leaves = updates([[(0, everything)], [(1, everything)]])
    if not all(map(alike, whole, leaves)):
        return "whole"
    rows = updates([[(leaf, slice(row, row + 1))] for leaf in range(2) for row in range(2)])
    joined = [np.concatenate(rows[:2]), np.concatenate(rows[2:])]
    return "rows" if all(map(alike, whole, joined)) else "leaves"


def make_pages(tx: optax.GradientTransformation, leaves: Sequence[jax.Array], page_bytes: int) -> list[Page]:
    """Cuts the parameters so that a page's state takes at most page_bytes (or one row or the whole, if it is more)."""
    cut = separability(tx)
    if cut == "whole":
        return [tuple(Piece(i, 0, leaf.shape[0]) for i, leaf in enumerate(leaves))]
    pages: list[Page] = []
    open_page: list[Piece] = []
    room = page_bytes
    for index, leaf in enumerate(leaves):
        rows = leaf.shape[0]
        row_bytes = max(1, state_bytes(tx, [jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)]))
        start = 0
        while start < rows:
            take = rows if cut == "leaves" else min(rows - start, room // row_bytes)
            if (take <= 0 or take * row_bytes > room) and open_page:
                pages.append(tuple(open_page))
                open_page, room = [], page_bytes
                continue
            take = max(take, 1)
            open_page.append(Piece(index, start, start + take))
            room -= take * row_bytes
            start += take
    return [*pages, tuple(open_page)] if open_page else pages


def state_bytes(tx: optax.GradientTransformation, leaves: Sequence[Any]) -> int:
    """Bytes of optimizer state for parameters of these shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, list(leaves))))


class PagedOptimizer:
    """Updates a tree of parameters page by page.

    Args:
      tx: any optax transformation.
      params: tree of arrays, each with a leading axis (stacked layers); only shapes are read.
      page_bytes: optimizer state a page.
      paged: keep the state in pinned_host memory; False keeps it on the device.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, page_bytes: int, paged: bool):
        self.tx, self.paged = tx, paged
        self.pages = make_pages(tx, jax.tree.leaves(params), page_bytes)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._on_device = device.with_memory_kind("device")
        self._on_host = device.with_memory_kind("pinned_host" if paged else "device")
        self._update = jax.jit(partial(_update_page, tx), static_argnums=0, donate_argnums=(2, 4))

    def init(self, params: Any) -> list[Any]:
        """One optax state a page, where it lives between updates."""
        leaves = jax.tree.leaves(params)
        init = jax.jit(lambda layout, starts, leaves: self.tx.init(_cut(layout, starts, leaves)), static_argnums=0)
        return [self._leave(init(_layout(page), _starts(page), _touched(page, leaves))) for page in self.pages]

    def place(self, states: list[Any]) -> list[Any]:
        """States read from a checkpoint, put where they live."""
        return [self._leave(jax.tree.map(jnp.asarray, state)) for state in states]

    def update(self, params: Any, gradients: Any, states: list[Any], factor: Any = 1.0) -> tuple[Any, list[Any]]:
        """New parameters and states, for gradients that are multiplied by `factor`, float32 [].

        `params` is donated: its buffers are updated in place.
        """
        leaves, treedef = jax.tree.flatten(self._move(params, self._on_device))
        grads = jax.tree.leaves(self._move(gradients, self._on_device))
        factor = jax.device_put(jnp.asarray(factor, jnp.float32), self._on_device)
        new_states: list[Any] = []
        arriving = self._fetch(states[0])
        for index, page in enumerate(self.pages):
            state = arriving
            if index + 1 < len(self.pages):
                arriving = self._fetch(states[index + 1])
            mine, its_grads = _touched(page, leaves), _touched(page, grads)
            touched, new_state = self._update(_layout(page), _starts(page), mine, its_grads, state, factor)
            for leaf, value in zip(_leaves_of(page), touched, strict=True):
                leaves[leaf] = value
            new_states.append(self._leave(new_state))
            if self.paged and index > 0:
                jax.block_until_ready(new_states[index - 1])  # bounds what is on the device
        return jax.tree.unflatten(treedef, leaves), new_states

    def _fetch(self, state: Any) -> Any:
        return self._move(state, self._on_device) if self.paged else state

    def _leave(self, state: Any) -> Any:
        return self._move(state, self._on_host)

    def _move(self, tree: Any, sharding: Any) -> Any:
        """Scalars stay on the device. What is there already is not copied, but bound to it: jit compiles once for
        arrays that are bound to a device and again for those that are not."""
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding if leaf.ndim else self._on_device), tree)


def _leaves_of(page: Page) -> list[int]:
    return list(dict.fromkeys(piece.leaf for piece in page))


def _touched(page: Page, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [leaves[leaf] for leaf in _leaves_of(page)]


def _layout(page: Page) -> tuple[tuple[int, int], ...]:
    """(place among the touched leaves, rows) of each piece: pages alike in this share one compiled program."""
    order = {leaf: place for place, leaf in enumerate(_leaves_of(page))}
    return tuple((order[piece.leaf], piece.stop - piece.start) for piece in page)


def _starts(page: Page) -> np.ndarray:
    return np.asarray([piece.start for piece in page], np.int32)


def _cut(layout, starts: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The rows of a page, one array a piece."""
    places = enumerate(layout)
    return [jax.lax.dynamic_slice_in_dim(leaves[leaf], starts[i], rows) for i, (leaf, rows) in places]


def _update_page(tx, layout, starts, params, grads, state, factor):
    mine = _cut(layout, starts, params)
    updates, state = tx.update([g * factor for g in _cut(layout, starts, grads)], state, mine)
    params = list(params)
    for i, ((leaf, _), new) in enumerate(zip(layout, optax.apply_updates(mine, updates), strict=True)):
        params[leaf] = jax.lax.dynamic_update_slice_in_dim(params[leaf], new, starts[i], 0)
    return params, state
