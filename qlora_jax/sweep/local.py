"""Packs one after the other in this process: no Ray, no retries elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.sweep.engine import Event, Failed, Finished, MakeRunner, Progress, Worker, describe, kind_of
from qlora_jax.sweep.packs import Pack


class LocalExecutor:
    """One worker: the caller of `wait`."""

    def __init__(self, make_runner: MakeRunner):
        self._run = make_runner()
        self._worker = Worker("this process", "here")
        self._given: tuple[Pack, Path] | None = None

    def idle(self, wanted: int) -> list[Worker]:
        return [self._worker]

    def nodes(self) -> set[str]:
        return {"here"}

    def start(self, worker: Worker, pack: Pack, folder: Path) -> None:
        self._given = pack, folder

    def wait(self, seconds: float, emit: Callable[[Event], None]) -> None:
        if self._given is None:
            return
        (pack, folder), self._given = self._given, None
        rows: list[tuple[int, dict[str, Any]]] = []

        def on_row(member: int, row: dict[str, Any]) -> None:
            rows.append((member, row))
            emit(Progress(self._worker, [(member, row)]))

        try:
            trained = self._run(pack.configs, folder, on_row)
        except Exception as error:
            emit(Failed(self._worker, kind_of(error), describe(error), rows))
        else:
            emit(Finished(self._worker, trained, rows))

    def close(self) -> None:
        self._given = None
