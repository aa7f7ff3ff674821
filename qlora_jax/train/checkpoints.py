"""Checkpoints of a run, by orbax: adapter and optimizer pages, written in the background, whole or not at all.

The step number is all else a run needs: batches (packed ones too) and dropout are pure functions of (seed, step), so
it is the whole state of the input pipeline (feed/pipeline.py).

What lives on the device (the adapter, pages that stay there, scalars) is copied before `save` returns, since training
updates it in place. Optimizer pages in host memory are written from where they lie: nothing passes through the device,
nothing is copied, and training goes on, since an update replaces such a page instead of writing to it. Until its file
is written the replaced page stays: host memory holds up to twice the paged state during a save.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from qlora_jax.errors import InputError


class Checkpoints:
    """The `checkpoints/` folder of a workdir; keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=max(keep, 1), create=True, enable_async_checkpointing=True)
        in_place = type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # orbax would copy everything once more
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, in_place))
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    @property
    def latest(self) -> int | None:
        """Optimizer steps done at the newest whole checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, adapter: Any, states: list[Any], wait: bool = False) -> None:
        """Starts writing the state after `step` optimizer steps; waits for the disk only with `wait`.

        Raises InputError when this or the last write failed (a full disk): older checkpoints stay.
        """
        try:
            if step != self.latest:
                tree = _as_tree(adapter, states)
                self._check_room(step, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
                self._manager.save(step, args=ocp.args.PyTreeSave(tree))
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error

    def restore(self, adapter: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """The newest checkpoint, in the structure of a fresh adapter and fresh states (numpy leaves in `states`).

        Of the fresh ones only shapes are read.
        """
        trees = {"adapter": adapter, "optimizer": states}
        like = {name: [_shaped(leaf) for leaf in jax.tree.leaves(tree)] for name, tree in trees.items()}
        step = self.latest
        try:
            tree = self._manager.restore(step, args=_restore(like))
            for found, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
                if found.shape != expected.shape:
                    raise ValueError(f"an array of shape {list(found.shape)}, expected {list(expected.shape)}")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.folder / str(step)} cannot be restored ({_first_line(error)}); delete that folder to go on "
                "from the checkpoint before"
            ) from error
        new_adapter = jax.tree.unflatten(jax.tree.structure(adapter), [jax.numpy.asarray(x) for x in tree["adapter"]])
        return new_adapter, jax.tree.unflatten(jax.tree.structure(states), tree["optimizer"])

    def settle(self) -> None:
        """Waits for what is being written; a failure there has been, or need not be, reported."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(None, error) from error
        self._manager.close()

    def _check_room(self, step: int, needed: int) -> None:
        """Finds a nearly full disk before orbax starts writing, whose failures come with pages of traces."""
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * needed + 2**20:
            raise OSError(f"it needs {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free")

    def _failed(self, step: int | None, error: Exception) -> InputError:
        at = "" if step is None else f" at step {step}"
        return InputError(
            f"the checkpoint{at} could not be written to {self.folder}: {_first_line(error)}; older checkpoints are "
            "whole: free space and run the same command again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _as_tree(adapter: Any, states: list[Any]) -> dict[str, list[np.ndarray]]:
    """Plain lists of host arrays, in tree order: what is on disk does not depend on Flax's or optax's classes."""
    return {
        name: list(map(_host, jax.tree.leaves(tree))) for name, tree in (("adapter", adapter), ("optimizer", states))
    }


def _host(leaf: jax.Array) -> np.ndarray:
    """A copy of what training will overwrite; a view of what it will only replace."""
    return np.asarray(leaf) if leaf.sharding.memory_kind == "pinned_host" else np.array(leaf)


def _shaped(leaf: jax.Array) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _restore(like: Any) -> Any:
    return ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
