"""Families whose feed-forward is a mixture of experts."""

import dataclasses

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import FULL, SLIDES, Described, Family, whole_heads, windows_of
from qlora_jax.models.families.llamas import ALL_ATTENTION, described
from qlora_jax.models.kind import LLAMA, Experts, Kind, names
from qlora_jax.models.settings import Settings

_ATTENTION = names(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj")
_EXPERTS = names(
    gate="mlp.experts.gate_proj", up="mlp.experts.up_proj", down="mlp.experts.down_proj",
)  # fmt: skip
_FUSED = names(gate="mlp.experts.gate_up_proj", up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj")
_QK_NORMS = names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _experts(c: Settings, count: int, **more: object) -> Experts:
    """Of a config.json's keys that all these families have."""
    taken = c.count("num_experts_per_tok")
    if taken > count:
        raise c.wrong("num_experts_per_tok", f"at most the {count} experts that there are")
    return Experts(count, taken, **more)  # type: ignore[arg-type]


def _fused(linears: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Stack -> the name of the tensor that transformers 5 fuses it into, for names like those of `linears`."""
    whole = dict(_FUSED)
    return tuple((name, whole[role]) for role, name in linears if role in whole)


def mixtral(c: Settings, sizes: dict[str, int]) -> Described:
    """Mistral with experts, under the names that they have in its files."""
    c.only("router_jitter_noise", 0.0, 0, None, why="training would multiply what routers take by random numbers")
    linears = names(
        gate="block_sparse_moe.experts.w1", up="block_sparse_moe.experts.w3", down="block_sparse_moe.experts.w2",
    )  # fmt: skip
    experts = _experts(
        c, c.count("num_local_experts", "num_experts"), stem="block_sparse_moe.experts",
        router="block_sparse_moe.gate", normalized=True, fused=_fused(linears),
    )  # fmt: skip
    kind = Kind(
        linears=(*_ATTENTION, *linears),
        experts=experts,
        windows=windows_of(None, c.window(), sizes["L"], all_layers=True),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def qwen3_moe(c: Settings, sizes: dict[str, int]) -> Described:
    """Qwen 3 with experts in every layer."""
    L, every = sizes["L"], c.get("decoder_sparse_step")
    plain = c.get("mlp_only_layers") or []
    if not isinstance(every, int) or not isinstance(plain, list):
        raise c.wrong("decoder_sparse_step", "1, and mlp_only_layers a list")
    dense = [index for index in range(L) if index in plain or every < 1 or (index + 1) % every]
    if dense:
        raise InputError(
            f"{c.where}: {len(dense)} of {L} layers have no experts (mlp_only_layers {plain}, decoder_sparse_step "
            f"{every}); layers are stacked, so models are read that have experts in all"
        )
    window = c.window() if c.flag("use_sliding_window") else 0
    kind = Kind(
        linears=(*_ATTENTION, *_EXPERTS),
        norms=(*LLAMA.norms, *_QK_NORMS),
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        experts=_experts(
            c, c.count("num_experts", "num_local_experts"), normalized=c.flag("norm_topk_prob"), fused=_fused(_EXPERTS)
        ),
        windows=windows_of(None, window, L, all_layers=True),
        activation=c.activation(),
    )
    return dataclasses.replace(described(c, sizes, kind), sizes={"F": c.count("moe_intermediate_size")})


def olmoe(c: Settings, sizes: dict[str, int]) -> Described:
    """OLMo with experts: queries and keys are normed over all heads, and clipped where its file says so."""
    kind = Kind(
        linears=(*_ATTENTION, *_EXPERTS),
        norms=(*LLAMA.norms, *_QK_NORMS),
        qk_norm="whole",
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        clip_qkv=c.cap("clip_qkv"),
        experts=_experts(
            c, c.count("num_experts", "num_local_experts"), normalized=c.flag("norm_topk_prob"), fused=_fused(_EXPERTS)
        ),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def gpt_oss(c: Settings, sizes: dict[str, int]) -> Described:
    """Attention sinks, every second layer slides, biases everywhere, gate and up in turns and clamped."""
    L, stem = sizes["L"], "mlp.experts"
    types = c.layer_types(L) or [FULL if index % 2 else SLIDES for index in range(L)]
    linears = names(gate_up=f"{stem}.gate_up_proj", down=f"{stem}.down_proj")
    stored = c.get("quantization_config") or {}
    if not isinstance(stored, dict):
        raise c.wrong("quantization_config", "an object")
    is_mxfp4 = mxfp4_of(stored)
    if is_mxfp4 and (sizes["D"] % 32 or sizes["F"] % 32):
        raise InputError(f"{c.where}: MXFP4 has blocks of 32, and hidden_size and intermediate_size are no multiples")
    experts = _experts(
        c, c.count("num_local_experts", "num_experts"), router="mlp.router", router_bias=True, chosen_alone=True,
        swiglu=(c.positive("swiglu_alpha"), c.positive("swiglu_limit")), stored="mxfp4" if is_mxfp4 else "",
        fused=tuple((name, name) for _, name in linears), fused_alone=True,
    )  # fmt: skip
    kind = Kind(
        linears=(*_ATTENTION, *linears),
        biased=(*(ALL_ATTENTION * c.flag("attention_bias")), "gate_up", "down"),
        sinks="self_attn.sinks",
        experts=experts,
        windows=windows_of(types, c.window(), L),
    )
    whole_heads(c)
    if not c.raw.get("rope_parameters") and not c.raw.get("rope_scaling"):
        c = Settings({**c.raw, "rope_scaling": _YARN}, c.where, c.defaults)
    return Described(kind, c.rope(sizes["context"]))


def mxfp4_of(quantization: dict[str, object]) -> bool:
    """Whether experts lie in MXFP4: as OpenAI's files say it, or a folder in our own form."""
    return "mxfp4" in (quantization.get("quant_method"), quantization.get("experts"))


_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES = {
    "MixtralForCausalLM": Family(
        mixtral,
        {
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1000000.0,
            "num_experts_per_tok": 2, "num_local_experts": 8, "max_position_embeddings": 131072,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        qwen3_moe,
        {
            "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "decoder_sparse_step": 1, "sliding_window": 4096,
            "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768,
            "max_position_embeddings": 32768,
        },
    ),
    "GptOssForCausalLM": Family(
        gpt_oss,
        {
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
            "rope_theta": 150000.0, "num_experts_per_tok": 4, "num_local_experts": 128, "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0, "attention_bias": True, "max_position_embeddings": 131072,
        },
    ),
    "OlmoeForCausalLM": Family(
        olmoe,
        {
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64, "eos_token_id": 50279,
            "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip
