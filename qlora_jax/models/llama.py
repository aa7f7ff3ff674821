"""The Llama family (1, 2, 3): pre-norm blocks of grouped-query attention and a gated feed-forward, scanned."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.layers import Dropout, Frozen, Linear, RMSNorm, rope_inverse_frequencies, rotate

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


class Cache(NamedTuple):
    """Keys and values seen so far: [L, B, S, K, H] each, in the compute dtype. S is the room, not the number filled."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: jax.Array  # int32 [B, T]
    inverse_frequencies: jax.Array  # float32 [H / 2]
    implementation: str  # of attention: xla | cudnn


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
        q = self.q_proj(x, dropout).reshape(B, T, self.N, self.H)
        k = self.k_proj(x, dropout).reshape(B, T, self.K, self.H)
        v = self.v_proj(x, dropout).reshape(B, T, self.K, self.H)
        q = rotate(q, context.positions, context.inverse_frequencies)
        k = rotate(k, context.positions, context.inverse_frequencies)
        if cache is None:
            attend = partial(jax.nn.dot_product_attention, implementation=context.implementation, is_causal=True)
            out = attend(q, k, v)
        else:
            place = (layer, jnp.arange(B)[:, None], context.positions)
            cache = Cache(cache.k.at[place].set(k), cache.v.at[place].set(v))
            seen = jnp.arange(cache.k.shape[2])[None, None, :] <= context.positions[:, :, None]  # [B, T, S]
            out = jax.nn.dot_product_attention(q, cache.k[layer], cache.v[layer], mask=seen[:, None])
        return self.o_proj(out.reshape(B, T, self.N * self.H), dropout), cache


class FeedForward(nnx.Module):
    def __init__(self, weights: dict[str, Any]):
        self.gate_proj = Linear(weights["mlp.gate_proj"])
        self.up_proj = Linear(weights["mlp.up_proj"])
        self.down_proj = Linear(weights["mlp.down_proj"])

    def __call__(self, x: jax.Array, dropout: Dropout) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x, dropout)) * self.up_proj(x, dropout), dropout)


class Block(nnx.Module):
    """One decoder layer; its arrays carry a leading L, and a scan hands each layer its slice."""

    def __init__(self, config: ModelConfig, weights: dict[str, Any]):
        self.input_layernorm = RMSNorm(weights["input_layernorm"], config.norm_eps)
        self.self_attn = Attention(config, weights)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"], config.norm_eps)
        self.mlp = FeedForward(weights)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array, dropout: Dropout):
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache, layer, dropout)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), dropout), cache


class Llama(nnx.Module):
    """Decoder over stacked blocks.

    Args:
      config: sizes.
      weights: "embedding" [V, D]; "head" [V, D], absent when tied; "norm" float32 [D]; "layers": name -> stacked
        weight, names as in LINEARS (QuantizedTensor or [L, O, I]) and NORMS (float32 [L, D]).
      compute_dtype: of activations and matmuls.
      remat: "block" keeps one activation a layer and recomputes the rest in the backward pass; "none" keeps everything.
      attention: "xla" or "cudnn".
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        compute_dtype: Any,
        remat: str = "block",
        attention: str = "xla",
    ):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat, self.attention, self.dropout_rate = remat, attention, 0.0
        self.embedding = Frozen(weights["embedding"])
        self.blocks = Block(config, weights["layers"])
        self.norm = RMSNorm(weights["norm"], config.norm_eps)
        self.head = nnx.data(None if config.tied else Frozen(weights["head"]))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states.

        Args:
          tokens: int32 [B, T]; padding stands at the right, where causality hides it.
          positions: int32 [B, T]; 0..T-1 by default. With a cache, also the places that are written.
          cache: keys and values of earlier calls; None attends to these T tokens alone.
          dropout_key: of LoRA dropout; None is no dropout.
        Returns:
          hidden [B, T, D] after the final norm, and the cache with these tokens added (None without one).
        """
        context = self.context(tokens, positions)
        block, state = self.layers()
        apply_layer = partial(self.apply_layer, block, context, dropout_key)

        def step(carry, inputs):
            (x, cache), (state, layer) = carry, inputs
            return apply_layer(state, x, layer, cache), None

        if self.remat != "none" and cache is None:
            step = jax.checkpoint(step, prevent_cse=False)  # a scan's body is not merged with its forward
        (x, cache), _ = jax.lax.scan(step, (self.embed(tokens), cache), (state, jnp.arange(self.config.L)))
        return self.norm(x), cache

    def context(self, tokens: jax.Array, positions: jax.Array | None = None) -> Context:
        """What every layer shares, for tokens [B, T] at positions int32 [B, T] (0..T-1 by default)."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        config = self.config
        frequencies = rope_inverse_frequencies(config.H, config.rope_theta, dict(config.rope_scaling))
        return Context(positions, frequencies, self.attention)

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
        dropout_key: jax.Array | None,
        state: Any,
        x: jax.Array,
        layer: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """One layer: x [B, T, D] -> [B, T, D], and the cache with its keys and values. `state`: the layer's slice."""
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
        states = state if isinstance(state, tuple) else (state,)
        return nnx.merge(block, *states)(x, context, cache, layer, Dropout(self.dropout_rate, key))

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


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """hidden [..., D] times head [V, D] -> float32 [..., V]; operands in hidden's dtype, sums in float32."""
    dims = (((hidden.ndim - 1,), (1,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        hidden, head.astype(hidden.dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )
