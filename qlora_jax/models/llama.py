"""The Llama family (1, 2, 3): pre-norm blocks of grouped-query attention and a gated feed-forward, scanned."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.models.attention import attend_chunk, causal_attention, segment_starts
from qlora_jax.models.chunks import chunk_size, layer_in_chunks
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.dropout import Dropout, DropoutKey, DropoutRate
from qlora_jax.models.layers import (
    Frozen,
    Linear,
    RMSNorm,
    gradient_after,
    in_order,
    rope_inverse_frequencies,
    rotate,
)

# Place in a layer, as Hugging Face names it -> shape in ModelConfig's letters. Linear layers are quantized.
LINEARS = {
    "self_attn.q_proj": ("NH", "D"),
    "self_attn.k_proj": ("KH", "D"),
    "self_attn.v_proj": ("KH", "D"),
    "self_attn.o_proj": ("D", "NH"),
    "mlp.gate_proj": ("F", "D"),
    "mlp.up_proj": ("F", "D"),
    "mlp.down_proj": ("D", "F"),
}
NORMS = {"input_layernorm": ("D",), "post_attention_layernorm": ("D",)}
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}.{}.weight"


def sizes(config: ModelConfig, letters: tuple[str, ...]) -> tuple[int, ...]:
    """("NH", "D") -> (N * H, D)."""
    values = {"D": config.D, "F": config.F, "V": config.V, "NH": config.N * config.H, "KH": config.K * config.H}
    return tuple(values[letter] for letter in letters)


REMAT = ("none", "selective", "block", "block+offload")


class Cache(NamedTuple):
    """Keys and values seen so far: [L, B, S, K, H] each, in the compute dtype. S is the room, not the number filled."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: jax.Array  # int32 [B, T]
    inverse_frequencies: jax.Array  # float32 [H / 2]
    implementation: str  # of attention: one of attention.IMPLEMENTATIONS
    starts: jax.Array | None = None  # int32 [B, T], the first place each token sees; None: all see the row's first


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, weights: dict[str, Any]):
        self.q_proj = Linear(weights["self_attn.q_proj"])
        self.k_proj = Linear(weights["self_attn.k_proj"])
        self.v_proj = Linear(weights["self_attn.v_proj"])
        self.o_proj = Linear(weights["self_attn.o_proj"])
        self.N, self.K, self.H = config.N, config.K, config.H

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array, dropout: Dropout):
        """x [B, T, D] -> [B, T, D], and the cache with these T positions of this layer written, in place."""
        B, T, _ = x.shape
        q = self.queries(x, context, dropout)
        x, q = in_order(x, q)
        k, v = self.keys_values(x, context, dropout)
        if cache is None:
            out = causal_attention(q, k, v, context.implementation, context.starts)
        else:
            place = (layer, jnp.arange(B)[:, None], context.positions)
            cache = Cache(cache.k.at[place].set(k), cache.v.at[place].set(v))
            seen = jnp.arange(cache.k.shape[2])[None, None, :] <= context.positions[:, :, None]  # [B, T, S]
            out = jax.nn.dot_product_attention(q, cache.k[layer], cache.v[layer], mask=seen[:, None])
        out = checkpoint_name(out.reshape(B, T, self.N * self.H), "attention")
        return gradient_after(self.o_proj(out, dropout), out), cache

    def queries(self, x: jax.Array, context: Context, dropout: Dropout) -> jax.Array:
        """x [B, T, D] -> [B, T, N, H], rotated."""
        q = self.q_proj(x, dropout).reshape(*x.shape[:2], self.N, self.H)
        return checkpoint_name(rotate(q, context.positions, context.inverse_frequencies), "queries")

    def keys_values(self, x: jax.Array, context: Context, dropout: Dropout) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> keys, rotated, and values: [B, T, K, H] each."""
        k = self.k_proj(x, dropout).reshape(*x.shape[:2], self.K, self.H)
        k = checkpoint_name(rotate(k, context.positions, context.inverse_frequencies), "keys")
        x, k = in_order(x, k)
        v = self.v_proj(x, dropout).reshape(*x.shape[:2], self.K, self.H)
        return k, checkpoint_name(v, "values")


class FeedForward(nnx.Module):
    def __init__(self, weights: dict[str, Any]):
        self.gate_proj = Linear(weights["mlp.gate_proj"])
        self.up_proj = Linear(weights["mlp.up_proj"])
        self.down_proj = Linear(weights["mlp.down_proj"])

    def __call__(self, x: jax.Array, dropout: Dropout) -> jax.Array:
        gate = checkpoint_name(self.gate_proj(x, dropout), "gate")
        x, gate = in_order(x, gate)
        inner = jax.nn.silu(gate) * checkpoint_name(self.up_proj(x, dropout), "up")
        return gradient_after(self.down_proj(inner, dropout), inner)


class Block(nnx.Module):
    """One decoder layer; its arrays carry a leading L, and a scan hands each layer its slice."""

    def __init__(self, config: ModelConfig, weights: dict[str, Any]):
        self.input_layernorm = RMSNorm(weights["input_layernorm"], config.norm_eps)
        self.self_attn = Attention(config, weights)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"], config.norm_eps)
        self.mlp = FeedForward(weights)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array, dropout: Dropout):
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache, layer, dropout)
        x = checkpoint_name(x + attended, "attended")
        return x + self.mlp(self.post_attention_layernorm(x), dropout), cache

    def keys_values(self, x: jax.Array, context: Context, dropout: Dropout) -> tuple[jax.Array, jax.Array]:
        """What a chunk x [B, C, D] gives to the attention of all: [B, C, K, H] each."""
        return self.self_attn.keys_values(self.input_layernorm(x), context, dropout)

    def rest(
        self, x: jax.Array, kv: tuple[jax.Array, jax.Array], first: jax.Array, context: Context, dropout: Dropout
    ) -> jax.Array:
        """Everything else of a chunk x [B, C, D] whose first token stands at `first`, given all keys and values."""
        attention = self.self_attn
        q = attention.queries(self.input_layernorm(x), context, dropout)
        out = attend_chunk(q, *kv, first, context.starts)
        x = x + attention.o_proj(out.reshape(*x.shape[:2], -1), dropout)
        return x + self.mlp(self.post_attention_layernorm(x), dropout)


class Llama(nnx.Module):
    """Decoder over stacked blocks.

    Args:
      config: sizes.
      weights: "embedding" [V, D]; "head" [V, D], absent when tied; "norm" float32 [D]; "layers": name -> stacked
        weight, names as in LINEARS (QuantizedTensor or [L, O, I]) and NORMS (float32 [L, D]).
      compute_dtype: of activations and matmuls.
      remat: one of REMAT. "block" keeps one activation a layer and recomputes the rest in the backward pass, "none"
        keeps everything. To train/backward.py "selective" is "block" that keeps the values with names too, and
        "block+offload" "block" whose activations go to host memory.
      attention: one of attention.IMPLEMENTATIONS.
      sequence_chunk: tokens; longer sequences go through a layer in chunks of so many, with chunked attention whatever
        `attention` says. 0 is off.
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
        self.dropout_rate: Any = 0.0  # a number, or a DropoutRate of the program's inputs
        self.residual = ""  # the adapter's start whose part the linear layers lack, if there is one
        self.embedding = Frozen(weights["embedding"])
        self.blocks = Block(config, weights["layers"])
        self.norm = RMSNorm(weights["norm"], config.norm_eps)
        self.head = nnx.data(None if config.tied else Frozen(weights["head"]))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        dropout_key: jax.Array | DropoutKey | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states.

        Args:
          tokens: int32 [B, T]; padding stands at the right, where causality hides it.
          positions: int32 [B, T]; 0..T-1 by default. With a cache, also the places that are written.
          cache: keys and values of earlier calls; None attends to these T tokens alone.
          dropout_key: of LoRA dropout; None is no dropout. A DropoutKey says which rows of a step's batch these are.
          segments: int32 [B, T] ids of the examples packed into each row, equal ones side by side; a token sees its own
            segment alone, whose positions begin at 0. None: a row is one example. Not with a cache.
        Returns:
          hidden [B, T, D] after the final norm, and the cache with these tokens added (None without one).
        """
        T = tokens.shape[1]
        if cache is None:
            tokens = self.pad(tokens)
            positions, segments = (None if x is None else self.pad(x) for x in (positions, segments))
        context = self.context(tokens, positions, segments)
        block, *state = self.layers(nnx.LoRAParam, ...)
        apply_layer = partial(self.apply_layer, block, context, dropout_key)

        def step(carry, inputs):
            (x, cache), (state, layer) = carry, inputs
            return apply_layer(tuple(state), x, layer, cache), None

        if self.remat != "none" and cache is None:
            step = jax.checkpoint(step, prevent_cse=False)  # a scan's body is not merged with its forward
        (x, cache), _ = jax.lax.scan(step, (self.embed(tokens), cache), (state, jnp.arange(self.config.L)))
        return self.norm(x[:, :T]), cache

    def pad(self, tokens: jax.Array) -> jax.Array:
        """[B, T] with zeros (False) at the right, as the chunks of a long sequence need them; causality hides them."""
        T = tokens.shape[1]
        if not self._is_chunked(T):
            return tokens
        return jnp.pad(tokens, ((0, 0), (0, -T % chunk_size(T, self.sequence_chunk))))

    def _is_chunked(self, T: int) -> bool:
        return 0 < self.sequence_chunk < T

    def context(
        self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> Context:
        """What every layer shares, for tokens [B, T] at positions int32 [B, T] (0..T-1 of each segment by default)."""
        starts = None if segments is None else segment_starts(segments)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            positions = positions if starts is None else positions - starts
        config = self.config
        frequencies = rope_inverse_frequencies(config.H, config.rope_theta, dict(config.rope_scaling))
        return Context(positions, frequencies, self.attention, starts)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, D] in the compute dtype."""
        return self.embedding.get_value()[tokens].astype(self.compute_dtype)

    def layers(self, *filters: Any) -> tuple[Any, ...]:
        """(graph of one block, its stacked state, one for each filter of nnx.split): what a scan runs over."""
        return nnx.split(self.blocks, *filters)

    def apply_layer(
        self,
        block: Any,
        context: Context,
        dropout_key: jax.Array | DropoutKey | None,
        state: tuple[Any, Any],
        x: jax.Array,
        layer: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """One layer: x [B, T, D] -> [B, T, D], and the cache with its keys and values.

        `state`: the layer's slice of `layers(nnx.LoRAParam, ...)`: adapter and frozen arrays. Where the sequence is cut
        into chunks T is what `pad` makes of it, and the frozen arrays get no gradient.
        """
        key = None if dropout_key is None else DropoutKey.of(dropout_key).of_layer(layer)
        if cache is None and self._is_chunked(x.shape[1]):
            adapter, frozen = state
            pieces = _ChunkedBlock(block, chunk_size(x.shape[1], self.sequence_chunk))
            drawn = None if key is None else (key, DropoutRate.of(self.dropout_rate))
            arrays = (frozen, context.positions, context.starts, context.inverse_frequencies, drawn)
            return layer_in_chunks(pieces.keys_values, pieces.rest, pieces.size, arrays, adapter, x), None
        return nnx.merge(block, *state)(x, context, cache, layer, Dropout(self.dropout_rate, key))

    def head_weight(self) -> jax.Array:
        """[V, D]: the output head, or the embedding it is tied to."""
        return (self.embedding if self.head is None else self.head).get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]."""
        return head_logits(hidden, self.head_weight())

    def new_cache(self, B: int, S: int) -> Cache:
        """An empty cache with room for S positions of B rows."""
        shape = (self.config.L, B, S, self.config.K, self.config.H)
        return Cache(jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype))


class _ChunkedBlock(NamedTuple):
    """A block as the two functions of `layer_in_chunks`.

    A chunk's dropout depends on the layer's key, the chunk, the function and the projection alone.
    """

    graph: Any
    size: int  # tokens of a chunk

    def keys_values(self, arrays: Any, adapter: Any, x: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, context, dropout = self._open(arrays, adapter, first, 0)
        return block.keys_values(x, context, dropout)

    def rest(self, arrays: Any, adapter: Any, kv: Any, x: jax.Array, first: jax.Array) -> jax.Array:
        block, context, dropout = self._open(arrays, adapter, first, 1)
        return block.rest(x, kv, first, context, dropout)

    def _open(self, arrays: Any, adapter: Any, first: jax.Array, place: int) -> tuple[Block, Context, Dropout]:
        frozen, positions, starts, frequencies, dropout = arrays
        key, rate = (None, 0.0) if dropout is None else dropout
        if key is not None:
            key = key.fold_in(first // self.size).fold_in(place)
        positions = jax.lax.dynamic_slice_in_dim(positions, first, self.size, axis=1)
        if starts is not None:
            starts = jax.lax.dynamic_slice_in_dim(starts, first, self.size, axis=1)
        context = Context(positions, frequencies, "chunked", starts)
        return nnx.merge(self.graph, adapter, frozen), context, Dropout(rate, key)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """hidden [..., D] times head [V, D] -> float32 [..., V]; operands in hidden's dtype, sums in float32."""
    return dense_matmul(hidden, head.astype(hidden.dtype), 1, jnp.float32)
