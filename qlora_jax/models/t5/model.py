"""The encoder-decoder: embedding, two stacks of layers, each one scan, and the head.

It has a Decoder's attributes where adapters, files and checkpoints look for them. What trains it is
`predicted`: a row of a batch is a prompt and its answer, which go to the two stacks. A call is a step of generation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.dropout import Dropout, DropoutKey
from qlora_jax.models.head import Head, head_logits
from qlora_jax.models.layers import Frozen, Group, Linear, Norm, part_of, place
from qlora_jax.models.t5.positions import bias_of
from qlora_jax.models.t5.rows import split_rows
from qlora_jax.models.t5.stacks import Cached, decoder_layer, decoder_step, encoder_layer, keys_of


class PairCache(NamedTuple):
    """What generation keeps. layers: with a leading L. seen: bool [B, S], tokens of the prompts."""

    layers: Cached
    seen: jax.Array


class EncoderDecoder(nnx.Module):
    """Encoder and decoder over stacked layers.

    Args:
      config: sizes, with a kind whose `pair` is not None.
      weights: those of config.outer; "layers": name -> stacked array, names as in config.linears (QuantizedTensor or
        [L, O, I]) and config.vectors, L being the layers of the part's stack.
      compute_dtype: of activations and matmuls.
      remat: "block" keeps one activation a layer and computes the rest again in the backward pass, "none" keeps all.
      attention, sequence_chunk: as a Decoder has them; "xla" and 0 is what there is here (train/kinds/pair).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        compute_dtype: Any,
        remat: str = "block",
        attention: str = "auto",
        sequence_chunk: int = 0,
    ):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat, self.attention, self.sequence_chunk = remat, attention, sequence_chunk
        self.shards = None  # of a mesh: as Decoder's
        self.dropout_rate: Any = 0.0  # a number, or a DropoutRate of the program's inputs
        self.router_aux_loss_coef = 0.0  # no routers: it stays
        self.residual = ""  # as Decoder's
        self.source_len = self.target_len = 0  # tokens of a row's prompt and answer at most; 0: of the row
        self.embedding = Frozen(weights["embedding"])
        self.blocks = Group()
        for name in config.linears:
            place(self.blocks, name, Linear(weights["layers"][name]))
        for name in config.vectors:
            place(self.blocks, name, Norm(weights["layers"][name], config.norm_eps))
        self.encoder_distances, self.decoder_distances = (
            Frozen(weights[f"{stack}_distances"]) for stack in ("encoder", "decoder")
        )
        self.encoder_norm = Norm(weights["encoder_norm"], config.norm_eps)
        self.norm = Norm(weights["norm"], config.norm_eps)
        self.head = nnx.data(None if config.tied else Frozen(weights["head"]))

    def predicted(
        self, tokens: jax.Array, loss_mask: jax.Array, dropout_key: jax.Array | DropoutKey | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the decoder says of a batch's answers, in the form of a decoder's rows (train/loss).

        Args:
          tokens: int32 [B, T], prompt and answer of each row. loss_mask: bool [B, T], True where a token is learned.
          dropout_key: of LoRA dropout; None is no dropout. A DropoutKey says which rows of a step's batch these are.
        Returns:
          Final hidden states [B, U + 1, D], and start token and answer int32 [B, U + 1] with the mask of what is
          learned, bool [B, U + 1]: place t is predicted from t - 1, and the last hidden state from nothing.
        """
        assert self.config.kind.pair is not None
        rows = split_rows(tokens, loss_mask, self.config.kind.pair, self.source_len, self.target_len)
        encoded = self.encode(rows.source, rows.seen, dropout_key)
        hidden = self.decode(rows.inputs, encoded, rows.seen, dropout_key)
        start = rows.inputs[:, :1]
        return (
            jnp.pad(hidden, ((0, 0), (0, 1), (0, 0))),
            jnp.concatenate([start, rows.labels], axis=1),
            jnp.concatenate([jnp.zeros_like(start, bool), rows.counted], axis=1),
        )

    def encode(
        self, source: jax.Array, seen: jax.Array, dropout_key: jax.Array | DropoutKey | None = None
    ) -> jax.Array:
        """source int32 [B, S], seen bool [B, S] (False: padding, which no token attends to) -> [B, S, D]."""
        places = jnp.arange(source.shape[1])
        bias = self._bias(self.encoder_distances, places[None], places, both_ways=True)
        apply = lambda layer, x, dropout: encoder_layer(self.config, layer, x, bias, seen, dropout)  # noqa: E731
        return self.encoder_norm(self._through("encoder", apply, self._embed(source), dropout_key, 0))

    def decode(
        self,
        inputs: jax.Array,
        encoded: jax.Array,
        seen: jax.Array,
        dropout_key: jax.Array | DropoutKey | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D] of inputs int32 [B, T], given `encode`'s [B, S, D] and its `seen`."""
        places = jnp.arange(inputs.shape[1])
        bias = self._bias(self.decoder_distances, places[None], places, both_ways=False)
        apply = lambda layer, y, dropout: decoder_layer(  # noqa: E731
            self.config, layer, y, encoded, bias, seen, dropout
        )
        assert self.config.kind.pair is not None
        first = self.config.kind.pair.encoder_layers
        return self.norm(self._through("decoder", apply, self._embed(inputs), dropout_key, first))

    def new_cache(self, encoded: jax.Array, seen: jax.Array, room: int) -> PairCache:
        """Room for `room` tokens of the decoder, and keys and values of `encode`'s [B, S, D]."""
        graph, state = nnx.split(part_of(self.blocks, "decoder"))

        def of_layer(_, state):
            attention = part_of(nnx.merge(graph, state), "layer.1").EncDecAttention
            return None, keys_of(self.config, attention, "kv", encoded, Dropout(0.0, None))

        _, (k, v) = jax.lax.scan(of_layer, None, state)
        L, B, _, *heads = k.shape
        empty = jnp.zeros((L, B, room, *heads), k.dtype)
        return PairCache(Cached(empty, empty, k, v), seen)

    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: PairCache) -> tuple[jax.Array, PairCache]:
        """The decoder's step in generation.

        Args:
          tokens: int32 [B, 1]. positions: int32 [B, 1], which are written.
          cache: of `new_cache`, and of earlier steps.
        Returns:
          final hidden states [B, 1, D], and the cache with these tokens.
        """
        layers, seen = cache
        keys = jnp.arange(layers.k.shape[2])
        bias = self._bias(self.decoder_distances, positions, keys, both_ways=False)
        graph, state = nnx.split(part_of(self.blocks, "decoder"))

        def step(y, inputs):
            state, cached = inputs
            y, k, v = decoder_step(self.config, nnx.merge(graph, state), y, cached, positions[:, 0], bias, seen)
            return y, (k, v)

        y, (k, v) = jax.lax.scan(step, self._embed(tokens), (state, layers))
        return self.norm(y), PairCache(layers._replace(k=k, v=v), seen)

    def head_weight(self) -> jax.Array | Head:
        """What summed losses take: the head [V, D], with the scale of a tied T5's."""
        matrix = self.embedding if self.head is None else self.head
        scale = self.config.kind.logit_scale
        return matrix.get_value() if scale == 1 else Head(matrix.get_value(), scale=scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]."""
        return head_logits(hidden, self.head_weight())

    def outer(self, slot: str) -> jax.Array:
        """A weight of config.outer."""
        found = getattr(self, slot)
        return (found.weight if isinstance(found, Norm) else found).get_value()

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.get_value()[tokens].astype(self.compute_dtype)

    def _bias(self, table: Frozen, queries: jax.Array, keys: jax.Array, both_ways: bool) -> jax.Array:
        pair = self.config.kind.pair
        assert pair is not None
        return bias_of(table.get_value(), queries, keys, pair.buckets, pair.max_distance, both_ways)

    def _through(
        self,
        stack: str,
        apply: Callable[[Any, jax.Array, Dropout], jax.Array],
        x: jax.Array,
        dropout_key: jax.Array | DropoutKey | None,
        first: int,
    ) -> jax.Array:
        """x through all layers of a stack, whose first one has the number `first` where dropout is drawn."""
        graph, *state = nnx.split(part_of(self.blocks, stack), nnx.LoRAParam, ...)
        key = None if dropout_key is None else DropoutKey.of(dropout_key)

        def step(x, inputs):
            state, number = inputs
            dropout = Dropout(self.dropout_rate, None if key is None else key.of_layer(number))
            return apply(nnx.merge(graph, *state), x, dropout), None

        if self.remat != "none":
            step = jax.checkpoint(step, prevent_cse=False)  # a scan's body is not merged with its forward
        assert self.config.kind.pair is not None
        numbers = first + jnp.arange(self.config.kind.pair.depth(f"{stack}."))
        return jax.lax.scan(step, x, (state, numbers))[0]
