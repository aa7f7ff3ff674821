"""Arrays onto the devices of a mesh, each device the part that is its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import InputError
from qlora_jax.mesh.axes import ORDER, ROWS, Axes
from qlora_jax.mesh.processes import are_several
from qlora_jax.mesh.rules import NO_SPLITS, Cut, cut_of, name_of
from qlora_jax.mesh.shards import Shards
from qlora_jax.mesh.tensor import Split


class Devices(NamedTuple):
    """The devices of a run, and how its arrays are divided among them."""

    mesh: Mesh
    shards: Shards

    def shardings(self, tree: Any) -> Any:
        """Where each array of a state stands."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            specs(self.shards, tree),
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    def rows(self, x: Any) -> NamedSharding:
        """Where an input [..., B, T] stands, as on_mesh divides it."""
        return NamedSharding(self.mesh, _rows(x))


def mesh_of(axes: Axes, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices`, by default those that JAX sees. Raises InputError where there are fewer, or, of several
    processes, others: each of them must have some of the mesh."""
    if devices is None and are_several() and jax.device_count() != axes.devices:
        raise InputError(
            f"the mesh ({axes}) takes {axes.devices} devices, and the {jax.process_count()} processes have "
            f"{jax.device_count()} together: set {axes.fitting(jax.device_count())}"
        )
    devices = jax.devices() if devices is None else devices
    if len(devices) < axes.devices:
        raise InputError(
            f"the mesh ({axes}) takes {axes.devices} devices, and JAX sees {len(devices)} here: set "
            f"{axes.fitting(len(devices))}, or start the run where there are more"
        )
    kept = np.asarray(devices[: axes.devices], object).reshape([getattr(axes, name) for name in ORDER])
    return Mesh(kept, ORDER)


def by_rules(mesh: Mesh, name: str, leaf: Any, splits: Mapping[str, Split] = NO_SPLITS) -> NamedSharding:
    """Where an array of the model stands, by its name in the model's tree and what has its shape and dtype."""
    return NamedSharding(mesh, _spec(cut_of(name, leaf, Axes(**mesh.shape), splits), leaf))


def specs(shards: Shards, tree: Any) -> Any:
    """PartitionSpec of each array of a state."""

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        return _spec(shards.cuts.get(name_of(path), Cut()), leaf)

    return jax.tree_util.tree_map_with_path(spec, tree)


def _rows(x: Any) -> PartitionSpec:
    return PartitionSpec(*(None,) * (len(x.shape) - 2), ROWS) if len(x.shape) > 1 else PartitionSpec()


def _spec(cut: Cut, leaf: Any) -> PartitionSpec:
    """Of an array that is cut so."""
    along = cut.of_each(len(leaf.shape))
    while along and not along[-1]:
        along.pop()
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in along))


def on_mesh(function: Callable[..., Any], devices: Devices, results: Callable[[Any], Any]) -> Any:
    """A program of each device, function(adapter, base, *inputs), as one of the mesh.

    Args:
      function: takes this device's parts of the states of `lora.split`, and its rows of the inputs.
      results: specs of what it gives, from the adapter's.
    Returns:
      function of whole arrays. Inputs [..., B, T] are divided along B, others stand whole on each device; None is left
      out.
    """

    def called(adapter: Any, base: Any, *inputs: Any) -> Any:
        there = [x is not None for x in inputs]
        given = [x for x in inputs if x is not None]
        rows = [_rows(x) for x in given]

        def local(adapter: Any, base: Any, *given: Any) -> Any:
            mine = iter(given)
            return function(adapter, base, *(next(mine) if is_there else None for is_there in there))

        mesh, shards = devices
        of_adapter = specs(shards, adapter)
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(of_adapter, specs(shards, base), *rows),
            out_specs=results(of_adapter),
            check_vma=False,  # kernels and custom gradients do not say along which axes what they give varies
        )
        return mapped(adapter, base, *given)

    return called
