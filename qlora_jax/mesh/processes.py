"""Several processes that train one model together: each has some of the devices, all do the same steps.

The first one holds the run's folder. What it decides or reads from there it tells the others; arrays that are divided
among processes are put together where one has to be written.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.mesh import failures

HEARTBEAT = 20  # seconds without a sign of a process after which the others end
_PATIENCE = 24 * 3600  # seconds that a process may take for what the others have done
_MEETINGS = itertools.count()


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the processes of a run; before anything is computed.

    Args:
      coordinator: HOST:PORT of the first process. None: SLURM, Open MPI or another launcher that JAX knows says all.
      processes: in all. process: which of them this is, from 0.
    Raises:
      InputError: no launcher that is known started this process, or the others did not come.
    """
    if coordinator is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", coordinator):
        raise InputError(f"--coordinator is {coordinator!r}; expected HOST:PORT of the first process")
    if processes is not None and not 0 <= (process or 0) < processes:
        raise InputError(f"--process is {process} of --processes = {processes}; they are counted from 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # a run stops by SIGTERM in its own way
    try:
        jax.distributed.initialize(
            coordinator, processes, process, local_device_ids=_devices(coordinator is None),
            initialization_timeout=120, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        how = f"the processes of this run did not meet at {coordinator}" if coordinator else (
            "nothing says which processes train together: start them by srun or mpirun, or give --coordinator, "
            "--processes and --process to each"
        )  # fmt: skip
        raise InputError(f"{how} ({_first_line(error)})") from error
    failures.watch()


def _devices(by_launcher: bool) -> list[int] | None:
    """For JAX: [] is all devices of this machine, None what it makes of a launcher: the one of this process's number
    there. Where a launcher starts one process a machine, that one has all of them."""
    tasks, nodes = (os.environ.get(f"SLURM_{name}", "") for name in ("NTASKS", "STEP_NUM_NODES"))
    is_alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (tasks and tasks == nodes)
    return [] if by_launcher and is_alone else None


def are_several() -> bool:
    """Whether other processes train with this one."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that holds the run's folder."""
    return not are_several() or jax.process_index() == 0


@contextlib.contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """`path` for the first process; for the others a folder that goes when they end."""
    if is_first():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="qlora_jax_") as folder, failures.before_end(_gone(folder)):
        yield Path(folder) / "run"


def _gone(folder: str) -> Callable[[], None]:
    return partial(shutil.rmtree, folder, ignore_errors=True)


def seen_by_all(folder: Path) -> Path | None:
    """The first process's `folder`, where it is on a disk that all processes see; else None."""
    if not are_several():
        return folder
    sign = ".seen_by_all"
    if is_first():
        (folder / sign).write_text(token := secrets.token_hex(16))
    first, token = told([str(folder.absolute()), token] if is_first() else None)
    try:
        is_seen = (Path(first) / sign).read_text() == token
    except OSError:
        is_seen = False
    are_seeing = bool(_gathered(np.asarray(is_seen, np.int32)).all())
    if is_first():
        (folder / sign).unlink()
    return Path(first) if are_seeing else None


def told(value: Any = None) -> Any:
    """What the first process says, which has a JSON form; others' values are not looked at."""
    if not are_several():
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(_broadcast(np.asarray(len(text), np.int32)))
    return json.loads(_broadcast(np.frombuffer(text.ljust(size), np.uint8)[:size]).tobytes())


def merged(mine: dict[str, Any]) -> dict[str, Any]:
    """The entries that all processes have together; values have a JSON form, and are the same where keys are."""
    if not are_several():
        return mine
    text = json.dumps(mine).encode()
    wait("merge")
    size = int(_gathered(np.asarray(len(text), np.int32)).max())
    rows = _gathered(np.frombuffer(text.ljust(size), np.uint8))
    return {key: value for row in rows for key, value in json.loads(row.tobytes()).items()}


def told_arrays(arrays: list[np.ndarray] | None, like: list[Any]) -> list[np.ndarray]:
    """The first process's arrays, whose shapes and dtypes all know."""
    if not are_several():
        assert arrays is not None
        return arrays
    given = [np.zeros(x.shape, x.dtype) for x in like] if arrays is None else arrays
    return [_broadcast(np.asarray(x)) for x in given]


def same(what: str, value: str) -> None:
    """Raises InputError where `value`, of `what`, is not the first process's."""
    if are_several() and told(value) != value:
        raise InputError(f"process {jax.process_index()} reads another {what} than process 0: give all the same files")


def everywhere(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, where the run has them: each device gets its part."""
    if not are_several():
        return jax.device_put(tree, shardings)

    def placed(x: Any, sharding: Any) -> Any:
        if getattr(x, "is_fully_addressable", True) is False:
            return jax.device_put(x, sharding)  # it was read onto the devices
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(placed(jax.random.key_data(x), sharding))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(placed, tree, shardings)


def own(tree: Any) -> Any:
    """Arrays that every process has whole, as programs of all devices take them."""
    return jax.tree.map(np.asarray, tree) if are_several() else tree


def on_host(leaf: Any) -> np.ndarray:
    """A whole array, of its parts on all devices; every process asks for it at once."""
    if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
        return np.asarray(leaf)
    wait("gather")
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def on_first(leaf: Any) -> np.ndarray | None:
    """As on_host, for the first process alone."""
    whole = on_host(leaf)
    return whole if is_first() else None


def stop_is_due(asked: bool) -> bool:
    """Whether all shall stop after this step, since one of them was asked to."""
    if not are_several():
        return asked
    return bool(_gathered(np.asarray(asked, np.int32)).any())


def wait(name: str) -> None:
    """Until all processes are here, however long one of them compiles or reads: devices that wait for each other give
    up after half a minute."""
    if are_several():
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(f"{name} {next(_MEETINGS)}", timeout=_PATIENCE, processes=_everyone())


def _everyone() -> set[int]:
    return set(range(jax.process_count()))


@contextlib.contextmanager
def lost_said(settle: Callable[[], None]) -> Iterator[None]:
    """Says in one line that another process is gone, where a step fails for that, and ends this one after `settle`: an
    orderly end would wait for the other."""
    with failures.before_end(settle):
        try:
            yield
        except Exception as error:
            if not are_several() or not failures.is_of_others(error):
                raise
            failures.end_lost(error)


def quiet(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` of the first process; the others say nothing."""
    return say if is_first() else lambda line: None


def _broadcast(x: np.ndarray) -> np.ndarray:
    wait("broadcast")
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(x))


def _gathered(x: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
