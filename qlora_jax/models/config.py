"""The sizes of a decoder, read from a Hugging Face config.json (old and transformers-5 spelling)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError

ARCHITECTURES = {"LlamaForCausalLM": "llama"}  # what config.json calls it -> file in this folder


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    D: int  # model width
    F: int  # feed-forward width
    L: int  # layers
    N: int  # query heads
    K: int  # key/value heads; N / K queries share one
    H: int  # head width
    V: int  # vocabulary
    context: int  # tokens the model was made for
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...]  # () or the items of transformers' rope parameters
    tied: bool  # the head is the embedding
    eos_ids: tuple[int, ...]
    bos_id: int | None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming the file when it is missing, or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; expected a Hugging Face checkpoint folder with config.json") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_config(raw: dict, where: str) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: the architecture is unknown (known ones are listed), a size is missing or nonsense, or the model asks
        for what is not implemented (biases, other rope types, other activations) and would be computed wrongly.
    """
    names = raw.get("architectures") or [f"(none; model_type {raw.get('model_type')!r})"]
    if names[0] not in ARCHITECTURES:
        raise InputError(f"{where}: unknown architecture {names[0]}; known: {', '.join(ARCHITECTURES)}")
    sizes = {}
    keys = {
        "D": "hidden_size",
        "F": "intermediate_size",
        "L": "num_hidden_layers",
        "N": "num_attention_heads",
        "V": "vocab_size",
    }
    for letter, key in keys.items():
        value = raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {key} is {value!r}; expected a positive integer")
        sizes[letter] = value
    K = raw.get("num_key_value_heads") or sizes["N"]
    if sizes["N"] % K:
        raise InputError(f"{where}: {sizes['N']} attention heads cannot share {K} key/value heads evenly")
    H = raw.get("head_dim") or sizes["D"] // sizes["N"]
    if H % 2:
        raise InputError(f"{where}: head width {H} is odd; rotary embedding turns pairs")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise InputError(f"{where}: {key} is true; Llama models with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act is {raw['hidden_act']!r}; the Llama family uses 'silu'")
    theta, scaling = _rope(raw, where)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        **sizes,
        K=K,
        H=H,
        context=raw.get("max_position_embeddings", 2048),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_id=raw.get("bos_token_id"),
    )


def _rope(raw: dict, where: str) -> tuple[float, tuple[tuple[str, Any], ...]]:
    """(theta, scaling items) from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if kind == "default":
        return float(theta), ()
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise InputError(
            f"{where}: rope scaling of type {kind!r} is not supported; known: default, {', '.join(needed)}"
        )
    missing = [key for key in needed[kind] if key not in parameters]
    if missing:
        raise InputError(f"{where}: rope scaling {kind!r} lacks {', '.join(missing)}")
    return float(theta), (("rope_type", kind), *((key, parameters[key]) for key in needed[kind]))
