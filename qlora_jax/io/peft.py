"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, out and in.

Keys are `base_model.model.model.layers.{layer}.{name}.lora_A.weight` [R, I] and `....lora_B.weight` [O, R], float32.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.export import atomic_folder, save_tensors, write_json
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import read_json
from qlora_jax.models.llama import LINEARS, Llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
# What peft may ask for that would change the result and is not computed here: key -> values that mean "no".
_UNSUPPORTED = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layers_to_transform": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}


def write_adapter(out: Path, adapter: Any, config: LoRAConfig, base: str) -> None:
    """Writes the adapter's state as a PEFT folder, whole or not at all.

    Args:
      out: folder; one that stands there is replaced.
      adapter: of `lora.split`.
      config: rank, alpha, dropout, rslora.
      base: path or hub name of the base model, for adapter_config.json.
    """
    write_arrays(out, lora.adapter_arrays(adapter), config, base)


def write_arrays(out: Path, arrays: dict[str, tuple[Any, Any]], config: LoRAConfig, base: str) -> None:
    """As write_adapter, of {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}."""
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in arrays.items():
        for letter, stacked in (("A", np.asarray(a)), ("B", np.asarray(b))):
            tensors |= {_KEY.format(index, name, letter): np.ascontiguousarray(x) for index, x in enumerate(stacked)}
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted(name.split(".")[-1] for name in arrays),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    with atomic_folder(out) as folder:
        save_tensors(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, settings)


def read_config(folder: Path) -> LoRAConfig:
    """The LoRA settings of a PEFT folder; targets are the names the file gives (regular expressions included).

    Raises InputError when there is none, or it asks for what is not supported (DoRA, biases, per-layer ranks, ...).
    """
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be read")
    asked = [f"{key}={raw[key]!r}" for key, no in _UNSUPPORTED.items() if key in raw and raw[key] not in no]
    if asked:
        raise InputError(f"{folder / CONFIG}: {', '.join(asked)} is not supported; plain LoRA adapters can be read")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise InputError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
    targets = raw.get("target_modules") or ()
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout") or 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(raw.get("use_rslora")),
    )


def read_adapter(model: Llama, folder: Path) -> tuple[LoRAConfig, dict[str, tuple[Any, Any]]]:
    """The adapter of a PEFT folder, stacked for this model.

    Returns:
      its config (targets as full names of ours), and {"self_attn.q_proj": (A [L, R, I], B [L, O, R])}, float32.
    Raises:
      InputError: one message that lists every tensor that is missing, unexpected or misshapen.
    """
    config = read_config(folder)
    try:
        handle = safe_open(folder / WEIGHTS, "numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} is missing or damaged: {error}") from error
    tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    L, problems = model.config.L, []
    stacked: dict[str, tuple[Any, Any]] = {}
    for name in LINEARS:
        O, I = lora.shape(model, name)
        expected = {_KEY.format(i, name, "A"): (config.rank, I) for i in range(L)}
        expected |= {_KEY.format(i, name, "B"): (O, config.rank) for i in range(L)}
        if not any(key in tensors for key in expected):
            continue
        for key, shape in expected.items():
            if key not in tensors:
                problems.append(f"missing {key} (layers are stacked: a projection takes adapters in all {L} or none)")
            elif tensors[key].shape != shape:
                problems.append(f"{key} is {list(tensors[key].shape)}, expected {list(shape)}")
        found = {key: tensors.pop(key, None) for key in expected}
        if not problems:
            a, b = (np.stack([found[_KEY.format(i, name, letter)] for i in range(L)]) for letter in "AB")
            stacked[name] = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    problems += [f"unexpected {key}" for key in sorted(tensors)]
    if not problems and not stacked:
        problems = ["no LoRA tensor of this model"]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"{folder / WEIGHTS} does not fit the base model: {shown}")
    return LoRAConfig(config.rank, config.alpha, config.dropout, tuple(stacked), config.use_rslora), stacked


def load_adapter(model: Llama, folder: Path) -> LoRAConfig:
    """Puts the adapter of a PEFT folder on the model in place (no dropout until training asks for it)."""
    config, arrays = read_adapter(model, folder)
    for name, (a, b) in arrays.items():
        lora.set_adapter(model, name, a, b, config.scale)
    return config
