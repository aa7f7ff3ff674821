"""Families with LayerNorm, most of which compute attention and feed-forward side by side."""

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import (
    FULL,
    KEYS,
    NO_ROTARY,
    SLIDES,
    Described,
    Family,
    whole_heads,
    windows_of,
)
from qlora_jax.models.families.llamas import ALL_ATTENTION
from qlora_jax.models.kind import LLAMA, NO_ROPE, OWN_ROPE, Kind, names
from qlora_jax.models.settings import Settings

_ONE_NORM = names(attention_in="input_layernorm", feed_forward_in="input_layernorm")
_TWO_NORMS = names(attention_in="input_layernorm", feed_forward_in="post_attention_layernorm")
_PLAIN = ("qkv", "o", "up", "down")
_FUSED_MLP = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def stablelm(c: Settings, sizes: dict[str, int]) -> Described:
    """Llama with LayerNorm and heads that turn in part."""
    parallel = c.flag("use_parallel_residual")
    heads = names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm") * c.flag("qk_layernorm")
    kind = Kind(
        norm="layer",
        norm_bias=True,
        norms=(*heads, *(_ONE_NORM if parallel else _TWO_NORMS)),
        qk_norm="heads apart",
        parallel=parallel,
        biased=("q", "k", "v") * c.flag("use_qkv_bias"),
        rotary_width=int(sizes["H"] * c.share("partial_rotary_factor", default=0.25)),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def starcoder2(c: Settings, sizes: dict[str, int]) -> Described:
    """LayerNorm, biases, a feed-forward without a gate, and a window."""
    linears = names(
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
        up="mlp.c_fc", down="mlp.c_proj",
    )  # fmt: skip
    whole_heads(c)
    kind = Kind(
        linears=linears,
        norm="layer",
        norm_bias=True,
        biased=tuple(role for role, _ in linears) * c.flag("use_bias"),
        windows=windows_of(None, c.window(), sizes["L"], all_layers=True),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def _cohere(c: Settings, **more: object) -> Kind:
    return Kind(
        norm="layer",
        parallel=True,
        rotary="pairs",
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        activation=c.activation(),
        logit_scale=c.positive("logit_scale"),
        **more,  # type: ignore[arg-type]
    )


def cohere(c: Settings, sizes: dict[str, int]) -> Described:
    """LayerNorm without a bias, one for both sides; pairs that lie side by side; logits scaled."""
    whole_heads(c)
    norms = _ONE_NORM
    if c.flag("use_qk_norm"):
        norms = (*names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"), *_ONE_NORM)
    return Described(_cohere(c, norms=norms, qk_norm="heads"), c.rope(sizes["context"]))


def cohere2(c: Settings, sizes: dict[str, int]) -> Described:
    """Cohere whose layers slide but for every fourth, which sees all and does not turn."""
    whole_heads(c)
    L, every = sizes["L"], c.get("sliding_window_pattern", 4)
    types = c.layer_types(L)
    if types is None and (not isinstance(every, int) or every < 1):
        raise c.wrong("sliding_window_pattern", "a positive integer")
    types = types or [SLIDES if (index + 1) % every else FULL for index in range(L)]
    if SLIDES in types and not c.window():
        raise c.wrong("sliding_window", f"a positive integer, as layer_types has {SLIDES}")
    ropes = tuple(OWN_ROPE if kind == SLIDES else NO_ROPE for kind in types)
    kind = _cohere(c, norms=_ONE_NORM, windows=windows_of(types, c.window(), L), layer_ropes=ropes)
    return Described(kind, c.rope(sizes["context"]))


def phi(c: Settings, sizes: dict[str, int]) -> Described:
    """Phi 1, 1.5 and 2: biases everywhere, the head included."""
    linears = names(
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.dense",
        up="mlp.fc1", down="mlp.fc2",
    )  # fmt: skip
    norms = _ONE_NORM
    if c.flag("qk_layernorm"):
        if sizes["H"] * sizes["N"] != sizes["D"]:
            raise InputError(f"{c.where}: qk_layernorm needs heads of hidden_size / num_attention_heads")
        norms = (*names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"), *_ONE_NORM)
    kind = Kind(
        final_norm="model.final_layernorm",
        linears=linears,
        norms=norms,
        norm="layer",
        norm_bias=True,
        parallel=True,
        biased=tuple(role for role, _ in linears),
        head_bias=True,
        rotary_width=int(sizes["H"] * c.share("partial_rotary_factor", default=0.5)),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def nemotron(c: Settings, sizes: dict[str, int]) -> Described:
    """LayerNorm times 1 + w, heads that turn in part, a feed-forward without a gate."""
    kind = Kind(
        linears=tuple((role, name) for role, name in LLAMA.linears if role != "gate"),
        norm="layer+1",
        norm_bias=True,
        biased=ALL_ATTENTION * c.flag("attention_bias") + ("up", "down") * c.flag("mlp_bias"),
        rotary_width=int(sizes["H"] * c.share("partial_rotary_factor", default=0.5)),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


def gptj(c: Settings, sizes: dict[str, int]) -> Described:
    """Pairs that lie side by side in the first rotary_dim values of a head; biases in feed-forward and head alone."""
    width = c.count("rotary_dim")
    if width > sizes["H"]:
        raise c.wrong("rotary_dim", f"at most {sizes['H']}, the width of a head")
    kind = Kind(
        layer="transformer.h.{}",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        linears=names(
            q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", o="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"
        ),
        norms=names(attention_in="ln_1", feed_forward_in="ln_1"),
        buffers=(".attn.bias", ".attn.masked_bias"),
        norm="layer",
        norm_bias=True,
        parallel=True,
        biased=("up", "down"),
        head_bias=True,
        rotary="pairs",
        rotary_width=width,
        activation=c.activation("activation_function"),
    )
    return Described(kind, NO_ROTARY, {"K": sizes["N"]})


def gpt_neox(c: Settings, sizes: dict[str, int]) -> Described:
    """GPT-NeoX and Pythia: queries, keys and values of a head in one matrix, heads that turn in part."""
    theta = c.get("rotary_emb_base")
    kind = Kind(
        layer="gpt_neox.layers.{}",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        linears=names(qkv="attention.query_key_value", o="attention.dense", **_FUSED_MLP),
        norms=_TWO_NORMS,
        buffers=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
        renamed=(("lm_head.", "embed_out."),),
        norm="layer",
        norm_bias=True,
        parallel=c.flag("use_parallel_residual"),
        qkv_layout="groups",
        biased=("qkv", "o") * c.flag("attention_bias") + ("up", "down"),
        rotary_width=int(sizes["H"] * c.share("rotary_pct", default=0.25)),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"], theta=theta), {"K": sizes["N"]})


def falcon(c: Settings, sizes: dict[str, int]) -> Described:
    """Falcon 7B (one key head, one norm), 40B (groups of heads, two norms) and 11B (groups, one norm)."""
    # transformers 5.23 adds it once with sdpa and twice with eager attention, so there is no one model to agree with
    c.only("alibi", False, None, why="ALiBi of Falcon is not computed, of which transformers has two that differ")
    whole_heads(c)
    new, shares, parallel = c.flag("new_decoder_architecture"), c.flag("multi_query"), c.flag("parallel_attn")
    count = c.get("num_ln_in_parallel_attn")
    if new and not parallel:
        raise InputError(f"{c.where}: new_decoder_architecture is true and parallel_attn is not; expected both")
    count = (2 if new else 1) if count is None else count
    if count not in (1, 2) or (count == 2 and not new):
        raise c.wrong("num_ln_in_parallel_attn", "1, or 2 with new_decoder_architecture")
    two = names(attention_in="ln_attn", feed_forward_in="ln_mlp")
    linears = names(qkv="self_attention.query_key_value", o="self_attention.dense", **_FUSED_MLP)
    kind = Kind(
        layer="transformer.h.{}",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        linears=linears,
        norms=(two if count == 2 else _ONE_NORM) if parallel else _TWO_NORMS,
        norm="layer",
        norm_bias=True,
        parallel=parallel,
        qkv_layout="groups",
        biased=_PLAIN * c.flag("bias"),
        activation=c.activation("activation"),
    )
    K = sizes["K"] if new else 1 if shares else sizes["N"]
    return Described(kind, c.rope(sizes["context"]), {"K": K})


_LAYER = {"layer_norm_eps": 1e-5}
_FALCON = {
    "layer_norm_epsilon": 1e-5, "multi_query": True, "parallel_attn": True, "activation": "gelu",
    "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "StableLmForCausalLM": Family(
        stablelm, _LAYER | {"num_key_value_heads": 32}, eps="layer_norm_eps", has_head_dim=False
    ),
    "Starcoder2ForCausalLM": Family(
        starcoder2,
        {
            "norm_epsilon": 1e-5, "num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
        eps="norm_epsilon",
    ),
    "CohereForCausalLM": Family(
        cohere,
        _LAYER | {"logit_scale": 0.0625, "tie_word_embeddings": True, "rope_theta": 500000.0},
        eps="layer_norm_eps",
    ),
    "Cohere2ForCausalLM": Family(
        cohere2,
        _LAYER | {"logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096},
        eps="layer_norm_eps",
    ),
    "PhiForCausalLM": Family(phi, _LAYER | {"hidden_act": "gelu_new"}, eps="layer_norm_eps"),
    "NemotronForCausalLM": Family(
        nemotron,
        {
            "norm_eps": 1e-5, "hidden_act": "relu2", "eos_token_id": 3, "bos_token_id": 2,
            "max_position_embeddings": 4096,
        },
        eps="norm_eps",
    ),
    "GPTJForCausalLM": Family(
        gptj,
        {
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "rotary_dim": 64, "eos_token_id": 50256,
            "bos_token_id": 50256,
        },
        keys=KEYS
        | {"D": ("n_embd",), "F": ("n_inner",), "L": ("n_layer",), "N": ("n_head",), "K": ("n_head",)}
        | {"context": ("n_positions",)},
        eps="layer_norm_epsilon",
        has_head_dim=False,
        default_F=True,
    ),
    "GPTNeoXForCausalLM": Family(
        gpt_neox,
        _LAYER | {"hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True},
        eps="layer_norm_eps",
        has_head_dim=False,
        keys=KEYS | {"K": ("num_attention_heads",)},
    ),
    "FalconForCausalLM": Family(
        falcon,
        _FALCON,
        keys=KEYS | {"D": ("n_embed", "hidden_size"), "F": ("ffn_hidden_size",), "K": ("num_kv_heads",)},
        eps="layer_norm_epsilon",
        has_head_dim=False,
        default_F=True,
    ),
}  # fmt: skip
