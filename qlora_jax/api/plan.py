"""Will it fit: a plan for a GPU that is not here, by the name of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_jax.api.model import Model
from qlora_jax.api.names import set_keys
from qlora_jax.api.opening import QUANTS
from qlora_jax.api.recipe import fill_for_plan
from qlora_jax.base import get_config
from qlora_jax.config_file import load_config
from qlora_jax.errors import InputError
from qlora_jax.io.write import quant_spec
from qlora_jax.planning.describe import table
from qlora_jax.planning.gpus import planned_gpu
from qlora_jax.planning.here import gpu_here
from qlora_jax.planning.plan import Plan, make_plan
from qlora_jax.train.spec import read_sizes


class PlanReport:
    """A plan's figures: those of `qlora plan --out=FILE.json` as attributes (fits, device_peak_bytes, ...).

    Printed it is the table of the command.
    """

    def __init__(self, plan: Plan, gpu: str):
        self._plan, self._figures = plan, plan.to_json(gpu)

    def __getattr__(self, name: str) -> Any:
        figures = self.__dict__.get("_figures", {})
        if name in figures:
            return figures[name]
        raise AttributeError(f"a plan has no {name!r}; it has {', '.join(figures)}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._figures})

    def to_json(self) -> dict[str, Any]:
        """The same figures as a dict."""
        return dict(self._figures)

    def __repr__(self) -> str:
        return table(self._plan)


def plan(
    model: str | Path | Model,
    gpu: str = "rtx4090",
    data: str | None = None,
    quant: str | None = None,
    advise: bool = True,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> PlanReport:
    """Memory and the least time of a step on a GPU, compiled without it and without weights.

    Args:
      model: a folder, a hub name, a config file (configs/guanaco_65b.py), or a loaded model.
      gpu: a known GPU (a wrong name lists them), or "here".
      data: a local file whose longest row counts. Without it rows have 1,024 tokens (pack_length=...).
      quant: as of `load`; nf4+dq by default.
      advise: where it does not fit, look for the smallest change that does; each try compiles.
      say: takes lines on what is being compiled.
      settings: keys of a config, as of `finetune`.
    Raises:
      InputError: an unknown setting, model or GPU, or no compiler for the GPU.
    """
    planned = gpu_here() if gpu == "here" else planned_gpu(gpu)
    is_file = isinstance(model, str | Path) and str(model).endswith(".py")
    if isinstance(model, Model):
        config = model.config.copy_and_resolve_references()
        config.model.compute_dtype = get_config().model.compute_dtype  # what a GPU would compute in
    elif is_file:
        config = load_config(str(model))
    else:
        config = get_config()
        config.model.path = str(model)
    if quant is not None:
        if quant not in QUANTS:
            raise InputError(f"quant is {quant!r}; expected one of {', '.join(QUANTS)}")
        spec = quant_spec(quant, config.quant.block_size)
        config.quant.update(format=spec.format, double_quant=spec.double_quant)
    given = set_keys(config, settings)
    if data is not None:
        config.data.path = str(data)
    if not is_file:
        fill_for_plan(config, read_sizes(config), given, say)
    return PlanReport(make_plan(config, planned, say, advise), gpu)
