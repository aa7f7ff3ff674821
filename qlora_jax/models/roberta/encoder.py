"""The encoder: the decoder's stacked layers in one scan, where each token sees all of its row, and a head over them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.models.block import Cache, Context
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.models.kind import Bidirectional
from qlora_jax.models.layers import Frozen
from qlora_jax.models.roberta.head import Head, losses
from qlora_jax.models.roberta.row import REGRESSION, taken_apart


class Encoder(Decoder):
    """An encoder over stacked blocks; see Decoder for what is not said here.

    weights: besides a Decoder's "token_types" [types, D], and the arrays of a head (names.head_shapes) where the
    checkpoint has one. `classifier` is None without a head: lora.attach gives one that trains.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Any], *settings: Any):
        super().__init__(config, weights, *settings)
        self.token_types = Frozen(weights["token_types"])
        self.classifier: Any = nnx.data(None)
        if self.bidirectional.labels:
            self.set_head({name: weights[f"{self.bidirectional.head}.{name}"] for name in _PARTS}, trains=False)

    @property
    def bidirectional(self) -> Bidirectional:
        kind = self.config.kind.bidirectional
        assert kind is not None
        return kind

    def set_head(self, arrays: dict[str, Any], trains: bool) -> None:
        """Arrays as Head takes them, with whatever axis of members in front."""
        self.classifier = Head(arrays, trains)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        dropout_key: jax.Array | DropoutKey | None = None,
        segments: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Final hidden states [B, T, D] of tokens int32 [B, T], and None.

        lengths: int32 [B], tokens of each row; what stands after them is seen by none. None: T, or in a row that ends
        with pad tokens those before. The other arguments are a decoder's: only the dropout's key may be given.
        """
        if positions is not None or cache is not None or segments is not None:
            raise ValueError("an encoder counts positions itself, keeps no cache and takes no packed rows")
        pad_id, T = self.bidirectional.pad_id, tokens.shape[1]
        places = jnp.arange(T, dtype=jnp.int32)
        if lengths is None:
            lengths = jnp.max(jnp.where(tokens != pad_id, places + 1, 0), axis=1)
        within = places < lengths[:, None]
        counted = within & (tokens != pad_id)
        positions = jnp.where(counted, jnp.cumsum(counted, axis=1) - 1, -1)  # -1: the row of the pad token
        context = Context(positions, None, "xla", seen=within[:, None, :])
        block, *state = self.layers(nnx.LoRAParam, ...)
        apply_layer = partial(self.apply_layer, block, context, dropout_key)

        def step(x, inputs):
            state, layer = inputs
            return apply_layer(tuple(state), x, layer)[0], None

        if self.remat != "none":
            step = jax.checkpoint(step, prevent_cse=False)
        x = self.embed(jnp.where(within, tokens, pad_id), positions)
        return jax.lax.scan(step, x, (state, jnp.arange(self.config.L)))[0], None

    def enter(self, rows: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """As a decoder's, with the first token type added to each row."""
        return super().enter(rows.astype(self.compute_dtype) + self.token_types.get_value()[0], positions)

    def classes(
        self, tokens: jax.Array, lengths: jax.Array | None, dropout_key: jax.Array | DropoutKey | None = None
    ) -> jax.Array:
        """float32 [B, labels]: the head's logits, or its number, of tokens and lengths as of a call."""
        if self.classifier is None:
            head = self.bidirectional.head
            raise InputError(f"this model has no head over classes ({head}): give an adapter that has one")
        return self.classifier(self(tokens, dropout_key=dropout_key, lengths=lengths)[0][:, 0])

    def loss(
        self,
        tokens: jax.Array,
        loss_mask: jax.Array,
        dropout_key: jax.Array | DropoutKey | None = None,
        segments: jax.Array | None = None,
        chunk: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """(summed loss float32 [], rows with a label float32 []) of a batch as row.py has it. `chunk`: unused."""
        if segments is not None:
            raise ValueError("an encoder takes no packed rows")
        rows = taken_apart(tokens, loss_mask)
        found = losses(self.classes(tokens, rows.lengths, dropout_key), rows.labels)
        return jnp.sum(jnp.where(rows.lengths > 0, found, 0)), rows.labelled

    def loss_and_hits(
        self, tokens: jax.Array, loss_mask: jax.Array, chunk: int = 0
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `loss`, with the rows whose likeliest class is their label between the two; none of a number."""
        rows = taken_apart(tokens, loss_mask)
        logits, labelled = self.classes(tokens, rows.lengths), rows.lengths > 0
        hit = (jnp.argmax(logits, axis=1) == rows.labels) & labelled & (logits.shape[1] != REGRESSION)
        total = jnp.sum(jnp.where(labelled, losses(logits, rows.labels), 0))
        return total, jnp.sum(hit).astype(jnp.float32), rows.labelled

    def outer(self, slot: str) -> jax.Array:
        """See Decoder."""
        part, _, name = slot.partition(".")
        if part != self.bidirectional.head:
            return super().outer(slot)
        group, _, which = name.partition(".")
        return getattr(getattr(self.classifier, group), which).get_value()

    def head_weight(self) -> Any:
        raise InputError(TEXTLESS)

    def new_cache(self, B: int, S: int) -> Cache:
        raise InputError(TEXTLESS)


def check_kind(config: ModelConfig, encoder: bool) -> None:
    """Raises InputError where a decoder is asked for and the model is an encoder, or with `encoder` the other way."""
    if config.kind.bidirectional and not encoder:
        raise InputError(TEXTLESS)
    if encoder and not config.kind.bidirectional:
        raise InputError("this model is a decoder, and an encoder with a head over classes (RoBERTa) is asked for")


TEXTLESS = (
    "this model is an encoder (RoBERTa): it classifies rows, and neither writes nor scores text; train it on rows with "
    "labels (data.format=glue) and measure it by evaluate --task=glue"
)
_PARTS = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
