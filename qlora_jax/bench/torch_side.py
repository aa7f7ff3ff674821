"""Runs torch_script.py or torch_generate.py, in a process of its own, on the sizes of a run."""

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_jax.models.config import ModelConfig
    from qlora_jax.train.spec import RunSpec

SCRIPT = Path(__file__).with_name("torch_script.py")
GENERATE = Path(__file__).with_name("torch_generate.py")
LETTERS = ("D", "F", "L", "N", "K", "H", "V", "context", "norm_eps", "rope_theta", "tied")


def specification(config: Any, spec: "RunSpec", steps: int, warmup: int, gpu_bytes: int | None) -> dict[str, Any]:
    """What the script reads. Raises InputError where these libraries have nothing like what the config asks for."""
    from qlora_jax.errors import InputError
    from qlora_jax.lora import select_targets
    from qlora_jax.models.kind import LLAMA

    sizes, lora, quant = spec.model.sizes, spec.model.lora, spec.model.quant
    for key, found, takes in (
        ("quant.format", quant.format, ("nf4", "fp4")),
        ("optimizer.name", config.optimizer.name, ("adamw",)),
    ):
        if found not in takes:
            raise InputError(
                f"--torch measures {key} {' and '.join(takes)}, found {found!r}: change it, or drop --torch"
            )
    if sizes.kind != LLAMA:
        raise InputError("--torch measures Llamas without biases, and this model is another: drop --torch")
    o = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
    return {
        "sizes": {letter: getattr(sizes, letter) for letter in LETTERS},
        "quant": {"format": quant.format, "block_size": quant.block_size, "double_quant": quant.double_quant},
        "lora": {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "use_rslora": lora.use_rslora,
            "targets": [name.split(".")[-1] for name in select_targets(lora.targets, sizes)],
        },
        "batch": {"G": spec.batch.G, "B": spec.batch.B, "T": spec.batch.T},
        "optimizer": {key: config.optimizer[key] for key in o},
        "steps": steps,
        "warmup": warmup,
        "seed": config.train.seed,
        "gpu_bytes": gpu_bytes,
    }


def generation(sizes: "ModelConfig", rows: list[int], rank: int, is_quantized: bool, repeats: int) -> dict[str, Any]:
    """What torch_generate.py reads. Raises InputError where the model is no plain Llama."""
    from qlora_jax.bench.generate import PROMPT, TOKENS
    from qlora_jax.errors import InputError
    from qlora_jax.models.kind import LLAMA

    if sizes.kind != LLAMA or sizes.rope_scaling:
        raise InputError("--torch_python measures Llamas without biases and scaled ropes, and this model is another")
    targets = [name.split(".")[-1] for name in sizes.linears]
    lora = {"rank": rank, "alpha": rank, "dropout": 0.0, "use_rslora": False, "targets": targets}
    return {
        "sizes": {letter: getattr(sizes, letter) for letter in LETTERS},
        "quant": {"format": "nf4", "block_size": 64, "double_quant": True} if is_quantized else None,
        "lora": lora if rank else None,
        "batch": {"T": PROMPT + TOKENS[1]},
        "rows": rows,
        "prompt": PROMPT,
        "tokens": list(TOKENS),
        "repeats": repeats,
        "seed": 0,
    }


def run(python: str, specification: dict[str, Any], script: Path = SCRIPT) -> dict[str, Any]:
    """What the script measured, or {"error": one line} where it could not."""
    try:
        done = subprocess.run(
            [python, str(script)], input=json.dumps(specification), capture_output=True, text=True, check=False
        )
    except OSError as error:
        return {"error": f"{python} cannot be run: {error.strerror}"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode} without a word"]
    return {"error": said[-1]}
