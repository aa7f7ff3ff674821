"""The driver of a sweep: gives packs to workers one by one, writes the ledger, and answers for what fails.

    lost     the worker's node is gone: the pack runs again, elsewhere
    memory   RESOURCE_EXHAUSTED, MemoryError, or a worker that was killed: the pack is split in two
    error    anything else: once more, on another node where there is one; then split in two

until a point that fails alone is failed, with its error. Every attempt and its error stay in the ledger.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from qlora_jax.sweep.ledger import Ledger, Outcome, Row
from qlora_jax.sweep.packs import Pack

Kind = Literal["lost", "memory", "error", "input"]
RETRIES = 1  # of a pack, and of a point alone, after an error
LOST_LIMIT = 5  # nodes that a pack may lose
# of a run's rows: what the config says already, or what is measured of the machine
_LEFT_OUT = frozenset({"step", "learning_rate", "tokens", "target_tokens", "seconds", "tokens_per_second"})


class Trained(NamedTuple):
    """What became of one member of a pack: `error` where it failed by itself (a loss that is not finite)."""

    result: dict[str, Any] | None
    error: str | None = None


# configs of a pack, its folder, on_row(member, row of metrics.jsonl) -> one Trained a config
OnRow = Callable[[int, dict[str, Any]], None]
RunPack = Callable[[list[dict[str, Any]], Path, OnRow], list[Trained]]
# makes a RunPack in a worker, once: what it holds (bases, data, compiled programs) stays warm between packs
MakeRunner = Callable[[], RunPack]


@dataclasses.dataclass
class Worker:
    """One device, and who works on it."""

    name: str
    node: str
    last_key: str = ""  # of the pack it ran last: its base and programs are warm


Rows = Sequence[tuple[int, dict[str, Any]]]  # (member, row)


class Progress(NamedTuple):
    worker: Worker
    rows: Rows


class Finished(NamedTuple):
    worker: Worker
    trained: list[Trained]
    rows: Rows  # all of the run


class Failed(NamedTuple):
    worker: Worker
    kind: Kind
    error: str
    rows: Rows = ()  # all of the run, where they are known


Event = Progress | Finished | Failed


class Executor(Protocol):
    """Workers, wherever they are."""

    def idle(self, wanted: int) -> list[Worker]:
        """Workers that wait for a pack; may start up to `wanted` new ones."""

    def nodes(self) -> set[str]:
        """Nodes that have workers."""

    def start(self, worker: Worker, pack: Pack, folder: Path) -> None: ...

    def wait(self, seconds: float, emit: Callable[[Event], None]) -> None:
        """Emits what happens within about `seconds`."""

    def close(self) -> None: ...


@dataclasses.dataclass
class Task:
    """A pack to run, and what it went through."""

    pack: Pack
    errors: int = 0
    lost: int = 0
    avoid: frozenset[str] = frozenset()  # nodes on which it failed


@dataclasses.dataclass
class Running:
    task: Task
    started: float
    steps: dict[int, int] = dataclasses.field(default_factory=dict)  # member -> its last step
    heard: float = 0.0  # when its worker last answered
    tokens_per_second: float = 0.0

    @property
    def step(self) -> int:
        return max(self.steps.values(), default=0)


@dataclasses.dataclass
class State:
    """Of a sweep, for those who look at it."""

    total: int  # points that this call is to run
    waiting: list[Task]
    running: dict[str, Running] = dataclasses.field(default_factory=dict)  # by worker
    done: int = 0
    failed: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)  # the attempts that came to nothing, a line each
    begun: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def models_per_minute(self) -> float:
        seconds = time.monotonic() - self.begun
        return 60 * self.done / seconds if seconds > 0 else 0.0


class Stopped(BaseException):
    """The driver was asked to end; no Exception, so that no runner takes it for a mistake of its own."""


def run_packs(
    packs: Sequence[Pack],
    ledger: Ledger,
    executor: Executor,
    folder: Path,
    show: Callable[[State], None] = lambda state: None,
    stopping: Callable[[], bool] = lambda: False,
) -> State:
    """Runs `packs` to their ends; what came out is in the ledger as soon as a pack ends.

    Args:
      folder: every pack gets one in it, by its name; workers of other machines must see it where it is to outlive them.
      show: is called about twice a second.
      stopping: whether to end now; then, as after any exception, running points are pending again.
    Raises:
      Stopped: `stopping` said so.
    """
    return _Driver(packs, ledger, executor, folder, show, stopping).run()


class _Driver:
    def __init__(self, packs, ledger, executor, folder, show, stopping) -> None:
        self.ledger: Ledger = ledger
        self.executor: Executor = executor
        self.folder, self.show, self.stopping = folder, show, stopping
        self.state = State(sum(len(pack.points) for pack in packs), [Task(pack) for pack in packs])
        self.shown = 0.0

    def run(self) -> State:
        state = self.state
        try:
            while state.waiting or state.running:
                self._give()
                self.executor.wait(0.25, self._handle)
                self._tick()
        finally:
            left = [digest for running in state.running.values() for digest in running.task.pack.hashes]
            if left:
                self.ledger.give_up(left, "lost", "the driver ended")
            state.running.clear()
        self.show(state)
        return state

    def _tick(self) -> None:
        if self.stopping():
            raise Stopped
        if time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self.show(self.state)

    def _give(self) -> None:
        for worker in self.executor.idle(len(self.state.waiting)):
            task = self._next_for(worker)
            if task is None:
                continue
            self.state.waiting.remove(task)
            pack = task.pack
            self.ledger.start(pack.name, pack.hashes, worker.node)
            now = time.monotonic()
            self.state.running[worker.name] = Running(task, now, heard=now)
            worker.last_key = pack.key
            self.executor.start(worker, pack, self.folder / pack.name)

    def _next_for(self, worker: Worker) -> Task | None:
        """One whose base and programs this worker has warm; else one that no other worker is at; else the first."""
        nodes = self.executor.nodes()
        allowed = [task for task in self.state.waiting if worker.node not in task.avoid or nodes <= task.avoid]
        taken = {running.task.pack.key for running in self.state.running.values()}
        for fits in (lambda task: task.pack.key == worker.last_key, lambda task: task.pack.key not in taken):
            for task in allowed:
                if fits(task):
                    return task
        return allowed[0] if allowed else None

    def _handle(self, event: Event) -> None:
        running = self.state.running.get(event.worker.name)
        if running is None:  # late news of a pack that is settled
            return
        running.heard = time.monotonic()
        match event:
            case Progress():
                self._progress(running, event.rows)
            case Finished():
                del self.state.running[event.worker.name]
                self._finished(running.task, event)
            case Failed():
                del self.state.running[event.worker.name]
                self._failed(running.task, event)
        self._tick()

    def _progress(self, running: Running, rows: Rows) -> None:
        self.ledger.log(_metrics(running.task.pack, rows))
        for member, row in rows:
            running.steps[member] = max(row.get("step", 0), running.steps.get(member, 0))
            if row.get("tokens_per_second"):
                running.tokens_per_second = row["tokens_per_second"]
            elif row.get("seconds") and row.get("tokens"):
                running.tokens_per_second = row["tokens"] / row["seconds"]

    def _finished(self, task: Task, event: Finished) -> None:
        hashes = task.pack.hashes
        if len(event.trained) != len(hashes):
            found = f"the runner returned {len(event.trained)} results for {len(hashes)} points"
            return self._failed(task, Failed(event.worker, "error", found))
        outcomes = [Outcome(digest, *trained) for digest, trained in zip(hashes, event.trained, strict=True)]
        self.ledger.finish(outcomes, _metrics(task.pack, event.rows))
        errors = [outcome for outcome in outcomes if outcome.error is not None]
        self.state.failed += len(errors)
        self.state.done += len(outcomes) - len(errors)
        self.state.failures += [f"point {outcome.hash[:12]}: {outcome.error}" for outcome in errors]

    def _failed(self, task: Task, event: Failed) -> None:
        pack, node = task.pack, event.worker.node
        line = " ".join(event.error.split())[:500]
        self.state.failures.append(f"pack {pack.name} ({len(pack.points)} points) on {node}: {line}")
        task.avoid |= {node}
        task.lost += event.kind == "lost"
        task.errors += event.kind in ("error", "memory")
        alone = len(pack.points) == 1
        match event.kind:
            case "lost":
                again = task.lost <= LOST_LIMIT
            case "memory":
                again = alone and task.errors <= RETRIES
            case "error":
                again = task.errors <= RETRIES
            case "input":
                again = False
        if again:
            self.ledger.give_up(pack.hashes, event.kind, line)
            self.state.waiting.insert(0, task)
        elif not alone:
            self.ledger.give_up(pack.hashes, event.kind, line)
            self.state.waiting[:0] = [Task(half) for half in pack.halves()]
        else:
            self.ledger.finish([Outcome(digest, None, line) for digest in pack.hashes], _metrics(pack, event.rows))
            self.state.failed += len(pack.points)


def _metrics(pack: Pack, rows: Rows) -> list[Row]:
    hashes = pack.hashes
    return [found for member, row in rows for found in row_metrics(hashes[member], row)]


def row_metrics(digest: str, row: dict[str, Any]) -> list[Row]:
    """A row of metrics.jsonl as the ledger has it: numbers that the config does not say and no clock measured."""
    return [
        Row(digest, row["step"], name, float(value))
        for name, value in row.items()
        if name not in _LEFT_OUT and isinstance(value, int | float)
    ]


def kind_of(error: BaseException) -> Kind:
    """What an exception of a runner means for its pack."""
    from qlora_jax.errors import InputError

    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "memory"
    return "input" if isinstance(error, InputError) else "error"


def describe(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
