"""The sizes of a decoder, read from a Hugging Face config.json (old and transformers-5 spelling)."""

import dataclasses
import json
import math
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
    file = raw.get("transformers_weights")
    if file not in (None, "model.safetensors", "model.safetensors.index.json"):
        raise InputError(f"{where}: transformers_weights is {file!r}; expected model.safetensors, or no such key")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act is {raw['hidden_act']!r}; the Llama family uses 'silu'")
    theta, scaling = _rope(raw, where)
    _check_positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), where)
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
    """(theta, scaling items) from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    Where there are both, transformers takes `rope_scaling` alone. That they differ is nobody's wish: it is an error.
    """
    found = {key: _read_rope(raw, key, where) for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        said = " and ".join(f"{key} {json.dumps(raw[key])}" for key in found)
        raise InputError(
            f"{where} has {said}, which differ: keep the one that is meant (transformers takes rope_scaling, with "
            f"theta {found['rope_scaling'][0]:g}, and forgets rope_parameters)"
        )
    return next(iter(found.values()), None) or _read_rope(raw, "rope_parameters", where)


def _read_rope(raw: dict, where_in: str, where: str) -> tuple[float, tuple[tuple[str, Any], ...]]:
    """(theta, scaling items) of one of the two keys, or of none."""
    parameters = dict(raw.get(where_in) or {})
    theta = parameters.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if (share := parameters.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (None, 1):
        raise InputError(f"{where}: partial_rotary_factor is {share!r}; Llama models turn all of a head")
    _check_positive("rope_theta", theta, where)
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
    for key in needed[kind]:
        _check_positive(key, parameters[key], where)
    return float(theta), (("rope_type", kind), *((key, parameters[key]) for key in needed[kind]))


def _check_positive(key: str, value: Any, where: str) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive number")
