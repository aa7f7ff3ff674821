"""The model of its config and its weights, whichever kind it is."""

from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.roberta.encoder import Encoder
from qlora_jax.models.t5.model import EncoderDecoder


def assembled(config: ModelConfig, weights: dict[str, Any], *settings: Any) -> Any:
    """A Decoder, or what its config says it is instead; `settings`: what follows in their arguments."""
    if config.kind.pair:
        return EncoderDecoder(config, weights, *settings)
    return (Encoder if config.kind.bidirectional else Decoder)(config, weights, *settings)
