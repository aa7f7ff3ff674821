"""Finetuning a loaded model: the loop of the `train` command, on the base that is in memory."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qlora_jax.api import folders
from qlora_jax.api.model import LOADED, Model
from qlora_jax.api.names import set_keys
from qlora_jax.api.plot import loss_figure
from qlora_jax.api.recipe import fill
from qlora_jax.api.rows import data_path
from qlora_jax.errors import InputError
from qlora_jax.io.peft_config import read_config
from qlora_jax.models.config import read_json
from qlora_jax.settings import flatten, resolved
from qlora_jax.train import loop
from qlora_jax.train.memory import out_of_memory_said


class FinetuneRun:
    """What a finetuning made.

    Attributes:
      workdir: its folder, with config.json, metrics.jsonl, checkpoints/, adapter/ and summary.json.
      summary: as summary.json. config: as config.json. metrics: the lines of metrics.jsonl.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.summary: dict[str, Any] = read_json(workdir / "summary.json")
        self.config: dict[str, Any] = read_json(workdir / "config.json")
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.metrics: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def adapter(self) -> Path:
        """The PEFT folder."""
        return self.workdir / "adapter"

    @property
    def losses(self) -> list[float]:
        """Of training, nats a target token, by logged steps."""
        return [row["loss"] for row in self.metrics if "loss" in row]

    @property
    def curve(self) -> list[dict[str, Any]]:
        """`metrics`, and the held-out loss after the last step where there is one."""
        last = self.summary.get("final_eval_loss")
        return self.metrics + ([] if last is None else [{"step": self.summary["steps"], "eval_loss": last}])

    def plot(self) -> Figure:
        """The loss by step. In a notebook it shows itself; elsewhere run.plot().savefig("loss.png")."""
        return loss_figure({"": self.curve})

    def __repr__(self) -> str:
        s, losses = self.summary, self.losses
        parts = [f"{s['steps']:,} steps"]
        parts += [f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"] if losses else []
        parts += [f"held out {s['final_eval_loss']:.4f}"] if s.get("final_eval_loss") is not None else []
        parts += [f"{s['tokens_per_second']:,.0f} tokens/s"] if s.get("tokens_per_second") else []
        parts += [f"{s['trainable_params']:,} parameters trained beside {s['base_bytes'] / 2**20:,.1f} MiB"]
        return f"FinetuneRun({', '.join(parts)}; {str(self.workdir)!r})"


def finetune(
    model: Model,
    data: Any,
    workdir: str | Path | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> FinetuneRun:
    """Trains an adapter for a loaded model, and lets the model answer with it.

    It begins from the base as it was loaded, or from the adapter that `load` was given; not from an earlier finetuning
    (lora.init_from does that). Called again with the same model, data and settings it goes on where it stopped, or
    finds its run finished.

    Args:
      model: of `load`; its base is not loaded again.
      data: rows (dicts; a list, a data set of the `datasets` library), a path, the name of a data set, or a list of
        paths. The format is found from the rows (`format=` says it).
      workdir: the run's folder. By default runs/MODEL-DATA, or with the next number where that holds another run.
      say: takes lines for the user.
      settings: keys of a config (qlora_jax/base.py), by short names (steps=100, learning_rate=1e-4, rank=16,
        batch_size=4) or whole ones (**{"train.steps": 100}).
    Raises:
      InputError: an unknown setting (with the nearest known), or whatever a run refuses.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's lines on its own doings
    base = model.base
    config = model.config.copy_and_resolve_references()
    given = set_keys(config, settings)
    if wrong := sorted(given & {"data.path", "data.batches"} if data is not None else ()):
        raise InputError(f"{wrong[0]} and data are both given; leave one out")
    _check_loaded(model, config)
    root = folders.RUNS if workdir is None else Path(workdir).expanduser().parent
    if data is not None:
        config.data.path = data_path(data, root)
    _start(model, config, given)
    fill(config, given | set(LOADED), say)
    plain = resolved(config)
    path = folders.choose_workdir(config, plain) if workdir is None else Path(workdir).expanduser()
    say(f"run: {path}")
    with out_of_memory_said():
        loop.finetune(config, plain, path, say, base)
    run = FinetuneRun(path)
    model.answer_with(run.adapter)
    return run


def _check_loaded(model: Model, config: Any) -> None:
    """Raises InputError for a setting that would need another base than the one in memory."""
    loaded, asked = flatten(model.config), flatten(config)
    if other := [key for key in LOADED if loaded[key] != asked[key]]:
        key = other[0]
        raise InputError(f"{key} is {loaded[key]!r} in the loaded model, not {asked[key]!r}: give it to qj.load")


def _start(model: Model, config: Any, given: set[str]) -> None:
    """Goes on from the adapter that the model was loaded with: its rank, scale and targets are the run's."""
    if model.loaded_adapter is None or "lora.init_from" in given:
        return
    there = read_config(model.loaded_adapter)
    config.lora.init_from = str(model.loaded_adapter)
    for key, value in (("rank", there.rank), ("alpha", float(there.alpha)), ("use_rslora", there.use_rslora)):
        if f"lora.{key}" not in given:
            config.lora[key] = value
    if "lora.targets" not in given:
        config.lora.targets = (there.targets,) if isinstance(there.targets, str) else tuple(there.targets)
