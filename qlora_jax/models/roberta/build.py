"""The module of a model's kind."""

from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.roberta.encoder import Encoder


def build(config: ModelConfig, weights: dict[str, Any], compute_dtype: Any, *args: Any) -> Decoder:
    """A Decoder, or the Encoder that a bidirectional kind is; arguments as theirs."""
    make = Encoder if config.kind.bidirectional else Decoder
    return make(config, weights, compute_dtype, *args)
