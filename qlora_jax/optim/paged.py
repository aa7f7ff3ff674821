"""The paged optimizer: state of any optax transformation in host memory, on the device only page by page.

Each page (optim/pages.py) has its own optax state and its own update. Those that stay on the device are updated by one
call of one compiled program, those that travel by a program each. Both are the same pages' updates with nothing fused
across pages, so where a page lives changes not one bit of the numbers (on GPUs: WORKSPACE.md).

    fetch 0 | update what stays | fetch 1 | update 0, leave 0 | fetch 2 | update 1, leave 1, wait for 0 | fetch 3 | ...

Of those that travel, page i + 1 is on its way to the device and page i - 1 on its way back while page i is updated: at
most three are on the device, and the host waits for none but the one that must have left before the next is fetched.
The first arrives while what stays is updated. Transfers are explicit `device_put`s between the memory kinds
"pinned_host" and "device", never part of a program that donates (xla#29270). Step counts and other scalars stay on the
device: one that moved would make a second program.

Pages in host memory are replaced and never written to, so whoever holds one (a checkpoint being written) may go on
reading it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.optim.pages import Page, Pages

PAGING = ("never", "always", "auto")


class PagedOptimizer:
    """Updates a tree of parameters page by page.

    Args:
      pages: of the parameters' shapes.
      params: only read for where they lie: on one device, or sharded or replicated over a mesh. State of their shape
        lies there too; state of another shape (scales of blocks, factors) is replicated. An array sharded along its
        layer axis can only be cut into pages that its shards divide (ValueError).
      resident_bytes: state that stays on the device between updates; math.inf pages nothing, 0 everything.
    """

    def __init__(self, pages: Pages, params: Any, resident_bytes: float = math.inf):
        self.pages = pages
        self.resident = pages.resident(resident_bytes)
        self._placed = [_device_sharding(leaf) for leaf in jax.tree.leaves(params)]
        self._everywhere = _replicated(self._placed[0])
        self._staying = [index for index, kept in enumerate(self.resident) if kept]
        self._travelling = [index for index, kept in enumerate(self.resident) if not kept]
        starts = [np.asarray([piece.start for piece in page], np.int32) for page in self.pages.pages]
        self._starts = jax.device_put(starts, self._everywhere)
        self._on_device = [self._state_shardings(page) for page in self.pages.pages]
        self._home = [
            shardings if kept else self._in_host_memory(page, shardings)
            for page, kept, shardings in zip(self.pages.pages, self.resident, self._on_device, strict=True)
        ]
        self._by_layout: dict[Any, Any] = {}  # compiled programs
        self._by_text: dict[Any, Any] = {}

    @property
    def resident_bytes(self) -> int:
        """State on the device between updates."""
        return sum(size for size, kept in zip(self.pages.bytes, self.resident, strict=True) if kept)

    @property
    def programs_compiled(self) -> int:
        """So far; pages that travel and are alike share one."""
        return len(self._by_text)

    def init(self, params: Any) -> list[Any]:
        """One optax state a page, where it lives between updates."""
        leaves = jax.device_put(jax.tree.leaves(params), self._placed)
        states = []
        for index, page in enumerate(self.pages.pages):
            state = self._init_program(index)(self._starts[index], _touched(page, leaves))
            state_def = jax.tree.structure(self.pages.state_shapes(page))
            states.append(self._leave(index, jax.tree.unflatten(state_def, state)))
            jax.block_until_ready(states[-1])  # bounds what is on the device
        return states

    def place(self, states: Sequence[Any]) -> list[Any]:
        """States read from a checkpoint, put where they live: one transfer each, none through the device."""
        return [self._leave(index, state) for index, state in enumerate(states)]

    def set(self, states: Sequence[Any], **values: Any) -> list[Any]:
        """States whose hyperparameters (optax.inject_hyperparams) have these values: [] or, in a pack, [A]."""

        def like(old: jax.Array, value: Any) -> jax.Array:  # each page its own: scalars are updated in place
            return jax.device_put(jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape), self._everywhere)

        return [
            optax.tree.set(state, **{name: like(optax.tree.get(state, name), value) for name, value in values.items()})
            for state in states
        ]

    def update(self, params: Any, gradients: Any, states: list[Any], factor: Any = 1.0) -> tuple[Any, list[Any]]:
        """New parameters and states, for gradients that are multiplied by `factor`, float32 [] or, in a pack, [A].

        `params` is donated: its buffers are updated in place. `states` is emptied page by page, so that host memory
        holds each page once. The last page may still be leaving the device when this returns.
        """
        leaves, treedef = jax.tree.flatten(params)
        leaves = jax.device_put(leaves, self._placed)
        grads = jax.device_put(jax.tree.leaves(gradients), self._placed)
        shape = leaves[0].shape[: self.pages.axis]
        factor = jax.device_put(jnp.broadcast_to(jnp.asarray(factor, jnp.float32), shape), self._everywhere)
        new_states: list[Any] = [None] * len(self.pages)
        arriving = [self._fetch(index, states) for index in self._travelling[:1]]
        if self._staying:
            kept = [_taken(index, states) for index in self._staying]
            kept = self._advance(self._staying, leaves, grads, kept, factor)
            for index, state in zip(self._staying, kept, strict=True):
                new_states[index] = state
        for number, index in enumerate(self._travelling):
            here = arriving
            arriving = [self._fetch(following, states) for following in self._travelling[number + 1 : number + 2]]
            [state] = self._advance([index], leaves, grads, here, factor)
            new_states[index] = self._leave(index, state)
            del here, state  # the page on the device goes when its copy is complete
            if number:
                before = self._travelling[number - 1]
                self._wait(before, new_states[before])
        return jax.tree.unflatten(treedef, leaves), new_states

    def _fetch(self, index: int, states: list[Any]) -> Any:
        """Takes a page out of `states` and sends it to the device."""
        return _put(_taken(index, states), self._on_device[index])

    def _advance(
        self, indices: list[int], leaves: list[jax.Array], grads: list[jax.Array], states: list[Any], factor: Any
    ) -> list[Any]:
        """Updates pages by one program: their rows in `leaves`, and their states, which are returned."""
        touched = self.pages.touched(indices)
        arrays = [leaves[leaf] for leaf in touched], [grads[leaf] for leaf in touched]
        old, state_defs = zip(*map(jax.tree.flatten, states), strict=True)
        starts = [self._starts[index] for index in indices]
        updated, new = self._update_program(indices)(starts, *arrays, list(old), factor)
        for leaf, value in zip(touched, updated, strict=True):
            leaves[leaf] = value
        return [jax.tree.unflatten(*state) for state in zip(state_defs, new, strict=True)]

    def _leave(self, index: int, state: Any) -> Any:
        """Sends a page to where it lives."""
        return _put(state, self._home[index])

    def _wait(self, index: int, state: Any) -> None:
        """Until a page has left the device."""
        jax.block_until_ready(state)

    def _init_program(self, index: int) -> Any:
        pages, page = self.pages, self.pages.pages[index]

        def init(starts, arrays):
            return jax.tree.leaves(pages.tx.init(pages.tree(page, pages.rows_of(page, starts, arrays))))

        def lower() -> Any:
            arrays = _placed_shapes(_touched(page, pages.shapes), _touched(page, self._placed))
            return jax.jit(init, out_shardings=self._on_device[index], keep_unused=True).lower(
                self._starts[index], arrays
            )

        return self._compiled("init", [index], lower)

    def _update_program(self, indices: list[int]) -> Any:
        def lower() -> Any:
            function, arguments, donated = self.pages.update_program(indices)
            arrays = [self._placed[leaf] for leaf in self.pages.touched(indices)]
            states = [self._on_device[index] for index in indices]
            shardings = ([self._everywhere] * len(indices), arrays, arrays, states, self._everywhere)
            placed, outputs = _placed_shapes(arguments, shardings), (arrays, states)
            return jax.jit(function, donate_argnums=donated, out_shardings=outputs, keep_unused=True).lower(*placed)

        return self._compiled("update", indices, lower)

    def _compiled(self, what: str, indices: list[int], lower: Callable[[], Any]) -> Any:
        """One program for all pages whose programs read the same, whichever arrays they are about."""
        pages = [self.pages.pages[index] for index in indices]
        layout = (what, tuple(tuple((piece.leaf, piece.rows) for piece in page) for page in pages))
        if layout not in self._by_layout:
            lowered = lower()
            text = (lowered.as_text(), lowered.in_tree)
            if text not in self._by_text:
                self._by_text[text] = lowered.compile()
            self._by_layout[layout] = self._by_text[text]
        return self._by_layout[layout]

    def _in_host_memory(self, page: Page, shardings: Sequence[Any]) -> list[Any]:
        """All but scalars, of which a pack has one an adapter."""
        leaves = jax.tree.leaves(self.pages.state_shapes(page))
        return [
            sharding.with_memory_kind("pinned_host") if leaf.ndim > self.pages.axis else sharding
            for leaf, sharding in zip(leaves, shardings, strict=True)
        ]

    def _state_shardings(self, page: Page) -> list[Any]:
        """Of a page's state on the device: a leaf with the shape of the parameter that its path names lies as that."""
        rows, _ = jax.tree_util.tree_flatten_with_path(self.pages.piece_shapes(page))
        owners = [(path, leaf.shape, self._placed[piece.leaf]) for (path, leaf), piece in zip(rows, page, strict=True)]
        for _, shape, placed in owners:
            _check_divides(shape, placed)

        def sharding_of(path: tuple, leaf: Any) -> Any:
            for owner, shape, placed in owners:
                named = any(path[i : i + len(owner)] == owner for i in range(len(path) - len(owner) + 1))
                if named and leaf.shape == shape:
                    return placed
            return self._everywhere

        state, _ = jax.tree_util.tree_flatten_with_path(self.pages.state_shapes(page))
        return [sharding_of(path, leaf) for path, leaf in state]


def _taken(index: int, states: list[Any]) -> Any:
    """A page's state, of which `states` is left without."""
    state, states[index] = states[index], None
    return state


def _touched(page: Page, leaves: Sequence[Any]) -> list[Any]:
    return [leaves[piece.leaf] for piece in page]


def _put(state: Any, shardings: Sequence[Any]) -> Any:
    """What is there already is not copied."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, jax.device_put(leaves, list(shardings)))


def _placed_shapes(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _device_sharding(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return sharding.with_memory_kind("device")


def _replicated(sharding: Any) -> Any:
    """The same devices, each holding everything."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(), memory_kind="device")
    return sharding


def _check_divides(shape: tuple[int, ...], sharding: Any) -> None:
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"a page of shape {list(shape)} cannot be sharded as its parameter is, {sharding.spec}: shard another axis "
            "than the layers', or change optimizer.page_bytes"
        ) from error
