"""Runs of an encoder-decoder: what it is not trained with, and how wide its rows are."""

from collections.abc import Iterable
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.feed.load import LoadedData
from qlora_jax.mesh.axes import Axes
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.mixtures.across import check_experts

REMATS = ("block", "none")


def check_kind(config: Any, sizes: ModelConfig) -> None:
    """Raises InputError where a config asks for what a model of this kind does not have."""
    axes = Axes.of(config.get("mesh"))
    check_experts(axes, sizes)
    if axes.fsdp * axes.tensor * axes.sequence > 1 and (sizes.kind.pair or sizes.kind.bidirectional):
        raise InputError(
            f"the mesh ({axes}) divides the model's arrays or a row's tokens, which encoders and T5 do not have here: "
            f"divide rows alone by {axes.all_rows()}"
        )
    if sizes.kind.pair is None:
        return
    model, data, lora = config.model, config.data, config.lora
    matrices = set(lora.modules_to_save) - {"auto"} or data.added_tokens or data.added_special_tokens
    refused = (  # a forecast of a grid has no data.train_on_source
        (model.remat not in (*REMATS, "auto"), "model.remat", "has block and none alone", "model.remat=block"),
        (model.attention not in ("auto", "xla"), "model.attention", "has a bias of scores", "model.attention=auto"),
        (model.sequence_chunk, "model.sequence_chunk", "sees a prompt whole", "model.sequence_chunk=0"),
        (data.packing, "data.packing", "has one example a row", "data.packing=False"),
        (data.batches, "data.batches", "must know where a prompt ends", "data.path"),
        (data.get("train_on_source"), "data.train_on_source", "predicts no prompt", "data.train_on_source=False"),
        (data.template == "chat", "data.template", "has no form for chats", "data.template=paper"),
        (matrices, "lora.modules_to_save or data.added_tokens", "trains adapters alone", "lora.modules_to_save=()"),
        (config.eval.mmlu_data, "eval.mmlu_data", "answers no MMLU here", "eval.mmlu_data=''"),
    )  # fmt: skip
    for is_wrong, key, reason, mend in refused:
        if is_wrong:
            section, _, name = key.partition(" ")[0].partition(".")
            raise InputError(
                f"{key} is {config[section][name]!r}, but an encoder-decoder (T5) {reason} here: set {mend}"
            )


def check_data(data: LoadedData, sizes: ModelConfig) -> None:
    """Raises InputError for rows that a model of this kind cannot take."""
    chats = [source["path"] for source in data.sources if source["chat"]]
    if sizes.kind.pair and chats:
        raise InputError(
            f"{chats[0]} is read as chats in the tokenizer's template, whose rows have several answers, but an "
            "encoder-decoder (T5) writes one: set data.template=paper"
        )


def row_limits(sizes: ModelConfig, data: Iterable[Any]) -> dict[str, int]:
    """Tokens of a prompt and of an answer at most, as ModelSpec and EncoderDecoder have them; {} for a decoder.

    `data`: `data` sections whose rows go through one program. 0 is the row's own width.
    """
    if sizes.kind.pair is None:
        return {}
    sections = list(data)
    lengths = {
        "source_len": [section.max_source_len for section in sections],
        "target_len": [section.max_target_len for section in sections],
    }
    return {name: max(found) if all(found) else 0 for name, found in lengths.items()}


def limit_rows(model: Any, limits: dict[str, int]) -> None:
    """Sets what `row_limits` gives."""
    for name, value in limits.items():
        setattr(model, name, value)
