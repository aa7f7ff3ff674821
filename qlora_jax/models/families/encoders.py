"""Models with an encoder of images beside their decoder: of these the decoder is read, which answers text.

Its settings stand in a part of config.json of their own, and its names are those of the whole model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.models.kind import Kind

# Architecture -> type of its decoder (text_config's model_type) -> the family that this type is of; the first is taken
# where none is said
DECODERS: dict[str, dict[str, str]] = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Qwen2VLForConditionalGeneration": {"qwen2_vl_text": "Qwen2ForCausalLM"},
    "Qwen2_5_VLForConditionalGeneration": {"qwen2_5_vl_text": "Qwen2ForCausalLM"},
    "Qwen3VLForConditionalGeneration": {"qwen3_vl_text": "Qwen3ForCausalLM"},
}
# Architecture -> what transformers takes for absent keys where that is not what it takes for the decoder alone.
_QWEN2_VL = {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 8, "max_window_layers": 80}
_ABSENT: dict[str, dict[str, Any]] = {
    "Gemma3ForConditionalGeneration": {"tie_word_embeddings": True},
    "Mistral3ForConditionalGeneration": {"tie_word_embeddings": True},
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "Qwen3VLForConditionalGeneration": {"rope_theta": 500000.0, "max_position_embeddings": 128000},
}
_FLAT = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")  # on the hub without a part
PART = "text_config"
_OF_ALL = ("architectures", "eos_token_id", "bos_token_id", "tie_word_embeddings", "transformers_weights")
# What transformers 5 calls the parts; files say language_model first, as transformers 4 had it, and as 5 still writes.
_MODEL, _OLD_MODEL, _OLD_HEAD = "model.language_model.", "language_model.model.", "language_model.lm_head."
# with a digit: stacks of our own form are called model.layers.NAME in every family
_QWENS = ("embed_tokens.", "norm.", *(f"layers.{digit}" for digit in range(10)))
_OLD_QWEN = tuple((f"model.{part}", f"{_MODEL}{part}") for part in _QWENS)
ENCODER = ("vision_tower", "multi_modal_projector", "visual")


def decoder_of(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """config.json of a model of DECODERS -> the architecture of its decoder, and what that one's config.json would say.

    What stands outside of the part counts first: there transformers looks for ties and for the tokens that end an
    answer. Raises InputError where the part is missing or of another type.
    """
    name = raw["architectures"][0]
    part = raw.get(PART)
    if part is None and name in _FLAT:
        part = {key: value for key, value in raw.items() if key != "model_type"}
    if not isinstance(part, dict):
        raise InputError(f"{where}: {PART} is {part!r}; expected the settings of {name}'s decoder")
    known = DECODERS[name]
    kind = part.get("model_type", next(iter(known)))
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{where}: {PART} has model_type {kind!r}; decoders of {name} are {', '.join(known)}")
    outer = {key: raw[key] for key in _OF_ALL if raw.get(key) is not None}
    if name.startswith("Qwen"):  # either place ties; the family's rope has thirds for images, which are one in text
        outer["tie_word_embeddings"] = raw.get("tie_word_embeddings") is True or part.get("tie_word_embeddings") is True
        part = {**part, **{key: _plain(part[key]) for key in ("rope_scaling", "rope_parameters") if part.get(key)}}
    ties = _ABSENT[name].get("tie_word_embeddings")
    part = {**_ABSENT[name], **part, **({} if ties is None else {"tie_word_embeddings": ties})}
    return known[kind], {**part, **outer}


def _plain(rope: Any) -> Any:
    """A rope whose pairs are shared out among a token's time, row and column: in a text all three are its place."""
    if not isinstance(rope, dict) or "mrope" not in (rope.get("type"), rope.get("rope_type")):
        return rope
    return {key: value for key, value in rope.items() if key != "type"} | {"rope_type": "default"}


def beside_an_encoder(kind: Kind, name: str) -> Kind:
    """A decoder's kind, under the names that it has in the whole model, whose architecture is `name`."""
    old = _OLD_QWEN if name in _FLAT else ((_OLD_MODEL, _MODEL), (_OLD_HEAD, f"{kind.head}."))
    begins = (*(f"{name}." for name in ENCODER), *(f"model.{name}." for name in ENCODER))
    return dataclasses.replace(
        kind,
        layer=kind.layer.replace("model.", _MODEL, 1),
        embedding=kind.embedding.replace("model.", _MODEL, 1),
        final_norm=kind.final_norm.replace("model.", _MODEL, 1),
        renamed=(*kind.renamed, *old),
        beside=begins,
    )


def with_part(raw: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values of the decoder's keys, wherever they stand."""
    if raw.get("architectures", [""])[0] not in DECODERS or PART not in raw:
        return {**raw, **changed}
    outer = {key: value for key, value in changed.items() if key in _OF_ALL or key in raw}
    return {**raw, **outer, PART: {**raw[PART], **changed}}
