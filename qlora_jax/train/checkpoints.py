"""Checkpoints of a run, by orbax: adapter and optimizer pages, written in the background, whole or not at all.

The step number is all else a run needs: batches (packed ones too) and dropout are pure functions of (seed, step), so
it is the whole state of the input pipeline (feed/pipeline.py).

What lives on the device (the adapter, pages that stay there, scalars) is copied before `save` returns, since training
updates it in place. Optimizer pages in host memory are written from where they lie: nothing passes through the device,
nothing is copied, and training goes on, since an update replaces such a page instead of writing to it. Until its file
is written the replaced page stays: host memory holds up to twice the paged state during a save.

A checkpoint's last file has the checksum of each of its files, made in the background from what was just written. A
checkpoint is whole where its files still have them: that is looked at before anything in it is parsed. One that is not
is set aside, STEP.set_aside, where neither orbax nor we count or delete it, and the one before is taken.

Of several processes that see the folder each writes its devices' parts. Orbax waits for all of them, then the first one
makes the checksums and gives the folder its name.
"""

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.files import loads, read_whole, write_json
from qlora_jax.mesh import processes

_ITEM, _SUMS = "default", "checksums.json"  # orbax's folder of what it saved, in that of a step; our file in it
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax was writing
# of the process or its rights, not of the file
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Checkpoints:
    """The `checkpoints/` folder of a workdir; keeps the newest `keep`. The caller holds the workdir's lock.

    Args:
      say: takes lines for the user.
      together: all processes of the run write, each what its devices hold. The first one looks after the folder.
    Raises:
      InputError: there are checkpoints and none is whole.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print, together: bool = False):
        self.folder, self._keep, self._say = folder, max(keep, 1), say
        self._together = together
        self._opened: ocp.CheckpointManager | None = None
        self._found: int | None = None
        if not processes.is_first():
            return
        for left in folder.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._found = self._newest_whole({})

    @property
    def latest(self) -> int | None:
        """Optimizer steps done at the newest whole checkpoint; None when there is none."""
        return self._found if self._opened is None else self._opened.latest_step()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Opened at the first save, once nothing will be set aside any more."""
        if self._opened is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=False, enable_async_checkpointing=True, lightweight_initialize=True,
                multiprocessing_options=_who(self._together),
            )  # fmt: skip
            handler = _Handler(self._together)
            self._opened = ocp.CheckpointManager(self.folder.absolute(), options=options, item_handlers=handler)
        return self._opened

    def save(self, step: int, adapter: Any, states: list[Any], wait: bool = False) -> None:
        """Starts writing the state after `step` optimizer steps; waits for the disk only with `wait`.

        Raises InputError when this or the last write failed (a full disk): older checkpoints stay.
        """
        try:
            if step != self.latest:
                tree, manager = _as_tree(adapter, states, _kept if self._together else _host), self._manager
                if processes.is_first():
                    self._check_room(step, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
                if not manager.save(step, args=_Save(tree)):
                    raise ValueError("orbax sees a later one there")
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error

    def restore(self, adapter: Any, states: list[Any]) -> tuple[int, Any, list[Any]] | None:
        """The newest whole checkpoint, in the structure of a fresh adapter and fresh states (numpy leaves in `states`),
        with its step; None where there is none. Of the fresh ones only shapes are read.

        Raises InputError where none fits them.
        """
        trees = {"adapter": adapter, "optimizer": states}
        like = {name: [_shaped(leaf) for leaf in jax.tree.leaves(tree)] for name, tree in trees.items()}
        unfit: dict[int, str] = {}
        self._found = self.latest
        while self._found is not None:
            try:
                tree = _read(self.folder / str(self._found) / _ITEM, like)
                break
            except MemoryError:
                raise
            except Exception as error:  # whatever orbax makes of files that an older version wrote, without checksums
                unfit[self._found] = _first_line(error)
                self._found = self._newest_whole(unfit)
        else:
            return None
        new_adapter = jax.tree.unflatten(jax.tree.structure(adapter), [jax.numpy.asarray(x) for x in tree["adapter"]])
        return self._found, new_adapter, jax.tree.unflatten(jax.tree.structure(states), tree["optimizer"])

    def _newest_whole(self, unfit: dict[int, str]) -> int | None:
        """The newest step that is whole and not in `unfit`, step -> what is wrong; the newer ones are set aside."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        steps = sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))
        wrong: dict[int, str] = {}
        for step in reversed(steps):
            wrong[step] = unfit.get(step) or self._damage(step)
            if not wrong[step]:
                for newer in steps[steps.index(step) + 1 :]:
                    self._set_aside(newer, wrong[newer], step)
                return step
        if not wrong:
            return None
        each = "; ".join(f"{step}: {reason}" for step, reason in list(wrong.items())[:3])
        raise InputError(
            f"no checkpoint in {self.folder} can be used ({each}): put a whole one back, or delete that folder to "
            "start anew"
        )

    def _damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint; "" where they are what was written."""
        folder = self.folder / str(step)
        try:
            if not (folder / _ITEM / _SUMS).exists():
                _read_all(folder / _ITEM)
                self._say(
                    f"checkpoints: {folder} has no checksums (an older version wrote it): it is taken as it is, though "
                    "it may have changed"
                )
                return ""
            return _changed(folder / _ITEM)
        except OSError as error:
            if error.errno in _NOT_DAMAGE:
                raise InputError(f"{folder} cannot be read: {error.strerror}") from error
            return f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            return _first_line(error)

    def _set_aside(self, step: int, reason: str, before: int) -> None:
        names = (f"{step}.set_aside{f'_{number}' if number > 1 else ''}" for number in range(1, 10**9))
        aside = next(path for name in names if not (path := self.folder / name).exists())
        try:
            (self.folder / str(step)).rename(aside)
        except OSError as error:
            raise InputError(
                f"{self.folder / str(step)} cannot be used ({reason}), nor be renamed: {error.strerror}"
            ) from error
        if self._opened is not None:
            self._opened.reload()
        self._say(
            f"checkpoints: {self.folder / str(step)} cannot be used ({reason}): set aside as {aside.name}, going on "
            f"from step {before}"
        )

    def settle(self) -> None:
        """Waits for what is being written; a failure there has been, or need not be, reported."""
        if self._opened is not None:
            with contextlib.suppress(Exception):
                self._opened.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        if self._opened is None:
            return
        try:
            self._opened.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(None, error) from error
        self._opened.close()

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


class SharedCheckpoints:
    """As Checkpoints, of a run of several processes, which hold the same state together.

    Where all see the run's folder each writes what its devices hold. Else the first one, which has it, writes all:
    arrays are put together for it, one after the other. What it restores it tells the others. So every method is called
    by all of them at once.

    Args:
      folder: of this process, which is the run's for the first one alone.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print):
        shared = processes.seen_by_all(folder.parent)
        self._together = shared is not None
        self._own: Checkpoints | None = None
        if shared is not None:
            self._own = Checkpoints(shared / folder.name, keep, say, together=True)
        elif processes.is_first():
            say(f"checkpoints: {folder} is not on a disk that all processes see: the first one writes whole arrays")
            self._own = Checkpoints(folder, keep, say)
        self._latest: int | None = processes.told(None if self._own is None else self._own.latest)

    @property
    def latest(self) -> int | None:
        return self._latest

    def save(self, step: int, adapter: Any, states: list[Any], wait: bool = False) -> None:
        if step != self._latest and not self._together:
            adapter, states = (jax.tree.map(processes.on_first, tree) for tree in (adapter, states))
        if self._own is not None and (step != self._latest or wait):
            self._own.save(step, adapter, states, wait)
        self._latest = step
        if wait:
            processes.wait(f"checkpoint {step}")

    def restore(self, adapter: Any, states: list[Any]) -> tuple[int, Any, list[Any]] | None:
        found = self._own.restore(adapter, states) if self._own is not None and processes.is_first() else None
        self._latest = processes.told(None if found is None else found[0])
        if self._latest is None:
            return None
        trees = (adapter, states)
        read = None if found is None else [np.asarray(leaf) for leaf in jax.tree.leaves(found[1:])]
        leaves = processes.told_arrays(read, jax.tree.leaves(trees))
        return (self._latest, *jax.tree.unflatten(jax.tree.structure(trees), leaves))

    def settle(self) -> None:
        if self._own is not None:
            self._own.settle()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's own, whose last file has the checksums of the others; then the folder takes its place.

    together: all processes write, each its parts of divided arrays, and the first one the rest.
    """

    def __init__(self, together: bool = False) -> None:
        in_place = type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # orbax would copy everything once more
        divided = [(jax.Array, type_handlers.ArrayHandler())] if together else []
        super().__init__(
            type_handler_registry=type_handlers.create_type_handler_registry((np.ndarray, in_place), *divided),
            multiprocessing_options=_who(together),
        )

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        write_json(folder / _SUMS, {name: checksums.of_file(folder / name) for name in _files(folder)})


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.PyTreeSave):
    """Goes to _Handler."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.PyTreeRestore):
    """Goes to _Handler."""


def _who(together: bool = False) -> Any:
    """Of a run's processes all write, or the first alone, which always reads; orbax would wait for all."""
    if not processes.are_several():
        return ocp.options.MultiprocessingOptions()
    active = set(range(jax.process_count())) if together else {0}
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes=active, barrier_sync_key_prefix="run")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _changed(item: Path) -> str:
    """The first file that is not what was written; "" where all are. Raises OSError, or ValueError for the list."""
    sums = loads(read_whole(item / _SUMS))
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{_SUMS} is no list of checksums")
    there = set(_files(item))
    for name, stated in sums.items():
        if name not in there:
            return f"{_ITEM}/{name} is missing"
        if checksums.of_file(item / name) != stated:
            return f"{_ITEM}/{name} is not what was written"
    return ""


def _read_all(item: Path) -> None:
    """Raises ValueError where a file of a checkpoint without checksums is missing or cut short. Orbax fails there, too,
    with tracebacks of its threads."""
    import tensorstore

    if not (item / "manifest.ocdbt").is_file():
        raise ValueError(f"{_ITEM}/manifest.ocdbt is missing")
    base = f"file://{item.absolute()}/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        if not store.read(key).result().value:  # what a missing file gives
            raise ValueError(f"{_ITEM}: {key.decode()} is missing")


def _read(item: Path, like: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Raises ValueError where the arrays are not of the shapes in `like`, and whatever orbax raises."""
    with ocp.Checkpointer(_Handler(), multiprocessing_options=_who()) as checkpointer:
        tree = checkpointer.restore(item.absolute(), args=_restore(like))
    for found, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if found.shape != expected.shape:
            raise ValueError(f"an array of shape {list(found.shape)}, expected {list(expected.shape)}")
    return tree


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _as_tree(adapter: Any, states: list[Any], kept: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """Plain lists of `kept` arrays, in tree order: what is on disk does not depend on Flax's or optax's classes."""
    return {
        name: list(map(kept, jax.tree.leaves(tree))) for name, tree in (("adapter", adapter), ("optimizer", states))
    }


def _kept(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """As _host, of what is divided among processes: a CPU's arrays are read where training will overwrite them."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
        return _host(leaf)
    is_shared = jax.default_backend() == "cpu" and leaf.sharding.memory_kind != "pinned_host"
    return jax.numpy.copy(leaf) if is_shared else leaf


def _host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A copy of what training will overwrite; a view of what it will only replace."""
    if isinstance(leaf, np.ndarray):
        return leaf
    return np.asarray(leaf) if leaf.sharding.memory_kind == "pinned_host" else np.array(leaf)


def _shaped(leaf: jax.Array) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _restore(like: Any) -> Any:
    return _Restore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
