"""One layer of the decoder: attention and feed-forward over the parts that a Kind names."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.nf4_matmul import is_for_cpu
from qlora_jax.models.attention import (
    Scoring,
    alibi_slopes,
    attend_chunk,
    causal_attention,
    masked_attention,
    window_starts,
)
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.divided.tokens import attention_to_all
from qlora_jax.models.dropout import Dropout
from qlora_jax.models.layers import ACTIVATIONS, Frozen, Linear, Norm, Setting, gradient_after, part_of, place, project
from qlora_jax.models.mixtures.experts import mixture, stacked
from qlora_jax.models.mixtures.router import Balance, Router
from qlora_jax.models.rope import Turn, rotate


class Cache(NamedTuple):
    """Keys and values seen so far: [L, B, S, K, H] each, in the compute dtype. S is the room, not the number filled.

    Layers with a window have the same room as others: a mask hides what lies outside of it.
    """

    k: jax.Array
    v: jax.Array

    def begun(self, k: jax.Array, v: jax.Array, layer: jax.Array) -> "Cache":
        """With keys and values [B, T, K, H] of a layer at the first places."""
        at, new = (layer, 0, 0, 0, 0), (_laid_out(k), _laid_out(v))
        return Cache(*(jax.lax.dynamic_update_slice(old, x[None], at) for old, x in zip(self, new, strict=True)))

    def of_layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H]."""
        return _laid_out(self.k[layer]), _laid_out(self.v[layer])


def _laid_out(x: jax.Array) -> jax.Array:
    """x, which lies in memory as its axes stand.

    Left free, attention's layout of keys and values becomes the whole cache's: XLA:GPU turns that around before the
    layers and after, with another cache in memory.
    """
    return x if is_for_cpu() else with_layout_constraint(x, Layout(tuple(range(x.ndim))))


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: jax.Array  # int32 [B, T]
    turn: Turn | None  # None: a model without rotary embedding
    implementation: str  # of attention: one of attention.IMPLEMENTATIONS
    starts: jax.Array | None = None  # int32 [B, T], the first place each token sees; None: all see the row's first
    layer: jax.Array | None = None  # int32 [], the number of the layer that is computed
    balance: Balance | None = None  # of a mixture's routers; None: no auxiliary loss
    seen: jax.Array | None = None  # bool [B, 1 or T, T], which places each token sees; None: those up to its own
    first: jax.Array | None = None  # int32 [], the place of x's first token, of a device that has a part of each row
    is_new: bool = False  # these tokens are their cache's first


class Block(nnx.Module):
    """One decoder layer; its arrays carry a leading L, and a scan hands each layer its slice.

    Its parts stand under the names that they have on disk, and are found by their roles (kind.py).
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Any]):
        kind = self.kind = config.kind
        self.N, self.K, self.H = config.N, config.K, config.H
        self.scoring = Scoring(kind.attention_scale, kind.softcap, alibi_slopes(config.N) if kind.alibi else ())
        for name in config.linears:
            layer = stacked if config.is_expert(name) else Linear
            place(self, name, layer(weights[name], weights.get(f"{name}.bias")))
        if kind.sinks:
            place(self, kind.sinks, Frozen(weights[kind.sinks]))
        if kind.experts:
            place(
                self,
                kind.experts.router,
                Router(weights[kind.experts.router], weights.get(f"{kind.experts.router}.bias")),
            )
        for name in dict.fromkeys(kind.norm_of.values()):
            place(self, name, Norm(weights[name], config.norm_eps, kind.norm, weights.get(f"{name}.bias")))
        if len(set(kind.windows)) > 1:
            self.window = Setting(jax.device_put(np.asarray(kind.windows, np.int32)))
        if len(set(kind.layer_ropes)) > 1:
            self.rope = Setting(jax.device_put(np.asarray(kind.layer_ropes, np.int32)))

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array, dropout: Dropout):
        """x [B, T, D] -> [B, T, D], and the cache with these T positions of this layer written, in place."""
        B, T, _ = x.shape
        entering = self.norm("attention_in", x)
        if "qkv" in self.kind.linear:
            q, k, v = self.fused(entering, context, dropout)
        else:
            q, k, v = project([self.linear(role) for role in "qkv"], entering, dropout)
            q, k, v = self.as_queries(q, context), *self.as_keys_values(k, v, context)
        if context.seen is not None:
            out = masked_attention(q, k, v, context.seen, context.positions, self.scoring)
        elif context.first is not None:
            how = (context.implementation, self.starts(context), self.scoring, self.sinks)
            out = attention_to_all(q, k, v, context.first, *how)
        elif cache is None or context.is_new:
            out = causal_attention(q, k, v, context.implementation, self.starts(context), self.scoring, self.sinks)
            if cache is not None:
                cache = cache.begun(k, v, layer)
        else:
            at = (layer, jnp.arange(B)[:, None], context.positions)
            cache = Cache(cache.k.at[at].set(k), cache.v.at[at].set(v))
            places = jnp.arange(cache.k.shape[2])[None, None, :]
            seen = places <= context.positions[:, :, None]  # [B, T, S]
            if self.has_window:
                first = window_starts(None, context.positions, self.window_size)
                seen = seen & (places >= first[:, :, None])
            keys_values = cache.of_layer(layer)
            out = masked_attention(q, *keys_values, seen, context.positions, self.scoring, self.sinks)
        out = out.reshape(B, T, self.N * self.H)
        attended = gradient_after(self.linear("o")(out, dropout), out)
        return self.join(x, entering, attended, context, dropout), cache

    def linear(self, role: str) -> Linear:
        return part_of(self, self.kind.linear[role])

    @property
    def sinks(self) -> jax.Array | None:
        """[N], where the family's heads have them."""
        return part_of(self, self.kind.sinks).get_value() if self.kind.sinks else None

    def norm(self, role: str, x: jax.Array) -> jax.Array:
        """x through the norm of that role; x itself where there is none."""
        return part_of(self, self.kind.norm_of[role])(x) if role in self.kind.norm_of else x

    def heads(self, y: jax.Array, norm: str, count: int) -> jax.Array:
        """A projection [B, T, count * H] -> [B, T, count, H], normed where the family norms queries and keys."""
        shape = (*y.shape[:2], count, self.H)
        if self.kind.qk_norm == "whole":
            return self.clipped(self.norm(norm, y).reshape(shape))
        return self.clipped(self.norm(norm, y.reshape(shape)))

    def clipped(self, y: jax.Array) -> jax.Array:
        """Queries, keys or values, where the family clips them."""
        most = self.kind.clip_qkv
        return jnp.clip(y, -most, most) if most else y

    def turned(self, x: jax.Array, context: Context) -> jax.Array:
        if context.turn is None:
            return x
        choice = self.rope.get_value() if len(set(self.kind.layer_ropes)) > 1 else None
        return rotate(x, context.turn.of_layer(choice), self.kind.rotary == "pairs")

    def turned_heads(self, y: jax.Array, norm: str, count: int, context: Context) -> jax.Array:
        """A projection [B, T, count * H] -> [B, T, count, H], normed and turned."""
        if self.kind.turned_first:
            return self.norm(norm, self.turned(y.reshape(*y.shape[:2], count, self.H), context))
        return self.turned(self.heads(y, norm, count), context)

    def queries(self, x: jax.Array, context: Context, dropout: Dropout) -> jax.Array:
        """x [B, T, D] -> [B, T, N, H], rotated."""
        if "qkv" in self.kind.linear:
            return self.fused(x, context, dropout)[0]
        return self.as_queries(self.linear("q")(x, dropout), context)

    def as_queries(self, q: jax.Array, context: Context) -> jax.Array:
        """A projection [B, T, N * H] -> [B, T, N, H], rotated."""
        q = self.turned_heads(q, "q_norm", self.N, context)
        growth, step = self.kind.query_growth
        if growth:
            grown = 1 + growth * jnp.log1p(jnp.floor(context.positions.astype(jnp.float32) / step))
            q = (q * grown[:, :, None, None]).astype(q.dtype)
        if self.kind.scores_fall:
            assert context.layer is not None
            q = (q / (context.layer + 1).astype(jnp.float32)).astype(q.dtype)
        return checkpoint_name(q, "queries")

    def keys_values(self, x: jax.Array, context: Context, dropout: Dropout) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> keys, rotated, and values: [B, T, K, H] each."""
        if "qkv" in self.kind.linear:
            return self.fused(x, context, dropout)[1:]
        k, v = project([self.linear("k"), self.linear("v")], x, dropout)
        return self.as_keys_values(k, v, context)

    def as_keys_values(self, k: jax.Array, v: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Projections [B, T, K * H] -> keys, rotated, and values: [B, T, K, H] each."""
        k = self.turned_heads(k, "k_norm", self.K, context)
        v = self.clipped(v.reshape(*v.shape[:2], self.K, self.H))
        return checkpoint_name(k, "keys"), checkpoint_name(v, "values")

    def fused(self, x: jax.Array, context: Context, dropout: Dropout) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> queries [B, T, N, H], keys and values [B, T, K, H], of one projection."""
        B, T, _ = x.shape
        N, K, H = self.N, self.K, self.H
        y = self.linear("qkv")(x, dropout)
        if self.kind.qkv_layout == "groups":  # for each key head its queries, then the key and the value
            y = y.reshape(B, T, K, N // K + 2, H)
            q, k, v = (part.reshape(B, T, -1) for part in (y[..., :-2, :], y[..., -2, :], y[..., -1, :]))
        else:
            q, k, v = jnp.split(y, [N * H, (N + K) * H], axis=-1)
        return self.as_queries(q, context), *self.as_keys_values(k, v, context)

    @property
    def has_window(self) -> bool:
        return any(self.kind.windows)

    @property
    def window_size(self) -> Any:
        """int, or int32 [] where layers differ; 0 is none."""
        return self.window.get_value() if len(set(self.kind.windows)) > 1 else self.kind.windows[0]

    def starts(self, context: Context) -> jax.Array | None:
        """The first place that each token sees, int32 [B, T]; None: all see the row's first."""
        B, T = context.positions.shape
        shortest = min((window for window in self.kind.windows if window), default=0)
        if not shortest or (shortest >= T and context.first is None):
            return context.starts
        places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        places = places if context.first is None else places + context.first
        return window_starts(context.starts, places, self.window_size)

    def given(self, x: jax.Array, context: Context, dropout: Dropout) -> tuple[jax.Array, jax.Array]:
        """What a chunk x [B, C, D] gives to the attention of all: keys and values, [B, C, K, H] each."""
        return self.keys_values(self.norm("attention_in", x), context, dropout)

    def rest(
        self, x: jax.Array, kv: tuple[jax.Array, jax.Array], first: jax.Array, context: Context, dropout: Dropout
    ) -> jax.Array:
        """What a chunk x [B, C, D] becomes whose first token stands at `first`, given all keys and values."""
        entering = self.norm("attention_in", x)
        q = self.queries(entering, context, dropout)
        starts = context.starts
        if self.has_window:
            places = jnp.broadcast_to(first + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            starts = window_starts(starts, places, self.window_size)
        out = attend_chunk(q, *kv, first, starts, None, self.scoring, self.sinks)
        attended = self.linear("o")(out.reshape(*x.shape[:2], -1), dropout)
        return self.join(x, entering, attended, context, dropout)

    def join(
        self, x: jax.Array, entering: jax.Array, attended: jax.Array, context: Context, dropout: Dropout
    ) -> jax.Array:
        """The layer after its attention: x and what attention gives, [B, T, D] each, and feed-forward."""
        kind = self.kind
        attended = self.scaled(self.norm("attention_out", attended))
        if kind.parallel:
            shared = kind.norm_of["feed_forward_in"] == kind.norm_of["attention_in"]
            entering = entering if shared else self.norm("feed_forward_in", x)
            return x + attended + self.scaled(self.feed_forward(entering, context, dropout))
        x = checkpoint_name((entering if kind.normed_residual else x) + attended, "attended")
        x = self.norm("attention_end", x)
        entering = self.norm("feed_forward_in", x)
        x = entering if kind.normed_residual else x
        fed = self.feed_forward(entering, context, dropout)
        return self.norm("feed_forward_end", x + self.scaled(self.norm("feed_forward_out", fed)))

    def scaled(self, y: jax.Array) -> jax.Array:
        """What is added to the residual stream."""
        return y if self.kind.residual_scale == 1 else y * self.kind.residual_scale

    def feed_forward(self, x: jax.Array, context: Context, dropout: Dropout) -> jax.Array:
        """[B, T, D] -> [B, T, D]: through a gate, or plain, or through each token's experts."""
        if self.kind.experts:
            router: Router = part_of(self, self.kind.experts.router)
            chosen, weights = router(x, self.kind.experts, context.balance)
            assert context.layer is not None
            return mixture(self, self.kind, x, chosen, weights, context.layer, dropout)
        activation = ACTIVATIONS[self.kind.activation]
        if "gate_up" in self.kind.linear:
            gate, up = jnp.split(self.linear("gate_up")(x, dropout), 2, axis=-1)
            inner = activation(checkpoint_name(gate, "gate")) * checkpoint_name(up, "up")
        elif "gate" in self.kind.linear:
            gate, up = project([self.linear("gate"), self.linear("up")], x, dropout)
            inner = activation(checkpoint_name(gate, "gate")) * checkpoint_name(up, "up")
        else:
            inner = activation(checkpoint_name(self.linear("up")(x, dropout), "up"))
        return gradient_after(self.linear("down")(inner, dropout), inner)
