"""Families from before rotary embedding: learned positions (GPT-2, OPT) and ALiBi (BLOOM)."""

import dataclasses

from qlora_jax.models.families.description import KEYS, Described, Family
from qlora_jax.models.kind import Kind, names
from qlora_jax.models.settings import Settings


def gpt2(c: Settings, sizes: dict[str, int]) -> Described:
    """Weights lie [I, O] on disk; the feed-forward is 4 D wide where n_inner says nothing."""
    c.only("add_cross_attention", False, None, why="attention to an encoder is not computed")
    linears = names(qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj")
    kind = Kind(
        layer="transformer.h.{}",
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        linears=linears,
        norms=names(attention_in="ln_1", feed_forward_in="ln_2"),
        buffers=(".attn.bias", ".attn.masked_bias"),
        optional_prefix="transformer.",
        transposed=True,
        norm="layer",
        norm_bias=True,
        biased=tuple(role for role, _ in linears),
        rotary="",
        attention_scale=None if c.get("scale_attn_weights", True) else 1.0,
        scores_fall=c.flag("scale_attn_by_inverse_layer_idx"),
        activation=c.activation("activation_function"),
    )
    return Described(kind, sizes={"K": sizes["N"]})


def gpt_bigcode(c: Settings, sizes: dict[str, int]) -> Described:
    """GPT-2 whose heads share one key and value, and whose weights lie [O, I]."""
    c.only("add_cross_attention", False, None, why="attention to an encoder is not computed")
    shares = c.flag("multi_query")
    found = gpt2(c, sizes)
    kind = dataclasses.replace(
        found.kind, transposed=False, scores_fall=False, qkv_layout="blocks" if shares else "groups"
    )
    return Described(kind, sizes={"K": 1 if shares else sizes["N"]})


_OPT_BEFORE = names(attention_in="self_attn_layer_norm", feed_forward_in="final_layer_norm")
_OPT_AFTER = names(attention_end="self_attn_layer_norm", feed_forward_end="final_layer_norm")


def opt(c: Settings, sizes: dict[str, int]) -> Described:
    """Positions begin in the third row of their table; 350M norms after each addition, projects its embedding."""
    before = c.flag("do_layer_norm_before")
    c.only("layer_norm_elementwise_affine", True, why="norms without weights are not read")
    width = sizes["D"] if c.get("word_embed_proj_dim") is None else c.count("word_embed_proj_dim")
    projects = width != sizes["D"]
    linears = names(
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.out_proj", up="fc1", down="fc2"
    )
    kind = Kind(
        layer="model.decoder.layers.{}",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        position_offset=2,
        final_norm="model.decoder.final_layer_norm" if before and not c.flag("_remove_final_layer_norm") else "",
        linears=linears,
        norms=_OPT_BEFORE if before else _OPT_AFTER,
        optional_prefix="model.",
        norm="layer",
        norm_bias=True,
        biased=tuple(role for role, _ in linears) * c.flag("enable_bias"),
        rotary="",
        activation=c.activation("activation_function"),
        project_in="model.decoder.project_in" if projects else "",
        project_out="model.decoder.project_out" if projects else "",
        embedding_width=width if projects else 0,
    )
    return Described(kind, sizes={"K": sizes["N"]})


def bloom(c: Settings, sizes: dict[str, int]) -> Described:
    """ALiBi, a normed embedding, and GELU by tanh whatever config.json says."""
    if c.get("pretraining_tp", 1) != 1:
        c.only("slow_but_exact", False, None, why="transformers leaves out biases then")
    linears = names(
        qkv="self_attention.query_key_value", o="self_attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"
    )
    kind = Kind(
        layer="transformer.h.{}",
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        linears=linears,
        norms=names(attention_in="input_layernorm", feed_forward_in="post_attention_layernorm"),
        optional_prefix="transformer.",
        norm="layer",
        norm_bias=True,
        qkv_layout="groups",
        biased=tuple(role for role, _ in linears),
        rotary="",
        alibi=True,
        normed_residual=c.flag("apply_residual_connection_post_layernorm"),
        activation="gelu_new",
    )
    return Described(kind, sizes={"K": sizes["N"]})


_GPT2_KEYS = {"D": ("n_embd",), "F": ("n_inner",), "L": ("n_layer",), "N": ("n_head",), "K": ("n_head",)}
_BLOOM_KEYS = {
    "D": ("n_embed", "hidden_size"), "L": ("n_layer", "num_hidden_layers"), "F": (),
    "N": ("n_head", "num_attention_heads"), "K": ("n_head", "num_attention_heads"), "context": ("seq_length",),
}  # fmt: skip
FAMILIES = {
    "GPT2LMHeadModel": Family(
        gpt2,
        {
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
            "n_positions": 1024,
        },
        keys=KEYS | _GPT2_KEYS | {"context": ("n_positions",)},
        eps="layer_norm_epsilon",
        has_head_dim=False,
        default_F=True,
    ),
    "GPTBigCodeForCausalLM": Family(
        gpt_bigcode,
        {
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": True,
            "n_positions": 1024, "multi_query": True, "eos_token_id": 50256, "bos_token_id": 50256,
        },
        keys=KEYS | _GPT2_KEYS | {"context": ("n_positions",)},
        eps="layer_norm_epsilon",
        has_head_dim=False,
        default_F=True,
    ),
    "OPTForCausalLM": Family(
        opt,
        {
            "activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True,
            "do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "layer_norm_eps": 1e-5,
        },
        keys=KEYS | {"F": ("ffn_dim",), "K": ("num_attention_heads",)},
        eps="layer_norm_eps",
        has_head_dim=False,
    ),
    "BloomForCausalLM": Family(
        bloom,
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "seq_length": 2048},
        keys=KEYS | _BLOOM_KEYS,
        eps="layer_norm_epsilon",
        has_head_dim=False,
        default_F=True,
    ),
}  # fmt: skip
