"""Families that are Llama with a few things more: RMSNorm, a gated feed-forward, rotary embedding."""

import dataclasses

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import FULL, SLIDES, Described, Family, local_ropes, whole_heads, windows_of
from qlora_jax.models.kind import LLAMA, NO_ROPE, OWN_ROPE, Kind, names
from qlora_jax.models.settings import Settings, check_positive

ALL_ATTENTION = ("q", "k", "v", "o")
ALL_FEED_FORWARD = ("gate", "up", "down")
# projections of one input that are one matrix
FUSED_FEED_FORWARD = names(
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
    gate_up="mlp.gate_up_proj", down="mlp.down_proj",
)  # fmt: skip
_HEAD_NORMS = names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
# OLMo norms what attention and feed-forward give, not what they take
_OLMO_NORMS = (
    *_HEAD_NORMS,
    *names(attention_out="post_attention_layernorm", feed_forward_out="post_feedforward_layernorm"),
)


def described(c: Settings, sizes: dict[str, int], kind: Kind) -> Described:
    whole_heads(c)
    return Described(kind, c.rope(sizes["context"]))


def llama(c: Settings, sizes: dict[str, int]) -> Described:
    biased = ALL_ATTENTION * c.flag("attention_bias") + ALL_FEED_FORWARD * c.flag("mlp_bias")
    return described(c, sizes, Kind(biased=biased, activation=c.activation()))


def mistral(c: Settings, sizes: dict[str, int]) -> Described:
    windows = windows_of(None, c.window(), sizes["L"], all_layers=True)
    return described(c, sizes, Kind(windows=windows, activation=c.activation()))


def ministral(c: Settings, sizes: dict[str, int]) -> Described:
    windows = windows_of(c.layer_types(sizes["L"]), c.window(), sizes["L"], all_layers=True)
    return described(c, sizes, Kind(windows=windows, activation=c.activation()))


def ministral3(c: Settings, sizes: dict[str, int]) -> Described:
    """Mistral whose queries grow with the logarithm of their place."""
    said = c.raw.get("rope_parameters")
    if not isinstance(said, dict):
        raise c.wrong("rope_parameters", "an object, which this family always has")
    growth = said.get("llama_4_scaling_beta")
    if not isinstance(growth, int | float) or isinstance(growth, bool) or growth < 0:
        raise InputError(f"{c.where}: llama_4_scaling_beta of rope_parameters is {growth!r}; expected 0 or more")
    original = said.get("original_max_position_embeddings", sizes["context"])
    check_positive("original_max_position_embeddings", original, c.where)
    found = mistral(c, sizes)
    kind = dataclasses.replace(found.kind, query_growth=(float(growth), float(original)))
    return dataclasses.replace(found, kind=kind)


def _qwen_windows(c: Settings, L: int) -> tuple[int, ...]:
    window = c.window() if c.flag("use_sliding_window") else 0
    types, last = c.layer_types(L), c.get("max_window_layers")
    if types is None:
        if not isinstance(last, int) or last < 0:
            raise c.wrong("max_window_layers", "a number of layers")
        types = [SLIDES if window and index >= last else FULL for index in range(L)]
    if SLIDES in types and not window:
        raise InputError(
            f"{c.where}: layer_types has {SLIDES}, but use_sliding_window and sliding_window say no window"
        )
    return windows_of(types, window, L)


def qwen2(c: Settings, sizes: dict[str, int]) -> Described:
    kind = Kind(biased=("q", "k", "v"), windows=_qwen_windows(c, sizes["L"]), activation=c.activation())
    return described(c, sizes, kind)


def qwen3(c: Settings, sizes: dict[str, int]) -> Described:
    kind = Kind(
        norms=(*LLAMA.norms, *_HEAD_NORMS),
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        windows=_qwen_windows(c, sizes["L"]),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def smollm3(c: Settings, sizes: dict[str, int]) -> Described:
    """Every fourth layer has no rope; layers without it slide where windows are on."""
    L, turns = sizes["L"], c.get("no_rope_layers")
    if turns is None:
        every = c.count("no_rope_layer_interval")
        turns = [int((index + 1) % every != 0) for index in range(L)]
    if not isinstance(turns, list) or len(turns) < L or any(turn not in (0, 1) for turn in turns):
        raise c.wrong("no_rope_layers", f"{L} of 0 and 1")
    window = c.window() if c.flag("use_sliding_window") else 0
    types = c.layer_types(L) or [SLIDES if window and not turn else FULL for turn in turns[:L]]
    if SLIDES in types and not window:
        raise InputError(
            f"{c.where}: layer_types has {SLIDES}, but use_sliding_window and sliding_window say no window"
        )
    kind = Kind(
        biased=ALL_ATTENTION * c.flag("attention_bias") + ALL_FEED_FORWARD * c.flag("mlp_bias"),
        layer_ropes=tuple(OWN_ROPE if turn else NO_ROPE for turn in turns[:L]),
        windows=windows_of(types, window, L),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def olmo2(c: Settings, sizes: dict[str, int]) -> Described:
    biased = ALL_ATTENTION * c.flag("attention_bias")
    return described(c, sizes, Kind(norms=_OLMO_NORMS, qk_norm="whole", biased=biased, activation=c.activation()))


def olmo3(c: Settings, sizes: dict[str, int]) -> Described:
    """OLMo 2 whose layers slide but for every fourth; those that slide have a rope of their own, without scaling."""
    L, context = sizes["L"], sizes["context"]
    types = c.layer_types(L) or [FULL if (index + 1) % 4 == 0 else SLIDES for index in range(L)]
    kind = Kind(
        norms=_OLMO_NORMS,
        qk_norm="whole",
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        activation=c.activation(),
        windows=windows_of(types, c.window(), L),
    )
    theta = c.get("rope_theta")
    if theta != 500000.0 and not c.raw.get("rope_parameters"):
        raise InputError(
            f"{c.where}: rope_theta is {theta!r} without rope_parameters: transformers takes it for full attention and "
            "500000 for windows; write both into rope_parameters (full_attention, sliding_attention)"
        )
    return local_ropes(c, kind, types, context, "", 500000.0)


def granite(c: Settings, sizes: dict[str, int]) -> Described:
    """Llama with four multipliers."""
    kind = Kind(
        biased=ALL_ATTENTION * c.flag("attention_bias") + ALL_FEED_FORWARD * c.flag("mlp_bias"),
        activation=c.activation(),
        embedding_scale=c.positive("embedding_multiplier", 1.0),
        attention_scale=c.positive("attention_multiplier", 1.0),
        residual_scale=c.positive("residual_multiplier", 1.0),
        logit_scale=1 / c.positive("logits_scaling", 1.0),
    )
    return described(c, sizes, kind)


def exaone4(c: Settings, sizes: dict[str, int]) -> Described:
    """OLMo 3 whose norms of queries and keys are of each head. Where windows are on, layers without one do not turn."""
    L, window, every = sizes["L"], c.window(), c.get("sliding_window_pattern")
    types = c.layer_types(L)
    if types is None and (not window or type(every) is not int or every < 1):
        raise InputError(
            f"{c.where}: layer_types is absent, which transformers makes of sliding_window {c.get('sliding_window')!r} "
            f"and sliding_window_pattern {every!r} only where both are positive integers: write layer_types"
        )
    types = types or [SLIDES if (index + 1) % every else FULL for index in range(L)]
    if SLIDES in types and not window:
        raise c.wrong("sliding_window", f"a positive integer, as layer_types has {SLIDES}")
    turns = [not window or kind == SLIDES for kind in types]
    kind = Kind(
        norms=_OLMO_NORMS,
        windows=windows_of(types, window, L),
        layer_ropes=() if all(turns) else tuple(OWN_ROPE if turn else NO_ROPE for turn in turns),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def seed_oss(c: Settings, sizes: dict[str, int]) -> Described:
    biased = ("q", "k", "v") * c.flag("attention_bias") + ("o",) * c.flag("attention_out_bias")
    return described(c, sizes, Kind(biased=biased + ALL_FEED_FORWARD * c.flag("mlp_bias"), activation=c.activation()))


def arcee(c: Settings, sizes: dict[str, int]) -> Described:
    """A feed-forward without a gate."""
    kind = Kind(
        linears=tuple((role, name) for role, name in LLAMA.linears if role != "gate"),
        biased=ALL_ATTENTION * c.flag("attention_bias") + ("up", "down") * c.flag("mlp_bias"),
        activation=c.activation(),
    )
    return described(c, sizes, kind)


def hunyuan(c: Settings, sizes: dict[str, int]) -> Described:
    """Queries and keys are normed once they are turned; `alpha` of a dynamic rope makes theta larger, at any length."""
    whole_heads(c)
    said = dict(c.raw.get("rope_scaling") or c.raw.get("rope_parameters") or {})
    theta, scaling = c.rope(sizes["context"])
    alpha = said.get("alpha")
    if said.get("rope_type", said.get("type")) == "dynamic" and alpha:
        check_positive("alpha", alpha, c.where)
        if sizes["H"] < 4:
            raise InputError(f"{c.where}: rope scaling by alpha needs heads of 4 values or more, not {sizes['H']}")
        theta, scaling = theta * alpha ** (sizes["H"] / (sizes["H"] - 2)), ()
    kind = Kind(
        norms=(*LLAMA.norms, *names(q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm")),
        turned_first=True,
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        activation=c.activation(),
    )
    return Described(kind, (theta, scaling))


def phi3(c: Settings, sizes: dict[str, int]) -> Described:
    """Llama whose projections of one input are one matrix."""
    share = c.share("partial_rotary_factor", default=1.0)
    kind = Kind(
        linears=names(qkv="self_attn.qkv_proj", o="self_attn.o_proj", gate_up="mlp.gate_up_proj", down="mlp.down_proj"),
        windows=windows_of(None, c.window(), sizes["L"], all_layers=True),
        rotary_width=int(sizes["H"] * share),
        activation=c.activation(),
    )
    return Described(kind, c.rope(sizes["context"]))


_QWEN = {"max_window_layers": 28, "sliding_window": 4096, "rms_norm_eps": 1e-6}
FAMILIES = {
    "LlamaForCausalLM": Family(llama, {"rms_norm_eps": 1e-6}),
    "MistralForCausalLM": Family(mistral, {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096}),
    "MinistralForCausalLM": Family(ministral, {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096}),
    "Ministral3ForCausalLM": Family(
        ministral3,
        {
            "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
            "reads_llama_4_scaling": True,
        },
    ),
    "Qwen2ForCausalLM": Family(qwen2, _QWEN | {"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Family(qwen3, _QWEN | {"num_key_value_heads": 32, "head_dim": 128}),
    "SmolLM3ForCausalLM": Family(
        smollm3,
        {
            "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
            "rope_theta": 2000000.0,
        },
    ),
    "Olmo2ForCausalLM": Family(olmo2, {"rms_norm_eps": 1e-5}),
    "Olmo3ForCausalLM": Family(olmo3, {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0}),
    "Exaone4ForCausalLM": Family(
        exaone4,
        {
            "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4,
            "eos_token_id": 2, "bos_token_id": 0,
        },
    ),
    "GraniteForCausalLM": Family(granite, {"rms_norm_eps": 1e-6}),
    "SeedOssForCausalLM": Family(
        seed_oss,
        {
            "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
            "eos_token_id": 2, "bos_token_id": 0, "max_position_embeddings": 524288,
        },
    ),
    "ArceeForCausalLM": Family(
        arcee,
        {
            "rms_norm_eps": 1e-5, "hidden_act": "relu2", "eos_token_id": 128001, "bos_token_id": 128000,
            "max_position_embeddings": 4096,
        },
    ),
    "HunYuanDenseV1ForCausalLM": Family(hunyuan, {"rms_norm_eps": 1e-5, "eos_token_id": 2, "bos_token_id": 1}),
    "Phi3ForCausalLM": Family(
        phi3,
        {
            "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096,
            "rope_names": {"su": "longrope", "yarn": "longrope"},
        },
    ),
}  # fmt: skip
