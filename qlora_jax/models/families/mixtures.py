"""Families whose feed-forward is a mixture of experts."""

import dataclasses

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import Described, Family, windows_of
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
    "OlmoeForCausalLM": Family(
        olmoe,
        {
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64, "eos_token_id": 50279,
            "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip
