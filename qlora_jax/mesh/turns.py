"""Arrays that several processes read in turns: each is read, checked and packed by one of them, and goes from there to
the devices that hold it.

An entry of a stack (a weight of one layer) is one device's to make. As many as there are devices are made at a time;
then their parts change places, so that a device receives its own parts alone, packed. A tensor that is read piece by
piece is one process's to read, and each piece goes to all devices, which keep what is theirs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.mesh import processes

Shardings = Callable[[str, Any], Any]  # name of a part of a weight, its stack's shape and dtype -> jax sharding


class Turns:
    """Whose turn it is: of the processes that may, the one that had the fewest bytes. All of them know that."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def take(self, size: int, among: Sequence[int]) -> int:
        """The process that reads the next `size` bytes."""
        process = min(among, key=lambda process: (self.bytes.get(process, 0), process))
        self.bytes[process] = self.bytes.get(process, 0) + size
        return process


def stacked(
    make: Callable[[int], Any],
    places: Sequence[tuple[int, ...]],
    room: tuple[int, ...],
    like: Any,
    shardings: Shardings,
    turns: Turns,
) -> Any:
    """A stack whose entries are made in turns.

    Args:
      make: an entry of its number, arrays on a device of this process; called for the entries that are its own.
      places: of the entries, (layer,) or (layer, expert). room: of all of them, (L,) or (L, E).
      like: shapes and dtypes of an entry.
      shardings: takes the name of a part (".codes", or "" of an array) and its stack, and says how devices hold it.
    Returns:
      `like` with arrays [*room, ...].
    """
    stack = _empty(like, room, shardings)
    held = tuple(leaf.sharding for leaf in jax.tree.leaves(stack))
    devices = list(held[0].mesh.devices.flat)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]
    spread = [NamedSharding(at.mesh, PartitionSpec(_ways(at, len(room))[0])) for at in held]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)
    for first in range(0, len(places), len(devices)):
        numbers = range(first, min(first + len(devices), len(places)))
        free, made, makers = list(devices), {}, []
        for number in numbers:
            process = turns.take(size, [device.process_index for device in free])
            makers.append(next(device for device in free if device.process_index == process))
            free.remove(makers[-1])
            if process == jax.process_index():
                made[makers[-1]] = jax.device_put(jax.tree.leaves(make(number)), makers[-1])
        rows = [_rows({at: leaves[i] for at, leaves in made.items()}, x, spread[i]) for i, x in enumerate(shapes)]
        order = np.asarray([_numbers(at, makers + free) for at in spread], np.int32)
        where = np.zeros((len(devices), len(room)), np.int32)
        where[: len(numbers)] = [places[number] for number in numbers]
        processes.wait("turn")
        stack = jax.block_until_ready(_write(stack, rows, order, where, np.int32(len(numbers)), held))
    return stack


def in_pieces(
    pieces: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]],
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    like: Any,
    stored: np.dtype,
    sharding: NamedSharding,
    turns: Turns,
) -> jax.Array:
    """A tensor that one process reads.

    Args:
      pieces: corner and values of each, in order; called by the one whose turn it is.
      boxes: corner and shape of each, which all know.
      like: shape of the tensor, and the dtype that it is kept in. stored: the one that it is read in.
      sharding: how devices hold it.
    """
    mesh = sharding.mesh
    every = sorted({device.process_index for device in mesh.devices.flat})
    process = turns.take(math.prod(like.shape) * stored.itemsize, every)
    reader = next(device for device in mesh.devices.flat if device.process_index == process)
    read = pieces() if process == jax.process_index() else None
    buffer = jnp.zeros(like.shape, like.dtype, device=sharding)
    for corner, shape in boxes:
        here = {}
        if read is not None:
            values = np.ascontiguousarray(next(read)[1]).reshape(-1).view(np.uint8)
            here[reader] = jax.device_put(values, reader)
        bytes_of = jax.ShapeDtypeStruct((math.prod(shape) * stored.itemsize,), np.uint8)
        rows = _rows(here, bytes_of, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        processes.wait("turn")
        at = tuple(np.int32(number) for number in corner)
        buffer = jax.block_until_ready(_write_piece(buffer, rows, at, shape, stored, sharding))
    return buffer


def _ways(sharding: NamedSharding, leading: int) -> list[tuple[str, ...]]:
    """The axes of a mesh that divide the rows of a round, and those that still do, step by step, as one axis after the
    other comes to divide what an entry of the stack is divided along: each step is one exchange, all to all."""
    kept = [axis for along in tuple(sharding.spec)[leading:] for axis in _names(along)]
    rows = [axis for axis in sharding.mesh.axis_names if axis not in kept] + kept
    return [tuple(rows[:stop]) for stop in range(len(rows), len(rows) - len(kept) - 1, -1)]


def _names(along: Any) -> tuple[str, ...]:
    return () if along is None else (along,) if isinstance(along, str) else tuple(along)


def _numbers(spread: NamedSharding, devices: Sequence[Any]) -> list[int]:
    """Which row of an array [devices, ...] each device has."""
    rows = spread.devices_indices_map((len(devices),))
    return [rows[device][0].start or 0 for device in devices]


def _rows(own: dict[Any, jax.Array], like: Any, spread: NamedSharding) -> jax.Array:
    """A row of each device, [devices, ...]: what this process's devices have in `own`, else zeros."""
    mine = [device for device in spread.mesh.devices.flat if device.process_index == jax.process_index()]
    rows = [own[at][None] if at in own else jnp.zeros((1, *like.shape), like.dtype, device=at) for at in mine]
    return jax.make_array_from_single_device_arrays((spread.mesh.size, *like.shape), spread, rows)


def _empty(like: Any, room: tuple[int, ...], shardings: Shardings) -> Any:
    def zeros(path: Any, leaf: Any) -> jax.Array:
        stack = jax.ShapeDtypeStruct((*room, *leaf.shape), leaf.dtype)
        return jnp.zeros(stack.shape, stack.dtype, device=shardings(jax.tree_util.keystr(path), stack))

    return jax.tree_util.tree_map_with_path(zeros, like)


@partial(jax.jit, donate_argnums=0, static_argnums=5)
def _write(
    stack: Any, rows: list[jax.Array], order: jax.Array, places: jax.Array, count: jax.Array, held: tuple[Any, ...]
) -> Any:
    """Entry i of a round is row order[x, i] of array x; it goes to places[i]."""
    leading = places.shape[1]

    def written(stack: jax.Array, rows: jax.Array, order: jax.Array, sharding: NamedSharding) -> jax.Array:
        # first to the devices that keep the parts: of the stack's axes, those behind the entries'
        tail = [_names(along) for along in tuple(sharding.spec)[leading:]]
        for left in [*_ways(sharding, leading)[1:], ()]:
            along = [tuple(axis for axis in names if axis not in left) or None for names in tail]
            at = NamedSharding(sharding.mesh, PartitionSpec(left or None, *along))
            rows = jax.lax.with_sharding_constraint(rows, at)

        def write(i: jax.Array, stack: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(rows, order[i], keepdims=False)
            at = (*(places[i, axis] for axis in range(leading)), *(0,) * row.ndim)
            return jax.lax.dynamic_update_slice(stack, row.reshape(*(1,) * leading, *row.shape), at)

        return jax.lax.with_sharding_constraint(jax.lax.fori_loop(0, count, write, stack), sharding)

    stacks, treedef = jax.tree.flatten(stack)
    return jax.tree.unflatten(treedef, map(written, stacks, rows, order, held))


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _write_piece(
    buffer: jax.Array, rows: jax.Array, corner: Any, shape: tuple[int, ...], stored: np.dtype, sharding: NamedSharding
) -> jax.Array:
    """All rows but one are zeros, so their sum is that one's bytes."""
    mesh = sharding.mesh
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def summed(row: jax.Array) -> jax.Array:
        return jax.lax.psum(row[0], mesh.axis_names)

    data = jax.shard_map(summed, mesh=mesh, in_specs=every, out_specs=whole)(rows)
    if stored.itemsize > 1:
        data = data.reshape(-1, stored.itemsize)
    piece = jax.lax.bitcast_convert_type(data, stored).reshape(shape)
    written = jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), corner)
    return jax.lax.with_sharding_constraint(written, sharding)
