"""Families that are Llama whose heads turn in pairs that lie side by side: (2 h, 2 h + 1)."""

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import Described, Family, whole_heads
from qlora_jax.models.families.llamas import ALL_ATTENTION, ALL_FEED_FORWARD, FUSED_FEED_FORWARD
from qlora_jax.models.kind import LLAMA, Kind, Pairs, names
from qlora_jax.models.settings import Settings

_QKV = ("q", "k", "v")
# GLM 4 from 0414 on norms what attention and feed-forward give too
_FOUR_NORMS = names(
    attention_in="input_layernorm", attention_out="post_self_attn_layernorm",
    feed_forward_in="post_attention_layernorm", feed_forward_out="post_mlp_layernorm",
)  # fmt: skip


def _glm(c: Settings, sizes: dict[str, int], norms: Pairs) -> Described:
    """Heads turn in part, gate and up are one matrix."""
    kind = Kind(
        linears=FUSED_FEED_FORWARD,
        norms=norms,
        biased=_QKV * c.flag("attention_bias"),
        rotary="pairs",
        rotary_width=int(sizes["H"] * c.share("partial_rotary_factor", default=0.5)),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def glm(c: Settings, sizes: dict[str, int]) -> Described:
    return _glm(c, sizes, LLAMA.norms)


def glm4(c: Settings, sizes: dict[str, int]) -> Described:
    return _glm(c, sizes, _FOUR_NORMS)


def helium(c: Settings, sizes: dict[str, int]) -> Described:
    whole_heads(c)
    if sizes["N"] * sizes["H"] != sizes["D"]:
        raise InputError(f"{c.where}: num_attention_heads x head_dim is not hidden_size, as this family has it")
    kind = Kind(
        biased=_QKV * c.flag("attention_bias") + ALL_FEED_FORWARD * c.flag("mlp_bias"),
        rotary="pairs",
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def ernie(c: Settings, sizes: dict[str, int]) -> Described:
    whole_heads(c)
    kind = Kind(
        biased=(*ALL_ATTENTION, *ALL_FEED_FORWARD) * c.flag("use_bias"), rotary="pairs", activation=c.activation()
    )
    return Described(kind, c.rope(sizes["context"]))


_GLM = {
    "rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338], "max_position_embeddings": 131072,
}  # fmt: skip
FAMILIES = {
    "GlmForCausalLM": Family(glm, _GLM),
    "Glm4ForCausalLM": Family(glm4, _GLM),
    "HeliumForCausalLM": Family(
        helium,
        {
            "rms_norm_eps": 1e-8, "num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000.0,
            "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 4096,
        },
    ),
    "Ernie4_5ForCausalLM": Family(
        ernie,
        {
            "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 500000.0,
            "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 131072,
        },
    ),
}  # fmt: skip
