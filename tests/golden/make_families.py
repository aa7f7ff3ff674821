"""Makes families/NAME/: tiny random checkpoints of every family as transformers writes them, with its logits.

transformers 5.23.0, torch 2.13.0 (CPU, one thread), peft 0.21.2, safetensors 0.8.0, Python 3.11.

    python tests/golden/make_families.py [NAME ...]

Each folder: config.json, model.safetensors in bfloat16, and logits.npz {tokens int32 [1, T], logits float32 [1, T, V]}:
eager attention, float32 arithmetic from the stored weights. Norms and biases are random too. Two shapes of each family,
NAME_a and NAME_b: in the second its switches stand the other way (ties, biases, windows, scalings), and heads are of
another width than D / N where the family allows it. Windows are shorter than T.

Those of ADAPTED have adapter/ besides, saved by PEFT with target_modules "all-linear", and `adapted` in logits.npz.
"""

import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_llama import logits_of
from make_peft import save_adapter
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
T = 24
A: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24,
    "num_hidden_layers": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
B = A | {
    "vocab_size": 41, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {"head_dim": 12}
THETA = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = THETA | {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
PART = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


def longrope(pairs: int, **more: float) -> dict[str, Any]:
    factors = [1 + 0.1 * pair for pair in range(pairs)], [2 + 0.3 * pair for pair in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": factors[0], "long_factor": factors[1]} | more


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": parameters}


def by_layer(local: float, full: dict[str, Any]) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": local}
    return rope({"full_attention": full, "sliding_attention": sliding})


def only(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def with_images(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of a model with an encoder of images beside its decoder of text."""
    outer = only(text, "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {"text_config": text, "vision_config": vision, "vocab_size": text["vocab_size"]} | outer | more


SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "image_size": 8, "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN_IMAGES = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 4, "fullatt_block_indexes": [0],
}  # fmt: skip
QWEN3_IMAGES = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 4, "out_hidden_size": 16,
    "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 1]}}
_OUTER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
_OPT = (*_OUTER, "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
GPT2 = {"n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2} | only(A, *_OUTER)
BLOOM = {"n_layer": 2, "hidden_size": 24, "n_head": 3} | only(A, *_OUTER)
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
GEMMA2 = {"query_pre_attn_scalar": 20, "sliding_window": 5}

# NAME -> prefix of transformers' classes, settings of NAME_a and of NAME_b. A place is a seed: new ones go last
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "Llama",
        A | {"attention_bias": True, "mlp_bias": True} | rope(YARN),
        B | {"max_position_embeddings": 20} | rope(DYNAMIC),
    ),
    "llama_longrope": (
        "Llama",
        A | rope(longrope(4, original_max_position_embeddings=16)),
        B | WIDE | rope(longrope(6, original_max_position_embeddings=24, factor=8.0)),
    ),
    "mistral": ("Mistral", A | {"sliding_window": 7} | rope(THETA), B | WIDE | {"sliding_window": None} | rope(YARN)),
    "ministral": ("Ministral", A | {"head_dim": 8, "sliding_window": 5} | rope(THETA), B | WIDE | MIXED | rope(THETA)),
    "qwen2": (
        "Qwen2",
        A | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1} | rope(THETA),
        B | {"use_sliding_window": False} | rope(YARN),
    ),
    "qwen3": (
        "Qwen3",
        A | WIDE | {"attention_bias": True} | rope(THETA),
        B | WIDE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2} | rope(YARN),
    ),
    "smollm3": (
        "SmolLM3",
        A | {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True} | rope(THETA),
        B | {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 6} | rope(THETA),
    ),
    "olmo2": ("Olmo2", A | rope(THETA), B | {"attention_bias": True} | rope(THETA)),
    "olmo3": ("Olmo3", A | {"sliding_window": 5}, B | MIXED | by_layer(100.0, YARN)),
    "granite": (
        "Granite",
        A | rope(THETA) | {"embedding_multiplier": 6.0, "attention_multiplier": 0.2},
        B | rope(THETA) | {"logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_bias": True, "mlp_bias": True},
    ),
    "phi3": (
        "Phi3",
        A | {"sliding_window": 7, "original_max_position_embeddings": 32} | rope(THETA),
        B | {"original_max_position_embeddings": 16} | rope(longrope(3)),
    ),
    "gemma": ("Gemma", A | {"head_dim": 8} | rope(THETA), B | WIDE | {"attention_bias": True} | rope(THETA)),
    "gemma2": (
        "Gemma2",
        A | {"head_dim": 8, "attn_logit_softcapping": 3.0} | GEMMA2 | rope(THETA),
        B | WIDE | MIXED | {"attn_logit_softcapping": None, "final_logit_softcapping": 4.0} | rope(THETA),
    ),
    "gemma3": (
        "Gemma3",
        A | {"head_dim": 8, "num_hidden_layers": 7} | GEMMA2,
        B | WIDE | MIXED | {"final_logit_softcapping": 4.0} | by_layer(100.0, LINEAR),
    ),
    "stablelm": (
        "StableLm",
        A | {"use_qkv_bias": True} | rope(PART),
        B | {"num_attention_heads": 2, "num_key_value_heads": 1, "use_parallel_residual": True} | rope(PART),
    ),
    "starcoder2": (
        "Starcoder2",
        A | {"sliding_window": 7} | rope(THETA),
        B | {"use_bias": False, "sliding_window": None} | rope(THETA),
    ),
    "cohere": (
        "Cohere",
        A | {"use_qk_norm": True, "logit_scale": 0.5} | rope(THETA),
        B | {"attention_bias": True, "logit_scale": 0.25} | rope(DYNAMIC),
    ),
    "cohere2": ("Cohere2", A | {"sliding_window": 5} | rope(THETA), B | MIXED | {"attention_bias": True} | rope(THETA)),
    "phi": (
        "Phi",
        A | rope(PART),
        B | {"num_attention_heads": 2, "num_key_value_heads": 2, "qk_layernorm": True} | rope(PART),
    ),
    "gpt_neox": (
        "GPTNeoX",
        A | rope(PART),
        B | {"num_attention_heads": 2, "use_parallel_residual": False, "attention_bias": False} | rope(PART),
    ),
    "falcon": (
        "Falcon",
        A | {"multi_query": True, "bias": True, "ffn_hidden_size": 24} | rope(THETA),
        B | {"new_decoder_architecture": True, "num_kv_heads": 2} | rope(THETA),
    ),
    "falcon_serial": (
        "Falcon",
        A | {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 24} | rope(THETA),
        B | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1} | rope(THETA),
    ),
    "gpt2": (
        "GPT2",
        GPT2 | {"n_inner": 24},
        GPT2 | {"tie_word_embeddings": True, "n_head": 1, "scale_attn_weights": False},
    ),
    "opt": (
        "OPT",
        only(A, *_OPT) | {"ffn_dim": 24},
        only(B, *_OPT)
        | {"ffn_dim": 24, "do_layer_norm_before": False, "enable_bias": False, "word_embed_proj_dim": 16},
    ),
    "bloom": (
        "Bloom",
        BLOOM,
        BLOOM | {"tie_word_embeddings": True, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    ),
    "ministral3": (
        "Ministral3",
        A | {"head_dim": 8, "sliding_window": 7} | rope(YARN | {"llama_4_scaling_beta": 0.5}),
        B | WIDE | rope(THETA | {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 6}),
    ),
    "mixtral": (
        "Mixtral",
        A | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7} | rope(THETA),
        B | WIDE | {"num_local_experts": 5, "num_experts_per_tok": 1} | rope(THETA),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        A | WIDE | EXPERTS | {"norm_topk_prob": True, "attention_bias": True} | rope(THETA),
        B | WIDE | EXPERTS | {"num_experts_per_tok": 6, "use_sliding_window": True, "sliding_window": 6} | rope(YARN),
    ),
    "olmoe": (
        "Olmoe",
        A | {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.7} | rope(THETA),
        B | {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True} | rope(THETA),
    ),
    "gpt_oss": (
        "GptOss",
        A | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
        B | WIDE | MIXED | {"num_local_experts": 5, "num_experts_per_tok": 3, "swiglu_limit": 0.6} | rope(YARN),
    ),
    "gemma3_images": (
        "Gemma3VL",
        with_images(A | {"head_dim": 8} | GEMMA2, SIGLIP, mm_tokens_per_image=4),
        with_images(B | WIDE | MIXED | by_layer(100.0, LINEAR), SIGLIP, mm_tokens_per_image=1),
    ),
    "mistral3": (
        "Mistral3",
        with_images({"model_type": "mistral"} | A | {"head_dim": 8, "sliding_window": None} | rope(THETA), PIXTRAL),
        with_images(
            {"model_type": "ministral3"}
            | B
            | WIDE
            | rope(THETA | {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 6}),
            PIXTRAL,
        ),
    ),
    "stablelm_heads": (
        "StableLm",
        A | {"qk_layernorm": True, "use_parallel_residual": True} | rope(PART),
        B
        | {"num_attention_heads": 6, "num_key_value_heads": 3, "qk_layernorm": True, "use_qkv_bias": True}
        | rope(PART),
    ),
    "gpt2_by_layer": (
        "GPT2",
        GPT2 | {"n_inner": 24, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        GPT2 | {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    ),
    "exaone4": (
        "Exaone4",
        A | {"sliding_window": 6, "sliding_window_pattern": 2} | rope(THETA),
        B | WIDE | {"sliding_window": None, "layer_types": ["full_attention"] * 3} | rope(LINEAR),
    ),
    "seed_oss": (
        "SeedOss",
        A | WIDE | rope(THETA),
        B | {"head_dim": 6, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True} | rope(YARN),
    ),
    "arcee": ("Arcee", A | rope(THETA), B | {"attention_bias": True, "mlp_bias": True} | rope(YARN)),
    "hunyuan": (
        "HunYuanDenseV1",
        A | {"head_dim": 8} | rope(DYNAMIC | {"factor": 1.0, "alpha": 50.0}),
        B | WIDE | {"attention_bias": True} | rope(THETA),
    ),
    "glm": ("Glm", A | {"head_dim": 8} | rope(PART), B | WIDE | {"attention_bias": False} | rope(THETA)),
    "glm4": ("Glm4", A | {"head_dim": 8} | rope(PART), B | WIDE | {"attention_bias": False} | rope(THETA)),
    "helium": (
        "Helium",
        A | {"head_dim": 8} | rope(THETA),
        B | {"head_dim": 6, "attention_bias": True, "mlp_bias": True} | rope(LINEAR),
    ),
    "ernie": ("Ernie4_5", A | {"head_dim": 8} | rope(THETA), B | WIDE | {"use_bias": True} | rope(YARN)),
    "nemotron": (
        "Nemotron",
        A | rope(PART),
        B | WIDE | {"attention_bias": True, "mlp_bias": True} | rope(LINEAR | {"partial_rotary_factor": 1.0}),
    ),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 4}, GPT2 | {"n_head": 1, "rotary_dim": 16, "n_inner": 24}),
    "gpt_bigcode": (
        "GPTBigCode",
        GPT2 | {"n_inner": 24},
        GPT2 | {"tie_word_embeddings": True, "multi_query": False, "scale_attn_weights": False},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        with_images(A | rope(THETA | {"mrope_section": [1, 1, 2]}), QWEN_IMAGES | {"out_hidden_size": 16}),
        with_images(B | MROPE, QWEN_IMAGES | {"out_hidden_size": 24}),
    ),
    "qwen3_vl": (
        "Qwen3VL",
        with_images(A | {"head_dim": 8} | rope(THETA | {"mrope_section": [2, 1, 1]}), QWEN3_IMAGES),
        with_images(B | WIDE | {"attention_bias": True} | MROPE, QWEN3_IMAGES | {"out_hidden_size": 24}),
    ),
}
ADAPTED = ("gpt2_a", "gpt_neox_a", "opt_a", "phi3_a", "phi_a", "falcon_b", "gemma3_images_b", "qwen2_5_vl_b")
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma3VL": "Gemma3Config"}
MODELS = {
    "GPT2": "GPT2LMHeadModel",
    "Gemma3VL": "Gemma3ForConditionalGeneration",
    "Mistral3": "Mistral3ForConditionalGeneration",
    "Qwen2_5_VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VL": "Qwen3VLForConditionalGeneration",
}


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Random values large enough that every part moves the logits, which stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = any(part in name for part in ("norm", "ln_"))
        if is_norm and name.endswith("weight"):
            parameter.copy_(0.8 + 0.3 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise if any(part in name for part in ("embed", "wte", "wpe")) else 0.3 * noise)


def load(model: type, folder: Path) -> torch.nn.Module:
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def adapted(model: torch.nn.Module, folder: Path, tokens: np.ndarray, seed: int) -> np.ndarray:
    """Logits with a random adapter, which is saved in the folder."""
    has_images = hasattr(model.config, "vision_config")  # whose encoder stays as it is
    targets = r".*language_model\..*_proj" if has_images else "all-linear"
    options = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    logits = logits_of(model, tokens)
    save_adapter(model, folder / "adapter", folder.name)
    return logits


def make(name: str, prefix: str, settings: dict[str, Any], seed: int) -> None:
    folder = HERE / "families" / name
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, CONFIGS.get(prefix, f"{prefix}Config"))(**deepcopy(settings))  # it writes into them
    family = getattr(transformers, MODELS.get(prefix, f"{prefix}ForCausalLM"))
    model = family(config)
    fill(model, seed)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(3, settings["vocab_size"], (1, T)).astype(np.int32)
    arrays = {"tokens": tokens, "logits": logits_of(load(family, folder), tokens)}
    if name in ADAPTED:
        arrays["adapted"] = adapted(load(family, folder), folder, tokens, seed)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
    np.savez_compressed(folder / "logits.npz", **arrays)
    print(f"{name}: std {arrays['logits'].std():.2f}")


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (prefix, a, b)) in enumerate(FAMILIES.items(), start=1):
        for shape, settings in (("a", a), ("b", b)):
            if not sys.argv[1:] or f"{name}_{shape}" in sys.argv[1:]:
                make(f"{name}_{shape}", prefix, settings, 100 * (shape == "b") + seed)


if __name__ == "__main__":
    main()
