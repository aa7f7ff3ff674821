"""Gemma: norms times 1 + w, a scaled embedding; from 2 on norms on both sides, windows and soft caps."""

import dataclasses
import math

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import FULL, SLIDES, Described, Family, local_ropes, whole_heads, windows_of
from qlora_jax.models.families.llamas import ALL_ATTENTION
from qlora_jax.models.kind import Kind, names
from qlora_jax.models.settings import Settings

_BOTH_SIDES = names(
    attention_in="input_layernorm", attention_out="post_attention_layernorm",
    feed_forward_in="pre_feedforward_layernorm", feed_forward_out="post_feedforward_layernorm",
)  # fmt: skip


def _common(c: Settings, sizes: dict[str, int], key: str) -> Kind:
    c.only("use_bidirectional_attention", None, False, why="tokens would see what follows")
    return Kind(
        norm="rms+1",
        biased=ALL_ATTENTION * c.flag("attention_bias"),
        activation=c.activation(key),
        embedding_scale=math.sqrt(sizes["D"]),
    )


def gemma(c: Settings, sizes: dict[str, int]) -> Described:
    if c.raw.get("hidden_activation") not in (None, "gelu_pytorch_tanh"):
        raise c.wrong("hidden_activation", "gelu_pytorch_tanh, or no such key")
    kind = _common(c, sizes, "hidden_act")
    if kind.activation == "gelu":  # what Gemma's first files say and never meant, as transformers reads them
        kind = dataclasses.replace(kind, activation="gelu_pytorch_tanh")
    whole_heads(c)
    return Described(kind, c.rope(sizes["context"]))


def _second(c: Settings, sizes: dict[str, int], types: list[str]) -> Kind:
    """What Gemma 2 and 3 have in common."""
    return dataclasses.replace(
        _common(c, sizes, "hidden_activation"),
        norms=_BOTH_SIDES,
        attention_scale=c.positive("query_pre_attn_scalar", 256) ** -0.5,
        windows=windows_of(types, c.window(), sizes["L"]),
        logit_softcap=c.cap("final_logit_softcapping"),
    )


def gemma2(c: Settings, sizes: dict[str, int]) -> Described:
    """Every second layer slides; scores and logits have soft caps."""
    types = c.layer_types(sizes["L"]) or [FULL if index % 2 else SLIDES for index in range(sizes["L"])]
    kind = dataclasses.replace(_second(c, sizes, types), softcap=c.cap("attn_logit_softcapping"))
    whole_heads(c)
    return Described(kind, c.rope(sizes["context"]))


def gemma3(c: Settings, sizes: dict[str, int]) -> Described:
    """Five layers that slide, with a rope of their own, for each that sees all; queries and keys are normed."""
    L, every = sizes["L"], c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    types = c.layer_types(L)
    if types is None and (not isinstance(every, int) or every < 1):
        raise c.wrong("sliding_window_pattern", "a positive integer")
    types = types or [SLIDES if (index + 1) % every else FULL for index in range(L)]
    if c.get("attn_logit_softcapping") is not None:
        raise InputError(
            f"{c.where}: attn_logit_softcapping is {c.get('attn_logit_softcapping')!r}, which no Gemma 3 has and which "
            "transformers reads and leaves out: remove it"
        )
    kind = dataclasses.replace(
        _second(c, sizes, types),
        norms=(*names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"), *_BOTH_SIDES),
    )
    return local_ropes(c, kind, types, sizes["context"], "rope_local_base_freq", 10000.0)


_TANH = "gelu_pytorch_tanh"
_DEFAULTS = {"rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True, "hidden_activation": _TANH}
_SECOND = _DEFAULTS | {"num_key_value_heads": 4, "sliding_window": 4096}
_THIRD = _SECOND | {
    "rope_theta": 1000000.0, "vocab_size": 262208, "num_attention_heads": 8, "max_position_embeddings": 131072,
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
}  # fmt: skip
FAMILIES = {
    "GemmaForCausalLM": Family(gemma, _DEFAULTS | {"num_key_value_heads": 16, "hidden_act": _TANH}),
    "Gemma2ForCausalLM": Family(gemma2, _SECOND | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    "Gemma3ForCausalLM": Family(gemma3, _THIRD),
}
