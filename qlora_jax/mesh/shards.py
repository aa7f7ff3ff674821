"""What a model does on each device of a mesh, where it holds a part of each array: inside `shard_map` alone.

A layer's packed codes travel, never its 16-bit weights, and they do so while the layer before is computed. A gradient
of a gathered adapter comes back summed over the devices and cut as the adapter is: the transpose of gathering.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.mesh.axes import ROWS, TENSOR, TOKENS, Axes
from qlora_jax.mesh.gather import from_all, rounded_from_all, rows_here
from qlora_jax.mesh.rules import BLOCKS, NO_SPLITS, Cut, cut_of, name_of, named
from qlora_jax.mesh.tensor import Split, left


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a model's arrays are divided: part of its graph, so that a program knows it.

    cut: of each array of model and adapter that is divided, by name. split: how linear layers are along tensor.
    """

    axes: Axes
    cut: tuple[tuple[str, Cut], ...] = ()
    split: tuple[tuple[str, Split], ...] = ()

    @classmethod
    def of(cls, axes: Axes, *trees: Any, splits: Mapping[str, Split] = NO_SPLITS) -> "Shards":
        """By the rules, for the states of `lora.split`, arrays or shapes. `splits`: see cut_of."""
        found = ((name, cut_of(name, leaf, axes, splits)) for tree in trees for name, leaf in named(tree))
        return cls(axes, tuple((name, cut) for name, cut in found if cut != Cut()), tuple(splits.items()))

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """By name, of what is divided."""
        return dict(self.cut)

    @cached_property
    def axis_of(self) -> dict[str, int]:
        """Name -> axis, of what is gathered."""
        return {name: cut.gathered for name, cut in self.cut if cut.gathered is not None}

    def of_one(self, tree: Any) -> Any:
        """Shapes of a state -> those of the parts that one device holds."""

        def part(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            shape, cut = list(leaf.shape), self.cuts.get(name_of(path), Cut())
            if cut.gathered is not None:
                shape[cut.gathered] //= self.axes.along(cut.among)
            if cut.kept is not None:
                shape[cut.kept] //= getattr(self.axes, cut.along)
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

        return jax.tree_util.tree_map_with_path(part, tree)

    def whole(self, layer: Any) -> Any:
        """A layer's slice of a state under `blocks`: its parts gathered from all devices."""
        return self._gathered(layer, from_all)

    def adapter(self, layer: Any, dtype: Any) -> Any:
        """`whole` of a layer's adapter, which products round to `dtype`: it travels rounded, its gradient does not."""
        return self._gathered(layer, partial(rounded_from_all, dtype=dtype))

    def _gathered(self, layer: Any, gather: Callable[..., jax.Array]) -> Any:
        def gathered(path: Any, leaf: jax.Array) -> jax.Array:
            cut = self.cuts.get(BLOCKS + name_of(path), Cut())
            return leaf if cut.gathered is None else gather(leaf, cut.among, axis=leaf.ndim + cut.gathered)

        return jax.tree_util.tree_map_with_path(gathered, layer)

    def layer(self, stacks: Any, number: Any, keepdims: bool = False) -> Any:
        """`whole` of one layer of stacked arrays [L, ...]; [1, ...] with keepdims. The nearest where none has the
        number."""

        def at(stack: jax.Array) -> jax.Array:
            nearest = jnp.clip(number, 0, stack.shape[0] - 1)
            return jax.lax.dynamic_index_in_dim(stack, nearest, keepdims=keepdims)

        return self.whole(jax.tree.map(at, stacks))

    @property
    def gathers(self) -> bool:
        """Whether a layer's arrays are other devices' too."""
        return bool(self.axis_of)

    def gathers_some(self, stacks: Any) -> bool:
        """Whether arrays of a state under `blocks` are other devices' too."""
        return any(BLOCKS + name in self.axis_of for name, _ in named(stacks))

    @property
    def splits_embedding(self) -> bool:
        return "embedding" in self.cuts

    def head_axes(self, tied: bool) -> tuple[str, ...]:
        """The axes of the mesh along which the head's vocabulary is divided."""
        return self.cuts.get("embedding" if tied else "head", Cut()).axes

    def lookup(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of an embedding [V, D] of which this device has a part: tokens int32 [B, T] -> [B, T, D].

        Each device looks up what it has for all of them; a row is one device's and zeros from the others.
        """
        cut = self.cuts["embedding"]
        of_rows = cut.among if cut.gathered is not None else ()
        everyones = jax.lax.all_gather(tokens, of_rows, tiled=True) if of_rows else tokens
        rows = rows_here(table, everyones, cut.axes)
        rows = jax.lax.psum_scatter(rows, of_rows, tiled=True) if of_rows else rows
        return left(rows) if TENSOR in cut.axes else rows

    def add_rows(self, sums: jax.Array, tokens: jax.Array, dx: jax.Array) -> jax.Array:
        """Adds dx [B, T, D] of `lookup` to the rows [V, D] of which this device has a part."""
        cut = self.cuts["embedding"]
        if cut.gathered is not None:
            tokens, dx = (jax.lax.all_gather(x, cut.among, tiled=True) for x in (tokens, dx))
        here = tokens - jax.lax.axis_index(cut.axes) * sums.shape[0]
        here = jnp.where(here >= 0, here, sums.shape[0])  # a negative place would count from the end
        return sums.at[here].add(dx.astype(sums.dtype), mode="drop")

    def first_row(self, rows: int) -> jax.Array:
        """Which row of a micro-batch this device's `rows` begin with, int32 []."""
        return jax.lax.axis_index(ROWS) * rows

    @property
    def row_parts(self) -> int:
        """Devices that rows of a batch are divided among."""
        return self.axes.row_parts

    @property
    def divides_tokens(self) -> bool:
        """Whether a row's tokens are several devices' (mesh/sequence.py)."""
        return self.axes.sequence > 1

    def total(self, values: Any) -> Any:
        """Sums over all devices, of what each has of its own tokens."""
        return jax.lax.psum(values, TOKENS)

    def total_of_rows(self, values: Any) -> Any:
        """Sums over all devices, of what each has of whole rows."""
        return jax.lax.psum(values, ROWS)

    def summed(self, gradient: Any) -> Any:
        """Over what of each array all devices added to its sums; what was gathered came back summed along its axes."""

        def added(path: Any, leaf: jax.Array) -> jax.Array:
            cut = self.cuts.get(name_of(path), Cut())
            # a layer's gradients are of products that devices along tensor divide; others are the same on each
            axes = (*TOKENS, TENSOR) if self.split and name_of(path).startswith(BLOCKS) else TOKENS
            return jax.lax.psum(leaf, tuple(axis for axis in axes if axis not in cut.axes))

        return jax.tree_util.tree_map_with_path(added, gradient)

    def norm(self, gradient: Any) -> jax.Array:
        """Global norm of a summed gradient: float32 []."""
        squares: dict[tuple[str, ...], jax.Array] = {}  # by what divides it
        for name, leaf in named(gradient):
            cut = self.cuts.get(name, Cut())
            squares[cut.axes] = squares.get(cut.axes, 0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        return jnp.sqrt(sum(jax.lax.psum(square, along) if along else square for along, square in squares.items()))


def share_of_one(shards: Shards | None, tree: Any) -> float:
    """The part of a state's bytes that one device holds."""
    return bytes_of_one(shards, tree) / max(bytes_of_one(None, tree), 1)


def bytes_of_one(shards: Shards | None, tree: Any) -> int:
    """Bytes of a state's arrays that one device holds."""
    mine = tree if shards is None else shards.of_one(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(mine))
