"""One layer of the encoder and one of the decoder, over parts that stand under the names that they have on disk.

    encoder   x += self(norm x);  x += feed_forward(norm x)
    decoder   y += self(norm y);  y += cross(norm y, encoded);  y += feed_forward(norm y)

Scores are not scaled; a bias by distance is added to those of a stack's own tokens, none to the cross attention's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import ACTIVATIONS, gradient_after, part_of, project


class Cached(NamedTuple):
    """Keys and values of a layer of the decoder; stacked, of all layers."""

    k: jax.Array  # [B, S, N, H], of its own tokens: room for S
    v: jax.Array
    cross_k: jax.Array  # [B, S, N, H], of the encoder's
    cross_v: jax.Array


def encoder_layer(
    config: ModelConfig, layer: Any, x: jax.Array, bias: jax.Array, seen: jax.Array, dropout: Dropout
) -> jax.Array:
    """x [B, S, D] -> [B, S, D]. `layer`: the parts of "encoder". bias: [1, N, S, S]. seen: bool [B, S]."""
    part = part_of(layer, "layer.0")
    entering = part.layer_norm(x)
    q, k, v = keys_of(config, part.SelfAttention, "qkv", entering, dropout)
    x = x + _attended(part.SelfAttention, q, k, v, bias, seen[:, None, None], dropout)
    return x + feed_forward(config, part_of(layer, "layer.1"), x, dropout)


def decoder_layer(
    config: ModelConfig,
    layer: Any,
    y: jax.Array,
    encoded: jax.Array,
    bias: jax.Array,
    seen: jax.Array,
    dropout: Dropout,
) -> jax.Array:
    """y [B, T, D] -> [B, T, D]. `layer`: the parts of "decoder". encoded: [B, S, D]. bias: [1, N, T, T]. seen: bool
    [B, S]."""
    part, cross = part_of(layer, "layer.0"), part_of(layer, "layer.1")
    q, k, v = keys_of(config, part.SelfAttention, "qkv", part.layer_norm(y), dropout)
    causal = jnp.tril(jnp.ones((y.shape[1], y.shape[1]), bool))[None, None]
    y = y + _attended(part.SelfAttention, q, k, v, bias, causal, dropout)
    (q,) = keys_of(config, cross.EncDecAttention, "q", cross.layer_norm(y), dropout)
    k, v = keys_of(config, cross.EncDecAttention, "kv", encoded, dropout)
    y = y + _attended(cross.EncDecAttention, q, k, v, None, seen[:, None, None], dropout)
    return y + feed_forward(config, part_of(layer, "layer.2"), y, dropout)


def decoder_step(
    config: ModelConfig, layer: Any, y: jax.Array, cached: Cached, places: jax.Array, bias: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """decoder_layer for one token a row: y [B, 1, D] at places int32 [B] -> [B, 1, D], and keys and values with them.

    bias: [B, N, 1, S], of the room's places. No dropout.
    """
    dropout = Dropout(0.0, None)
    part, cross = part_of(layer, "layer.0"), part_of(layer, "layer.1")
    q, k, v = keys_of(config, part.SelfAttention, "qkv", part.layer_norm(y), dropout)
    rows = jnp.arange(len(y))
    keys, values = (kept.at[rows, places].set(new[:, 0]) for kept, new in ((cached.k, k), (cached.v, v)))
    written = (jnp.arange(keys.shape[1]) <= places[:, None])[:, None, None]
    y = y + _attended(part.SelfAttention, q, keys, values, bias, written, dropout)
    (q,) = keys_of(config, cross.EncDecAttention, "q", cross.layer_norm(y), dropout)
    given = seen[:, None, None]
    y = y + _attended(cross.EncDecAttention, q, cached.cross_k, cached.cross_v, None, given, dropout)
    return y + feed_forward(config, part_of(layer, "layer.2"), y, dropout), keys, values


def keys_of(config: ModelConfig, attention: Any, names: str, x: jax.Array, dropout: Dropout) -> list[jax.Array]:
    """Queries, keys or values, as the letters of `names` say, of x [B, T, D]: [B, T, N, H] each."""
    made = project([getattr(attention, name) for name in names], x, dropout)
    return [one.reshape(*x.shape[:2], config.N, config.H) for one in made]


def _attended(
    attention: Any, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, seen: jax.Array, dropout: Dropout
) -> jax.Array:
    """[B, T, D], of q [B, T, N, H], k and v [B, S, N, H]. seen: bool, [B or 1, 1, T or 1, S]; softmax in float32."""
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=seen, scale=1.0, implementation="xla")
    out = out.reshape(*q.shape[:2], -1)
    return gradient_after(attention.o(out, dropout), out)


def feed_forward(config: ModelConfig, part: Any, x: jax.Array, dropout: Dropout) -> jax.Array:
    """What is added to x [B, T, D]."""
    assert config.kind.pair is not None
    fed = part.DenseReluDense
    first, *others = project([getattr(fed, name) for name in config.kind.pair.rows_into], part.layer_norm(x), dropout)
    inner = ACTIVATIONS[config.kind.activation](first)
    for other in others:
        inner = inner * other
    return gradient_after(fed.wo(inner, dropout), inner)
