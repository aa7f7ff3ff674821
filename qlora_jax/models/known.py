"""Sizes of models that can be planned for without their files: hub name -> what its config.json says.

Only what decides shapes; vocabulary entries that a finetune would add are not in it. Source: each model's config.json.
"""

from typing import Any

from qlora_jax.models.config import ModelConfig, parse_config


def _llama1(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _llama3(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return _llama1(width, feed_forward, layers, heads) | {
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


KNOWN = {
    "huggyllama/llama-7b": _llama1(4096, 11008, 32, 32),
    "huggyllama/llama-13b": _llama1(5120, 13824, 40, 40),
    "huggyllama/llama-30b": _llama1(6656, 17920, 60, 52),  # called 33B in the paper, after its parameters
    "huggyllama/llama-65b": _llama1(8192, 22016, 80, 64),
    "TinyLlama/TinyLlama_v1.1": _llama1(2048, 5632, 22, 32) | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 14336, 32, 32),
    "meta-llama/Meta-Llama-3-70B": _llama3(8192, 28672, 80, 64),
}


def known_config(name: str) -> ModelConfig | None:
    """The sizes of a hub name, or None where they are not known here."""
    return parse_config(KNOWN[name], name) if name in KNOWN else None
