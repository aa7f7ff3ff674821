"""Values that no run can have, found before a sweep begins, whatever axis they come from."""

from collections.abc import Iterable
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.lora import LoRAConfig
from qlora_jax.optim.schedules import OPTIMIZERS, SCHEDULES
from qlora_jax.quant.tensor import FORMATS
from qlora_jax.sweep.grid import Point
from qlora_jax.train.checks import check_values
from qlora_jax.train.loggers import refuse_loggers


class _Section(dict):
    """A dict whose keys are attributes too, as a ConfigDict's; made in a microsecond."""

    __getattr__ = dict.__getitem__


def check_points(points: Iterable[Point], backend: str) -> None:
    """Raises InputError that names the first point with a value that no run can have, and its axes.

    `backend`: what the sweep computes on, "gpu" or "cpu".
    """
    for point in points:
        try:
            _check(point.config, backend)
        except InputError as error:
            axes = ", ".join(f"{key} = {value}" for key, value in point.axes.items())
            raise InputError(f"the point with {axes}: {error}" if axes else str(error)) from error


def _check(plain: dict[str, Any], backend: str) -> None:
    check_values(_Section({name: _Section(section) for name, section in plain.items()}), backend)
    model, data, lora, optimizer = plain["model"], plain["data"], plain["lora"], plain["optimizer"]
    if not model["path"]:
        raise InputError("model.path is empty; give a checkpoint folder or a hub name")
    refuse_loggers(plain["train"]["loggers"])
    if not data["path"] and not data["batches"]:
        raise InputError("data.path is empty; give a data file or a hub data set")
    LoRAConfig(lora["rank"], lora["alpha"], lora["dropout"], tuple(lora["targets"]), lora["use_rslora"])
    for name, value, known in (
        ("quant.format", plain["quant"]["format"], (*FORMATS, "none")),
        ("optimizer.name", optimizer["name"], OPTIMIZERS),
        ("optimizer.schedule", optimizer["schedule"], SCHEDULES),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; known: {', '.join(known)}")
