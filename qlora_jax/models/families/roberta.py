"""Encoders: RoBERTa, as it was trained on masked words, bare, or with a head over classes."""

from qlora_jax.errors import InputError
from qlora_jax.models.families.description import KEYS, Described, Family
from qlora_jax.models.kind import Bidirectional, Kind, names
from qlora_jax.models.settings import Settings

WITH_HEAD = "RobertaForSequenceClassification"
_LINEARS = names(
    q="attention.self.query", k="attention.self.key", v="attention.self.value", o="attention.output.dense",
    up="intermediate.dense", down="output.dense",
)  # fmt: skip
# of the model of masked words, and of one that no head here reads
_OF_OTHER_HEADS = tuple(
    f"lm_head.{name}"
    for name in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "decoder.weight",
                 "decoder.bias")
)  # fmt: skip


def roberta(c: Settings, sizes: dict[str, int]) -> Described:
    """Norms after each addition; positions are counted from the row after the pad token's, over tokens that are none.

    Its head for masked words and its pooler are not read: nothing that is made here uses them.
    """
    c.only("is_decoder", False, None, why="a RoBERTa that writes text is not computed")
    c.only("add_cross_attention", False, None, why="attention to another encoder is not computed")
    c.only("position_embedding_type", "absolute", why="positions that are relative are not computed")
    pad_id = c.get("pad_token_id")
    if not isinstance(pad_id, int) or not 0 <= pad_id < sizes["V"]:
        raise c.wrong("pad_token_id", f"a token's id, 0 to {sizes['V'] - 1}")
    room = sizes["context"] - pad_id - 1
    if room < 1:
        raise InputError(f"{c.where}: max_position_embeddings {sizes['context']} leaves no place after the pad token's")
    kind = Kind(
        layer="roberta.encoder.layer.{}",
        embedding="roberta.embeddings.word_embeddings",
        positions="roberta.embeddings.position_embeddings",
        position_offset=pad_id + 1,
        embedding_norm="roberta.embeddings.LayerNorm",
        final_norm="",
        linears=_LINEARS,
        norms=names(attention_end="attention.output.LayerNorm", feed_forward_end="output.LayerNorm"),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias",
                 *_OF_OTHER_HEADS),
        optional_prefix="roberta.",
        norm="layer",
        norm_bias=True,
        biased=tuple(role for role, _ in _LINEARS),
        rotary="",
        activation=c.activation(),
        bidirectional=Bidirectional(
            pad_id=pad_id,
            token_types="roberta.embeddings.token_type_embeddings",
            types=c.count("type_vocab_size"),
            init_std=float(c.positive("initializer_range")),
            labels=_labels(c),
        ),
    )  # fmt: skip
    return Described(kind, sizes={"K": sizes["N"], "context": room})


def _labels(c: Settings) -> int:
    """Classes of the head that the checkpoint has, 0 where it has none."""
    if (c.raw.get("architectures") or [""])[0] != WITH_HEAD:
        return 0
    c.only("problem_type", None, "regression", "single_label_classification", why="several labels at once are not read")
    named = c.raw.get("id2label")
    count = len(named) if isinstance(named, dict) and named else c.count("num_labels")
    if (c.get("problem_type") == "regression") != (count == 1) and c.get("problem_type") is not None:
        raise InputError(f"{c.where}: problem_type is {c.get('problem_type')!r} and there are {count} labels")
    return count


_FAMILY = Family(
    roberta,
    {
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True, "pad_token_id": 1,
        "type_vocab_size": 2, "initializer_range": 0.02, "num_labels": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 2, "position_embedding_type": "absolute",
    },
    keys=KEYS | {"K": ("num_attention_heads",)},
    eps="layer_norm_eps",
    has_head_dim=False,
)  # fmt: skip
FAMILIES = {name: _FAMILY for name in ("RobertaForMaskedLM", "RobertaModel", WITH_HEAD)}
