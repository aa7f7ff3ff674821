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
}
PART = "text_config"
_OF_ALL = ("architectures", "eos_token_id", "bos_token_id", "tie_word_embeddings", "transformers_weights")
# What transformers 5 calls the parts; files say language_model first, as transformers 4 had it, and as 5 still writes.
_MODEL, _OLD_MODEL, _OLD_HEAD = "model.language_model.", "language_model.model.", "language_model.lm_head."
ENCODER = ("vision_tower", "multi_modal_projector")


def decoder_of(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """config.json of a model of DECODERS -> the architecture of its decoder, and what that one's config.json would say.

    What stands outside of the part counts first: there transformers looks for ties and for the tokens that end an
    answer. Raises InputError where the part is missing or of another type.
    """
    name = raw["architectures"][0]
    part = raw.get(PART)
    if not isinstance(part, dict):
        raise InputError(f"{where}: {PART} is {part!r}; expected the settings of {name}'s decoder")
    known = DECODERS[name]
    kind = part.get("model_type", next(iter(known)))
    if kind not in known:
        raise InputError(f"{where}: {PART} has model_type {kind!r}; decoders of {name} are {', '.join(known)}")
    outer = {key: raw[key] for key in _OF_ALL if raw.get(key) is not None}
    return known[kind], {**part, "tie_word_embeddings": True, **outer}


def beside_an_encoder(kind: Kind) -> Kind:
    """A decoder's kind, under the names that it has in the whole model."""
    begins = (*(f"{name}." for name in ENCODER), *(f"model.{name}." for name in ENCODER))
    return dataclasses.replace(
        kind,
        layer=kind.layer.replace("model.", _MODEL, 1),
        embedding=kind.embedding.replace("model.", _MODEL, 1),
        final_norm=kind.final_norm.replace("model.", _MODEL, 1),
        renamed=(*kind.renamed, (_OLD_MODEL, _MODEL), (_OLD_HEAD, f"{kind.head}.")),
        beside=begins,
    )


def with_part(raw: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values of the decoder's keys, wherever they stand."""
    if raw.get("architectures", [""])[0] not in DECODERS:
        return {**raw, **changed}
    outer = {key: value for key, value in changed.items() if key in _OF_ALL or key in raw}
    return {**raw, **outer, PART: {**raw[PART], **changed}}
