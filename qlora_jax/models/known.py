"""Sizes of models that can be planned for without their files: hub name -> what its config.json says.

Only what decides shapes; vocabulary entries that a finetune would add are not in it. Source: each model's config.json.
"""

from typing import Any

from qlora_jax.models.config import ModelConfig, parse_config
from qlora_jax.models.t5.known import KNOWN_T5


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


_LLAMA31_405B = _llama3(16384, 53248, 126, 128) | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "eos_token_id": 151645,
    "bos_token_id": 151643,
    "vocab_size": 151936,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32768,
}
_LLAMA32_3B = _llama3(3072, 8192, 28, 24) | {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_PHI4 = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "vocab_size": 100352,
}
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "eos_token_id": 128012,
    "vocab_size": 128256,
}
_GEMMA2_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "vocab_size": 256000,
}


_QWEN3_30B = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QWEN3_235B = _QWEN3_30B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
_OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "vocab_size": 50304,
}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "eos_token_id": 200002,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def _qwen3(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return _QWEN3 | {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
    }


def _gemma3(width: int, feed_forward: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """With an encoder of images beside it, which is neither computed nor counted."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text | more,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
    }


_ROBERTA_LARGE = {
    "architectures": ["RobertaForMaskedLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

KNOWN = {
    "huggyllama/llama-7b": _llama1(4096, 11008, 32, 32),
    "huggyllama/llama-13b": _llama1(5120, 13824, 40, 40),
    "huggyllama/llama-30b": _llama1(6656, 17920, 60, 52),  # called 33B in the paper, after its parameters
    "huggyllama/llama-65b": _llama1(8192, 22016, 80, 64),
    "TinyLlama/TinyLlama_v1.1": _llama1(2048, 5632, 22, 32) | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 14336, 32, 32),
    "meta-llama/Meta-Llama-3-70B": _llama3(8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-405B": _LLAMA31_405B,
    "meta-llama/Llama-3.2-3B": _LLAMA32_3B,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA32_3B,
    "mistralai/Mistral-7B-v0.3": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL,
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_30B | {"max_position_embeddings": 262144, "rope_theta": 10000000},
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL,
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "openai/gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "openai/gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "microsoft/phi-4": _PHI4,
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3,
    "google/gemma-2-9b-it": _GEMMA2_9B,
    "FacebookAI/roberta-large": _ROBERTA_LARGE,
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 34, 8, 4),
    "google/gemma-3-12b-it": _gemma3(3840, 15360, 48, 16, 8),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    **KNOWN_T5,
}


def _opt(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": width,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "bos_token_id": 2,
        "eos_token_id": 2,
    } | more


def _bloom(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "n_embed": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 250880,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _pythia(width: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rotary_pct": 0.25,
        "max_position_embeddings": 2048,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


# the other models of the paper's Table 2 (configs/sweeps/paper_types.py)
KNOWN |= {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "bigscience/bloom-560m": _bloom(1024, 24, 16),
    "bigscience/bloom-1b1": _bloom(1536, 24, 16),
    "bigscience/bloom-1b7": _bloom(2048, 24, 16),
    "bigscience/bloom-3b": _bloom(2560, 30, 32),
    "bigscience/bloom-7b1": _bloom(4096, 30, 32),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 50688),
}


def known_config(name: str) -> ModelConfig | None:
    """The sizes of a hub name, or None where they are not known here."""
    return parse_config(KNOWN[name], name) if name in KNOWN else None
