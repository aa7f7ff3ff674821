"""Pages: an optimizer's work cut into parts of bounded size. Shapes only: a planner needs no device for it.

A page is a run of rows of one array, cut along its leading (layer) axis into equal runs of at most `page_bytes` of
optimizer state, or some whole arrays that are smaller. Equal arrays have equal pages, which share a compiled program.
The transformation sees a page as the parameters' own tree with None where the page has nothing, so masks and labels
that go by names keep their meaning.

Transformations that look at more than one element of one parameter at a time cannot be cut anywhere: what `tx` allows
is found by a probe (`separability`).

In a pack every array has one more leading axis, of A adapters; all of them are in every page, and rows are counted
along the axis after it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_PROBED_UPDATES = 3  # that change something: a warm-up or accumulated gradients make some that do not
_PATIENCE = 64  # updates


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows start..stop of one parameter array (its place among the tree's leaves)."""

    leaf: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


Page = tuple[Piece, ...]  # of different arrays


class RowWise(optax.GradientTransformation):
    """A transformation that is known to update each row of each array for itself: what the probe would find."""


class UpdateProgram(NamedTuple):
    """An update of pages, to be jitted: function(*arguments) -> (parameters, states), both as in the arguments.

    The arguments: starts, int32 [pieces] of each page; parameters and gradients, the whole arrays that the pages touch;
    state, the leaves of each page; factor.
    """

    function: Any
    arguments: tuple[Any, ...]
    donate_argnums: tuple[int, ...] = (1, 3)


class Pages:
    """The pages of one parameter tree under one transformation.

    Args:
      tx: any optax transformation.
      params: tree of arrays or ShapeDtypeStructs, each [L, ...] (a row of each is never cut), in a pack [A, L, ...].
      page_bytes: optimizer state a page, over all devices and adapters together. A row that takes more is a page of its
        own; so is, where `tx` allows no finer cut, an array or everything.
      pack: whether there is a leading axis of adapters, each updated for itself.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, page_bytes: int, pack: bool = False):
        leaves, self.treedef = jax.tree.flatten(params)
        self.axis = int(pack)
        self.shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        for leaf in self.shapes:
            if leaf.ndim <= self.axis:
                wanted = "[A, L, ...]" if pack else "[L, ...]"
                raise ValueError(f"a parameter has shape {list(leaf.shape)}; pages need {wanted}: add a leading axis")
        one = [jax.ShapeDtypeStruct(leaf.shape[self.axis :], leaf.dtype) for leaf in self.shapes]
        self.cut = separability(tx, jax.tree.unflatten(self.treedef, one))
        self.tx = _per_adapter(tx) if pack else tx
        self.pages = self._make(page_bytes)
        self._updates: dict[Any, Any] = {}  # by a page's layout
        self._states: dict[Any, Any] = {}  # by a page's layout

    def __len__(self) -> int:
        return len(self.pages)

    @cached_property
    def bytes(self) -> list[int]:
        """State of each page."""
        return [_bytes_of(self.state_shapes(page)) for page in self.pages]

    def largest(self, indices: Iterable[int]) -> int:
        """The page with the most state, of these."""
        return max(indices, key=lambda index: self.bytes[index])

    def resident(self, resident_bytes: float) -> tuple[bool, ...]:
        """Which pages stay on the device when `resident_bytes` may: from the last one on, as many as fit.

        The last ones, so that what was paged is back in host memory while they are updated.
        """
        kept = [False] * len(self)
        for index in reversed(range(len(self))):
            if self.bytes[index] <= resident_bytes:
                kept[index] = True
                resident_bytes -= self.bytes[index]
        return tuple(kept)

    def in_flight_bytes(self, resident: Sequence[bool]) -> int:
        """State on the device during an update beyond the resident pages, at most: one page on its way in, one being
        updated (in place), one on its way out. No more if more pages are resident."""
        return sum(sorted(size for size, kept in zip(self.bytes, resident, strict=True) if not kept)[-3:])

    def tree(self, page: Page, arrays: Sequence[Any]) -> Any:
        """One array a piece -> the parameters' tree, None where the page has nothing."""
        by_leaf = {piece.leaf: array for piece, array in zip(page, arrays, strict=True)}
        return jax.tree.unflatten(self.treedef, [by_leaf.get(leaf) for leaf in range(len(self.shapes))])

    def piece_shapes(self, page: Page) -> Any:
        """Shapes of a page's rows, as `tree` has them."""
        return self.tree(page, [self._rows(piece.leaf, piece.rows) for piece in page])

    def state_shapes(self, page: Page) -> Any:
        """Shapes of a page's optax state; traced once for pages alike."""
        layout = _layout(page)
        if layout not in self._states:
            self._states[layout] = jax.eval_shape(self.tx.init, self.piece_shapes(page))
        return self._states[layout]

    def rows_of(self, page: Page, starts: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """A page's rows out of the arrays that it touches; traced, `starts` int32 [pieces]."""
        return [
            jax.lax.dynamic_slice_in_dim(array, starts[i], piece.rows, self.axis)
            for i, (piece, array) in enumerate(zip(page, arrays, strict=True))
        ]

    def touched(self, indices: Sequence[int]) -> list[int]:
        """The arrays (their places among the tree's leaves) that these pages have rows of."""
        return sorted({piece.leaf for index in indices for piece in self.pages[index]})

    def update_program(self, indices: Sequence[int]) -> UpdateProgram:
        """Of pages, one after the other: each reads its rows from the arrays it touches and writes them back in place.

        Between two pages stands a barrier that all of both passes: nothing is fused across it, so a page is computed as
        in a program of its own (bit for bit on CPUs), and temporaries are those of one page.
        """
        pages, touched = [self.pages[index] for index in indices], self.touched(indices)

        def update(starts, params, grads, states, factor):
            params, grads = (dict(zip(touched, arrays, strict=True)) for arrays in (params, grads))
            states = list(states)
            written: list[int] = []
            for number, page in enumerate(pages):
                mine = [piece.leaf for piece in page]
                its_grads = [grads[leaf] for leaf in mine]
                if number:
                    both, pair = {leaf: params[leaf] for leaf in {*written, *mine}}, slice(number - 1, number + 1)
                    passed = jax.lax.optimization_barrier((both, its_grads, states[pair], factor))
                    both, its_grads, states[pair], factor = passed
                    params |= both
                arrays = [params[leaf] for leaf in mine]
                new, states[number] = self._page_update(page)(starts[number], arrays, its_grads, states[number], factor)
                params |= dict(zip(mine, new, strict=True))
                written = mine
            return list(params.values()), states

        arrays = [self.shapes[leaf] for leaf in touched]
        starts = [jax.ShapeDtypeStruct((len(page),), jnp.int32) for page in pages]
        states = [jax.tree.leaves(self.state_shapes(page)) for page in pages]
        factor = jax.ShapeDtypeStruct(arrays[0].shape[: self.axis], jnp.float32)
        return UpdateProgram(update, (starts, arrays, arrays, states, factor))

    def _page_update(self, page: Page) -> Any:
        """(starts, parameters, gradients, state leaves, factor) -> (parameters, state leaves), of one page; the same
        function for pages alike, which are traced once."""
        layout = _layout(page)
        if layout in self._updates:
            return self._updates[layout]
        state_def = jax.tree.structure(self.state_shapes(page))

        @jax.jit
        def update_page(starts, params, grads, state, factor):
            mine, its_grads = self.rows_of(page, starts, params), self.rows_of(page, starts, grads)
            scale = lambda g: (g * factor.reshape(factor.shape + (1,) * (g.ndim - factor.ndim))).astype(g.dtype)  # noqa: E731
            its_grads = list(map(scale, its_grads))
            old = self.tree(page, mine)
            updates, state = self.tx.update(self.tree(page, its_grads), jax.tree.unflatten(state_def, state), old)
            new = jax.tree.leaves(optax.apply_updates(old, updates))
            put = jax.lax.dynamic_update_slice_in_dim
            params = [
                put(whole, rows, starts[i], self.axis) for i, (whole, rows) in enumerate(zip(params, new, strict=True))
            ]
            return params, jax.tree.leaves(state)

        return self._updates.setdefault(layout, update_page)

    def _rows(self, leaf: int, rows: int) -> jax.ShapeDtypeStruct:
        shape = self.shapes[leaf].shape
        return jax.ShapeDtypeStruct((*shape[: self.axis], rows, *shape[self.axis + 1 :]), self.shapes[leaf].dtype)

    def _make(self, page_bytes: int) -> list[Page]:
        sizes = [leaf.shape[self.axis] for leaf in self.shapes]
        if self.cut == "whole":
            return [tuple(Piece(leaf, 0, rows) for leaf, rows in enumerate(sizes))]
        pages: list[Page] = []
        open_page: list[Piece] = []  # of arrays that are smaller than a page
        room = page_bytes
        for leaf, rows in enumerate(sizes):
            step = rows if self.cut == "leaves" else 1  # the least that can be taken
            shape = self._rows(leaf, step)
            step_bytes = state_bytes(self.tx, self.tree((Piece(leaf, 0, step),), [shape]))
            step_bytes = step_bytes or shape.size * shape.dtype.itemsize  # without state: bounds the working set
            most = max(page_bytes // step_bytes, 1) * step
            if rows > most:
                take = _even(rows, most)
                pages += [(Piece(leaf, start, min(start + take, rows)),) for start in range(0, rows, take)]
                continue
            needed = rows // step * step_bytes
            if needed > room and open_page:
                pages.append(tuple(open_page))
                open_page, room = [], page_bytes
            open_page.append(Piece(leaf, 0, rows))
            room -= needed
        return [*pages, tuple(open_page)] if open_page else pages


def _even(rows: int, most: int) -> int:
    """Rows a page of an array that needs several: a divisor, so that all share a program, if one fills half a page."""
    divisor = max(take for take in range(1, most + 1) if rows % take == 0)
    return divisor if 2 * divisor > most else most


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of optimizer state for a tree of parameters, or of their shapes."""
    return _bytes_of(jax.eval_shape(tx.init, params))


def _bytes_of(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _layout(page: Page) -> tuple[tuple[int, int], ...]:
    """What pages alike have in common: arrays, and how many rows of each."""
    return tuple((piece.leaf, piece.rows) for piece in page)


def _per_adapter(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Over a leading axis of adapters of parameters, gradients and state, step counts and hyperparameters included."""
    return optax.GradientTransformation(jax.vmap(tx.init), lambda g, s, p=None: jax.vmap(tx.update)(g, s, p))


def separability(tx: optax.GradientTransformation, params: Any = None) -> str:
    """How far the update may be cut without changing it.

    Args:
      params: tree whose structure and ranks the probe takes; its sizes are replaced (two rows of some 20,000 elements).
        None probes two arrays of rank 3.
    Returns:
      "rows": each row of a leading axis for itself (Adam, Lion, SGD, ...); "leaves": each array for itself (Adafactor,
      LAMB, states in blocks that rows do not fill); "whole": not at all (a global norm inside the transformation, or
      one that changes nothing in 64 updates). Found by comparing updates of random arrays.
    """
    if isinstance(tx, RowWise):
        return "rows"
    if params is None:
        params = [jax.ShapeDtypeStruct((2, 4096, 1), jnp.float32)] * 2
    leaves, treedef = jax.tree.flatten(params)
    # states in blocks (of 4096 or a divisor) may be cut between rows only where rows are whole blocks
    in_blocks = all(leaf.size // max(leaf.shape[0], 1) % 4096 == 0 for leaf in leaves)
    matrix = (128, 160) if in_blocks else (136, 144)
    return _probe(tx, treedef, tuple(((2, *_probed_row(leaf.ndim - 1, matrix)), leaf.dtype) for leaf in leaves))


@lru_cache(maxsize=32)
def _probe(tx: optax.GradientTransformation, treedef: Any, arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> str:
    """`separability` for arrays of these shapes and dtypes: a second of updates, once for a transformation."""
    like = [jax.ShapeDtypeStruct(*array) for array in arrays]

    @cache
    def draw(seed: int) -> list[jax.Array]:
        """Parameters (seed 0) or gradients, some arrays and rows larger than others."""
        rng, drawn = np.random.default_rng(seed), []
        for number, leaf in enumerate(like):
            rows = np.asarray([1, 3]).reshape(2, *(1 for _ in leaf.shape[1:]))
            scale = rows * (100 if seed and number % 2 else 1)
            drawn.append(jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype))
        return drawn

    def updates(group: dict[int, slice], number: int):
        """The first `number` updates, tree leaves each, of the rows in `group` on their own."""

        def pick(arrays: list[jax.Array]) -> Any:
            mine = [x[group[leaf]] if leaf in group else None for leaf, x in enumerate(arrays)]
            return jax.tree.unflatten(treedef, mine)

        state = tx.init(pick(draw(0)))
        for k in range(number):
            with jax.disable_jit():  # else control flow is compiled anew at every call, and each group for itself
                out, state = tx.update(pick(draw(k + 1)), state, pick(draw(0)))
            yield [np.asarray(u, np.float32) for u in jax.tree.leaves(out)]

    everything = dict.fromkeys(range(len(like)), slice(0, 2))
    whole: dict[int, list[np.ndarray]] = {}
    for k, out in enumerate(updates(everything, _PATIENCE)):
        if any(u.any() for u in out):
            whole[k] = out
        if len(whole) == _PROBED_UPDATES:
            break
    if not whole:
        return "whole"

    def agrees(rows: Sequence[slice]) -> bool:
        for leaf in range(len(like)):
            for part in rows:
                for k, out in enumerate(updates({leaf: part}, max(whole) + 1)):
                    if k in whole and not _alike(whole[k][leaf][part], out[0]):
                        return False
        return True

    if agrees([slice(0, 1), slice(1, 2)]):  # so does each array, then
        return "rows"
    return "leaves" if agrees([slice(0, 2)]) else "whole"


def _probed_row(ndim: int, matrix: tuple[int, int]) -> tuple[int, ...]:
    if ndim < 2:
        return (matrix[0] * matrix[1],) * ndim
    return (*(1 for _ in range(ndim - 2)), *matrix)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1e-3 * np.abs(a).max())  # programs of other shapes round otherwise
