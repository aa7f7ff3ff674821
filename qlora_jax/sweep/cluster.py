"""Packs on Ray: a warm actor on every GPU, or on every CPU where there is no GPU, of this machine or of a cluster."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.sweep.engine import Event, Failed, Finished, MakeRunner, Progress, Worker, describe, kind_of
from qlora_jax.sweep.packs import Pack

_POLL_SECONDS = 1.0  # between two questions to a worker how far it is
_STORE_BYTES = 128 * 2**20  # of Ray's object store: configs and rows pass through it, no arrays
# a worker on a CPU has one of them; read by XLA's thread pool and by numpy's libraries when they start
ONE_THREAD = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning, on machines without GPUs
    # Ray prints the last log lines of whatever dies, whatever log_to_driver says; the ledger has the errors
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}


def connect(address: str | None, workers: int) -> None:
    """Joins the cluster at `address`, or starts Ray on this machine, alone and quiet, with `workers` CPUs.

    Raises InputError where Ray is not installed or the cluster cannot be reached.
    """
    for name, value in _RAY_SETTINGS.items():  # read when ray is imported
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "the sweep runs on Ray, which is not installed: pip install 'qlora_jax[sweep]', or take "
            "--executor=local (one process)"
        ) from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address:
            _refuse_unreachable(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"--ray_address={address}" if address else "Ray on this machine"
        raise InputError(f"{where}: {describe(error)}") from error


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for minutes. Raises OSError where nothing listens at host:port; other forms are left to Ray."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def prepare_worker(cache: str, on_gpu: bool) -> None:
    """Sets what JAX and numpy's libraries read when they start; JAX itself is imported by then, but has not started.

    Args:
      cache: folder of compiled programs; "" is none but JAX_COMPILATION_CACHE_DIR's.
    """
    import jax

    from qlora_jax.train.memory import MEMORY_FRACTION

    if on_gpu:
        if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
            os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    else:
        os.environ.update(ONE_THREAD)
        jax.config.update("jax_platforms", "cpu")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)


class _Trainer:
    """The actor. One thread trains, another answers `news`."""

    def __init__(self, make_runner: MakeRunner, cache: str):
        import ray

        prepare_worker(cache, bool(ray.get_gpu_ids()))
        self._make_runner = make_runner
        self._run: Any = None
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._told = 0
        self._lock = threading.Lock()

    def where(self) -> tuple[str, str]:
        """(node's id, its name for people)."""
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), f"{os.uname().nodename}:{context.get_node_id()[:6]}"

    def train(self, configs: list[dict[str, Any]], folder: str) -> tuple[str, Any, Any]:
        """("done", results, all rows) or (kind, error, all rows): exceptions of a runner may not travel."""
        with self._lock:
            self._rows, self._told = [], 0
        try:
            if self._run is None:
                self._run = self._make_runner()
            trained = self._run(configs, Path(folder), self._on_row)
        except Exception as error:
            return kind_of(error), describe(error), self._rows
        return "done", trained, self._rows

    def _on_row(self, member: int, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows.append((member, row))

    def news(self) -> list[tuple[int, dict[str, Any]]]:
        """The rows since the last call."""
        with self._lock:
            new, self._told = self._rows[self._told :], len(self._rows)
        return new


class _Actor:
    """What the driver knows of one actor."""

    def __init__(self, handle: Any):
        self.handle = handle
        self.placed = handle.where.remote()  # answers once the actor runs somewhere
        self.worker: Worker | None = None
        self.node_id = ""
        self.run: Any = None
        self.poll: Any = None
        self.polled = 0.0


class RayExecutor:
    """Actors on the cluster that `connect` joined; as many as it has devices, nodes that join later included.

    Args:
      make_runner: is sent to the workers, as cloudpickle sends it.
      workers: actors at most; 0 is one a device.
      cache: of prepare_worker.
    """

    def __init__(self, make_runner: MakeRunner, workers: int = 0, cache: str = ""):
        import ray

        self._ray = ray
        self._make_runner, self._workers = make_runner, workers
        self._cache = cache
        self._actors: list[_Actor] = []
        self._born = 0

    def devices(self) -> tuple[str, int]:
        """("GPU" or "CPU", how many the cluster has now)."""
        resources: dict[str, float] = {}
        for node in self._ray.nodes():
            if node["Alive"]:
                for name in ("GPU", "CPU"):
                    resources[name] = resources.get(name, 0) + node["Resources"].get(name, 0)
        kind = "GPU" if resources.get("GPU") else "CPU"
        return kind, int(resources.get(kind, 0))

    def idle(self, wanted: int) -> list[Worker]:
        self._meet()
        kind, count = self.devices()
        limit = min(count, self._workers or count)
        free = [actor for actor in self._actors if actor.run is None]
        for _ in range(min(limit - len(self._actors), wanted - len(free))):
            self._actors.append(self._new(kind))
        return [actor.worker for actor in self._actors if actor.worker is not None and actor.run is None]

    def nodes(self) -> set[str]:
        return {actor.worker.node for actor in self._actors if actor.worker is not None}

    def _new(self, kind: str) -> _Actor:
        remote: Any = self._ray.remote(_Trainer)
        gpus = 1 if kind == "GPU" else 0
        placed = remote.options(num_cpus=1, num_gpus=gpus, max_concurrency=2, max_restarts=0)
        return _Actor(placed.remote(self._make_runner, self._cache))

    def _meet(self) -> None:
        """Actors that have found their place."""
        for actor in [actor for actor in self._actors if actor.worker is None]:
            ready, _ = self._ray.wait([actor.placed], timeout=0)
            if not ready:
                continue
            try:
                actor.node_id, node = self._ray.get(actor.placed)
            except self._ray.exceptions.RayError:
                self._actors.remove(actor)
                continue
            self._born += 1
            actor.worker = Worker(f"worker {self._born}", node)

    def start(self, worker: Worker, pack: Pack, folder: Path) -> None:
        actor = next(actor for actor in self._actors if actor.worker is worker)
        actor.run, actor.polled = actor.handle.train.remote(pack.configs, str(folder)), time.monotonic()

    def wait(self, seconds: float, emit: Callable[[Event], None]) -> None:
        waited = [actor.run for actor in self._actors if actor.run is not None]
        waited += [actor.placed for actor in self._actors if actor.worker is None]
        if not waited:
            time.sleep(min(seconds, 0.1))
            return
        ready, _ = self._ray.wait(waited, timeout=seconds)
        for actor in list(self._actors):
            if actor.worker is None or actor.run is None:
                continue
            if actor.run in ready:
                self._settle(actor, emit)
            else:
                self._ask(actor, emit)

    def _ask(self, actor: _Actor, emit: Callable[[Event], None]) -> None:
        """Rows since the last time; one question at a time."""
        assert actor.worker is not None
        if actor.poll is None:
            if time.monotonic() - actor.polled > _POLL_SECONDS:
                actor.poll, actor.polled = actor.handle.news.remote(), time.monotonic()
            return
        ready, _ = self._ray.wait([actor.poll], timeout=0)
        if ready:
            poll, actor.poll = actor.poll, None
            with contextlib.suppress(self._ray.exceptions.RayError):  # its run says the same
                emit(Progress(actor.worker, self._ray.get(poll)))

    def _settle(self, actor: _Actor, emit: Callable[[Event], None]) -> None:
        worker, run = actor.worker, actor.run
        assert worker is not None
        actor.run = actor.poll = None
        try:
            outcome, what, rows = self._ray.get(run)
        except self._ray.exceptions.RayError as error:  # the actor is no more, or nothing that answers
            self._end(actor)
            emit(Failed(worker, "lost" if self._is_lost(actor.node_id, error) else "memory", _first_line(error)))
            return
        if outcome == "done":
            emit(Finished(worker, what, rows))
            return
        if outcome == "memory":  # what the allocator holds goes with the process
            self._end(actor)
        emit(Failed(worker, outcome, what, rows))

    def _end(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)

    def _is_lost(self, node_id: str, error: Exception) -> bool:
        """Whether the node is gone, or out of reach, rather than a worker on it."""
        gone = (self._ray.exceptions.NodeDiedError, self._ray.exceptions.ActorUnavailableError)
        alive = any(node["NodeID"] == node_id and node["Alive"] for node in self._ray.nodes())
        return isinstance(error, gone) or not alive

    def close(self) -> None:
        for actor in list(self._actors):
            self._end(actor)
        self._ray.shutdown()


def _first_line(error: Exception) -> str:
    """Of Ray's explanations, which go over many lines: "ActorDiedError: The actor died unexpectedly ..."."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
