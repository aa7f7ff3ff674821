"""Onto the device, piece by piece: the host holds a few pieces of a tensor, the device the tensor and one piece.

Of several devices each holds its part of a tensor, where the caller says how it is divided.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.io.folder import PIECE_BYTES, TensorFiles, cut
from qlora_jax.io.header import numpy_dtype
from qlora_jax.mesh import turns
from qlora_jax.mesh.processes import are_several, everywhere, own

_turns = turns.Turns()  # of all that this process and the others read together


def anywhere(name: str, leaf: Any) -> None:
    """Where an array of a model stands: on the device."""


def as_read(name: str, weight: Any) -> Any:
    """A linear layer's weight, laid out as one device has it."""
    return weight


def of_weight(place: Callable[[str, Any], Any], name: str) -> Callable[[str, Any], Any]:
    """Where the parts of a linear layer's weights stand, by `put`: ".codes", or "" of an array."""
    return anywhere if place is anywhere else lambda part, leaf: place(f"blocks.{name}.weight{part}", leaf)


def to_device(
    files: TensorFiles, key: str, dtype: Any = None, sharding: Any = None, is_kept: bool = False
) -> jax.Array:
    """A tensor in its own shape, in dtype (its own by default), rounded on the device where they differ.

    `sharding`: how several devices hold it; None is one. `is_kept`: whether the array is the model's, and not gone
    before the next tensor is read.
    """
    shape, dtype = files.shapes[key], jnp.dtype(dtype or files.dtypes[key])
    if sharding is not None and are_several() and len(shape) > 1:  # vectors, which are few bytes, each reads itself
        stored, like = numpy_dtype(files.dtypes[key]), jax.ShapeDtypeStruct(shape, dtype)
        boxes = cut(shape, stored.itemsize, PIECE_BYTES)
        return turns.in_pieces(partial(files.pieces, key), boxes, like, stored, sharding, _turns)
    pieces = files.pieces(key)
    buffer: Any = None
    for corner, piece in pieces:
        if piece.shape == shape:
            # A copy, by a program of its shape: with device_put the piece would live on beside the next one. What is
            # kept may be the piece itself, on a CPU: there is no other that would be read into it.
            whole = jax.device_put(piece) if is_kept and piece.dtype == dtype else jnp.asarray(piece).astype(dtype)
            return jax.block_until_ready(whole if sharding is None else everywhere(whole, sharding))
        if buffer is None:
            buffer = jnp.zeros(shape, dtype, device=sharding)
        buffer = jax.block_until_ready(_write(buffer, piece, corner, sharding))
        del piece
    return buffer


def kept_dtype(stored: str, compute_dtype: Any) -> Any:
    """16-bit values stay what they are; 32-bit ones are kept only for a float32 computation."""
    return jnp.dtype(stored) if stored != "float32" else jnp.dtype(compute_dtype)


def vectors(
    files: TensorFiles, keys: Sequence[str], dtype: Any, compute_dtype: Any, sharding: Any = None
) -> jax.Array:
    """Vectors of one length, [len(keys), length] in dtype, None being the one that they are kept in.

    They are put together on the host: they are few bytes, and the device would need programs for it.
    """
    dtype = dtype or jnp.result_type(*{kept_dtype(files.dtypes[key], compute_dtype) for key in keys})
    with np.errstate(over="ignore"):  # 16 bits may not hold all of 32, on the device neither
        whole = np.stack([files.read(key).astype(dtype) for key in keys])
    return jax.device_put(whole) if sharding is None else everywhere(whole, sharding)


def stacked(
    make: Callable[[str, tuple[int, ...]], Any],
    slots: Mapping[str, tuple[int, ...]],
    room: tuple[int, ...],
    like: Any,
    sharding: Callable[[str, Any], Any] = anywhere,
    in_turns: bool = True,
) -> Any:
    """All weights of a projection: make(key, place) of each of `slots`, by one process where there are several.

    `like`: shapes and dtypes of one. `room`, `sharding`: as `put` has them. Where they are slices of one tensor, whose
    checksum is of all in order, they are not read in turns, but by each process.
    """
    keys = list(slots)
    if are_several() and in_turns:
        made = lambda number: make(keys[number], slots[keys[number]])  # noqa: E731
        return turns.stacked(made, list(slots.values()), room, like, sharding, _turns)
    stack: Any = None
    for key in keys:
        stack = put(stack, make(key, slots[key]), slots[key], room, sharding)
    return stack


def put(
    stack: Any,
    leaf: Any,
    place: tuple[int, ...],
    room: tuple[int, ...],
    sharding: Callable[[str, Any], Any] = anywhere,
) -> Any:
    """Writes one weight's arrays into their place in a stack, (layer,) or (layer, expert), of `room` (L,) or (L, E).

    The stack is allocated once (None before) and updated in place. `sharding`: takes the name of a part of the weight
    (".codes", or "" of an array) and its stack's shape, and says how devices hold it.
    """
    if stack is None:
        stack = _empty(own(leaf), room, sharding)
    divided = [stack.sharding if len(stack.sharding.device_set) > 1 else None for stack in jax.tree.leaves(stack)]
    where = tuple(np.int32(number) for number in place)
    return jax.block_until_ready(_write_weight(stack, own(leaf), where, tuple(divided)))


@partial(jax.jit, static_argnames=("room", "sharding"))
def _empty(leaf: Any, room: tuple[int, ...], sharding: Callable[[str, Any], Any]) -> Any:
    """Zeros for a stack of leaves, its arrays in one program."""

    def zeros(path: Any, x: Any) -> jax.Array:
        stack = jnp.zeros((*room, *x.shape), x.dtype)
        at = sharding(jax.tree_util.keystr(path), stack)
        return stack if at is None else jax.lax.with_sharding_constraint(stack, at)

    return jax.tree_util.tree_map_with_path(zeros, leaf)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(buffer: jax.Array, piece: jax.Array, corner: tuple[Any, ...], sharding: Any) -> jax.Array:
    written = jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), corner)
    return written if sharding is None else jax.lax.with_sharding_constraint(written, sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write_weight(stack: Any, leaf: Any, place: tuple[jax.Array, ...], shardings: tuple[Any, ...]) -> Any:
    def write(stack: jax.Array, x: jax.Array, sharding: Any) -> jax.Array:
        one = x.reshape(*(1,) * len(place), *x.shape)
        written = jax.lax.dynamic_update_slice(stack, one, (*place, *(0,) * x.ndim))
        return written if sharding is None else jax.lax.with_sharding_constraint(written, sharding)

    stacks, treedef = jax.tree.flatten(stack)
    return jax.tree.unflatten(treedef, map(write, stacks, jax.tree.leaves(leaf), shardings))
