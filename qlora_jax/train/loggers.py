"""Where a run's metrics also go (train.loggers): TensorBoard, Weights & Biases, MLflow.

    tensorboard  event files in workdir/tensorboard, by tensorboardX
    wandb        a run of project $WANDB_PROJECT, or qlora_jax; its own files in workdir/wandb
    mlflow       a run of experiment $MLFLOW_EXPERIMENT_NAME, or qlora_jax, on $MLFLOW_TRACKING_URI

Each gets the rows of metrics.jsonl, the config as hyperparameters, and the summary. A resumed run goes on in the same
run there, by the ids in workdir/loggers.json, without a step twice: TensorBoard is told to forget later steps, MLflow
is asked which steps it has, W&B takes steps only in order and ignores those it has. Keys and tokens are their
libraries' matter and are neither read nor written here. One that fails under way is said once and left alone: the run,
and metrics.jsonl, go on.
"""

import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_jax.errors import InputError
from qlora_jax.files import write_json
from qlora_jax.models.config import read_json
from qlora_jax.settings import flatten

NAMES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # train.loggers -> package, extra = name
_PROJECT = "qlora_jax"
_IDS = "loggers.json"
_MOST_PARAMETERS = 100  # that MLflow takes at a time


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None:
        """`values` after `step` optimizer steps; in order of steps."""

    def finish(self, summary: dict[str, float]) -> None: ...

    def close(self, done: bool) -> None:
        """`done`: the run came to its end."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises InputError for a name that is unknown or twice, and for one whose package is not installed."""
    for name in names:
        if name not in NAMES:
            raise InputError(f"train.loggers has {name!r}; known: {', '.join(NAMES)}")
        if list(names).count(name) > 1:
            raise InputError(f"train.loggers has {name!r} twice")
        try:
            importlib.import_module(NAMES[name])
        except ImportError as error:
            raise InputError(
                f"train.loggers has {name!r}, which needs the package {NAMES[name]}: pip install 'qlora_jax[{name}]'"
            ) from error


def refuse_loggers(names: Sequence[str]) -> None:
    """Raises InputError where a pack's config names any."""
    if names:
        raise InputError(
            f"train.loggers = {', '.join(names)} is for single runs: a sweep's metrics are in its ledger, which report "
            "shows"
        )


class Loggers:
    """All of a run's loggers; none of them is the usual case.

    Args:
      names: train.loggers, checked.
      plain: the config (settings.resolved).
      start: optimizer steps done; rows of later steps come (again).
      say: takes lines for the user.
    Raises:
      InputError: one of them cannot be begun; or another's ids in loggers.json that it does not know any more.
    """

    def __init__(self, names: Sequence[str], workdir: Path, plain: dict, start: int, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Logger] = {}
        for name in names:
            try:
                self._open[name] = _MAKE[name](workdir, plain, start)
            except InputError:
                self.close(done=False)
                raise
            except Exception as error:
                self.close(done=False)
                raise InputError(f"train.loggers: {name} cannot be begun: {_line(error)}") from error

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        values = _numbers(row)
        step = int(values.pop("step"))
        self._each(lambda logger: logger.log(step, values))

    def finish(self, summary: dict[str, Any]) -> None:
        self._each(lambda logger: logger.finish(_numbers(summary)))

    def close(self, done: bool) -> None:
        self._each(lambda logger: logger.close(done))
        self._open.clear()

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                call(logger)
            except Exception as error:
                del self._open[name]
                self._say(f"{name} failed and gets nothing more: {_line(error)}; metrics.jsonl has everything")


class _TensorBoard:
    """Written and flushed row by row: what metrics.jsonl has, the event file has too, however the run ends."""

    def __init__(self, workdir: Path, plain: dict, start: int):
        from tensorboardX import event_file_writer, proto, summary

        self._proto, self._summary, self._plain = proto, summary, plain
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # files are read in the order of their names, which begin with the second
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # what has this step or a later one is forgotten; the summary stands behind the last step
        session = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        first = start + 1 if start else 0
        self._write(proto.event_pb2.Event(step=first, session_log=session))
        self._last = plain["train"]["steps"]
        if not start:
            text = "".join(f"    {key} = {json.dumps(value)}\n" for key, value in flatten(plain).items())
            self._add(summary.text("config", text), 0)

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def _add(self, summary: Any, step: int) -> None:
        self._write(self._proto.event_pb2.Event(summary=summary, step=step))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(self._summary.scalar(name, value), step)

    def finish(self, summary: dict[str, float]) -> None:
        named = {f"summary/{name}": value for name, value in summary.items()}
        parameters = {key: _parameter(value) for key, value in flatten(self._plain).items()}
        for part in self._summary.hparams(parameters, named):
            self._add(part, self._last + 1)
        self.log(self._last + 1, named)

    def close(self, done: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, workdir: Path, plain: dict, start: int):
        import wandb

        known = _ids(workdir).get("wandb")
        identity = known or secrets.token_hex(8)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=identity,
            resume="allow",
            name=workdir.resolve().name,
            dir=str(workdir),
            config=plain,
        )
        _remember(workdir, "wandb", identity)
        self._first = int(self._run.step or 0) if known else 0  # it has the steps before

    def log(self, step: int, values: dict[str, float]) -> None:
        if step >= self._first:
            self._run.log(values, step=step)

    def finish(self, summary: dict[str, float]) -> None:
        self._run.summary.update(summary)

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _MLflow:
    def __init__(self, workdir: Path, plain: dict, start: int):
        from mlflow import entities, tracking

        self._client = tracking.MlflowClient()
        identity = _ids(workdir).get("mlflow")
        self._logged: dict[str, set[int]] = {}  # steps by metric, of an earlier process
        self._is_resumed = identity is not None
        self._last = plain["train"]["steps"]
        if identity is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            identity = self._client.create_run(number, run_name=workdir.resolve().name).info.run_id
            _remember(workdir, "mlflow", identity)
            parameters = [entities.Param(key, str(_parameter(value))) for key, value in flatten(plain).items()]
            for first in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(identity, params=parameters[first : first + _MOST_PARAMETERS])
        else:
            try:
                self._client.update_run(identity, status="RUNNING")
            except Exception as error:
                raise InputError(
                    f"MLflow has no run {identity} ({_line(error)}), in which this run began: set MLFLOW_TRACKING_URI "
                    f"as it was, or delete {workdir / _IDS} to begin a new one"
                ) from error
        self._id = identity

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if self._is_resumed and name not in self._logged:
                self._logged[name] = {metric.step for metric in self._client.get_metric_history(self._id, name)}
            if step not in self._logged.get(name, ()):
                self._client.log_metric(self._id, name, value, step=step)

    def finish(self, summary: dict[str, float]) -> None:
        self.log(self._last, {f"summary/{name}": value for name, value in summary.items()})

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


_MAKE: dict[str, Callable[[Path, dict, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def _ids(workdir: Path) -> dict[str, str]:
    path = workdir / _IDS
    return read_json(path) if path.exists() else {}


def _remember(workdir: Path, name: str, identity: str) -> None:
    write_json(workdir / _IDS, _ids(workdir) | {name: identity})


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _parameter(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _line(error: Exception) -> str:
    """The error in a line, without the password that an address may have in it."""
    return re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {' '.join(str(error).split())}")[:500]
