"""evaluate --task=heldout: the loss of a finished run on the examples that it held out, before it and after."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments.support.model_flags import ModelFlags

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()


def heldout_flag() -> flags.FlagHolder:
    """Defines the flag for the calling command."""
    return flags.DEFINE_string("workdir", None, "folder of a finished run, for --task=heldout")


def measure(workdir: flags.FlagHolder, model: ModelFlags) -> dict[str, Any]:
    """The result, as it is written. --model says where the run's base is now; all else is the run's own."""
    from qlora_jax.errors import InputError
    from qlora_jax.io.merge import read_run

    if not workdir.value:
        raise InputError("--task=heldout takes --workdir=RUN, the folder of a finished run")
    for flag in (model.adapter, model.quant, model.block_size, model.compute_dtype):
        if flag.value is not None:
            raise InputError(
                f"--{flag.name} does not go with --task=heldout: the run of --workdir says what its own is"
            )
    folder = Path(workdir.value).expanduser()
    run = read_run(folder)
    config = _config(folder)
    config.model.path, config.model.revision = model.model.value, model.revision.value
    begun = time.perf_counter()
    before, examples = _loss(config, _note)
    if before is None:
        raise InputError(f"{folder} held out no examples (data.eval_examples, data.eval_path); try --task=mmlu")
    config.lora.init_from = str(run.adapter)
    after, _ = _loss(config, lambda line: None)
    return {
        "task": "heldout",
        "quant": str(run.quant),
        "examples": examples,
        "nll_per_token_before": before,
        "nll_per_token": after,
        "seconds": round(time.perf_counter() - begun, 3),
        "model": model.model.value,
        "adapter": str(run.adapter),
        "workdir": str(folder),
    }


def _config(folder: Path) -> Any:
    """The run's, with today's values of keys that an older version did not have."""
    from configs import base
    from qlora_jax.models.config import read_json
    from qlora_jax.settings import flatten

    config = base.get_config()
    known = flatten(config)
    for key, value in flatten(read_json(folder / "config.json")).items():
        if key in known:
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    config.eval.mmlu_data = ""
    config.mesh.update(base.get_config().mesh)  # one device does, whatever the run had
    return config


def _loss(config: Any, say: Callable[[str], None]) -> tuple[float | None, int]:
    """Mean loss over the held-out examples, nats a target token, and how many there are. Holds one model at a time."""
    from qlora_jax.progress import Progress
    from qlora_jax.train.memory import Program
    from qlora_jax.train.setup import prepare
    from qlora_jax.train.step import evaluation_of, mean_loss

    with Progress("loading", unit="tensor") as loading:
        prepared = prepare(config, say, loading.to)
    evaluation = Program(evaluation_of(prepared.graph, config.train.loss_chunk))
    batches = prepared.data.eval_batches(prepared.data.heldout, config.eval.batch_size)
    return mean_loss(evaluation, prepared.adapter, prepared.base, batches), len(prepared.data.heldout)


def table(result: dict[str, Any]) -> str:
    return (
        f"{result['examples']:,} held-out examples, nats a target token\n"
        f"{'before the first step':24}{result['nll_per_token_before']:8.4f}\n"
        f"{'with the adapter':24}{result['nll_per_token']:8.4f}"
    )


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
