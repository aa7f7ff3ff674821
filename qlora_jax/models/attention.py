"""Causal attention, and its form for long sequences: online softmax over chunks of keys, so no [T, S] scores exist.

    s = q k^T / sqrt(H);  m = max s;  l = sum exp(s - m);  out = sum exp(s - m) v / l          (float32 m, l and out)

A chunk of keys updates (m, l, out) of a chunk of queries and is forgotten; the backward pass computes the scores again
from log l + m. Keys beyond a chunk's last query are not visited at all. Source: Rabe and Staats, 2021 (arXiv
2112.05682); Dao, 2023 (arXiv 2307.08691) for the backward pass.

Of a row that holds several examples one after the other (packing) each token sees those of its own example alone:
`starts` names the first of them for every token.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.models.chunks import chunk_size, in_chunks

IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn")
LONGEST_WHOLE = 2048  # tokens: what "auto" still gives to "xla", which keeps all scores: 1 GB of float32 at 64 heads
QUERY_CHUNK = 1024  # queries that "chunked" takes at a time
SCORES = 1024 * 512  # of a head at a time: 134 MB of float32 at 64 heads


def chosen(implementation: str, T: int) -> str:
    """What "auto" means for T tokens: "xla", or "chunked" above LONGEST_WHOLE; every other name means itself."""
    if implementation != "auto":
        return implementation
    return "xla" if T <= LONGEST_WHOLE else "chunked"


def segment_starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T] ids, equal ones side by side -> int32 [B, T]: where each token's segment begins in its row."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str, starts: jax.Array | None = None
) -> jax.Array:
    """Each token attends to itself and all before it, from its start on.

    Args:
      q: [B, T, N, H]. k, v: [B, T, K, H], N a multiple of K.
      implementation: one of IMPLEMENTATIONS; "cudnn" takes no starts.
      starts: int32 [B, T], the first place that each token sees; None is 0 for all.
    Returns:
      [B, T, N, H] in q's dtype; the softmax is float32.
    """
    implementation = chosen(implementation, q.shape[1])
    if implementation == "chunked":
        return chunked_attention(q, k, v, starts=starts)
    named: Any = implementation
    if starts is None:
        return jax.nn.dot_product_attention(q, k, v, implementation=named, is_causal=True)
    if implementation == "cudnn":  # JAX would hand it a bias of [B, 1, T, T]: what flash attention is there to avoid
        raise ValueError("cudnn attention takes no starts")
    seen = jnp.arange(k.shape[1]) >= starts[..., None]  # [B, T, S]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=named, is_causal=True)


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_chunk: int = QUERY_CHUNK,
    key_chunk: int | None = None,
    starts: jax.Array | None = None,
) -> jax.Array:
    """As causal_attention, for query_chunk queries and key_chunk keys at a time (see attend_chunk): memory O(T)."""
    T = q.shape[1]
    size = chunk_size(T, query_chunk)
    padded = jnp.pad(q, ((0, 0), (0, -T % size), (0, 0), (0, 0)))  # queries that nobody reads
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, -T % size)), mode="edge")
    attend = _Attend(key_chunk, size)
    return in_chunks(attend, size, starts, (k, v), padded)[:, :T]


class _Attend:
    """attend_chunk as a function for in_chunks; equal ones are one function to a compilation."""

    def __init__(self, key_chunk: int | None, size: int):
        self.key_chunk, self.size = key_chunk, size

    def __call__(
        self, starts: jax.Array | None, keys: tuple[jax.Array, jax.Array], q: jax.Array, first: jax.Array
    ) -> jax.Array:
        if starts is not None:
            starts = jax.lax.dynamic_slice_in_dim(starts, first, self.size, axis=1)
        return attend_chunk(q, *keys, first, starts, self.key_chunk)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Attend) and (self.key_chunk, self.size) == (other.key_chunk, other.size)

    def __hash__(self) -> int:
        return hash((_Attend, self.key_chunk, self.size))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    starts: jax.Array | None = None,
    key_chunk: int | None = None,
) -> jax.Array:
    """Attention of consecutive queries to the keys at and before each, from its start on.

    Args:
      q: [B, C, N, H], at positions first..first + C - 1.
      k, v: [B, S, K, H], at positions 0..S - 1.
      first: int32 [].
      starts: int32 [B, C], the first key that each query sees; None is 0 for all. Chunks of keys before the earliest
        are not visited.
      key_chunk: keys whose scores exist at a time; None makes them SCORES a head.
    Returns:
      [B, C, N, H] in q's dtype.
    """
    return _forward(q, k, v, first, starts, key_chunk)[0]


def _forward(q, k, v, first, starts, key_chunk):
    B, C, N, H = q.shape
    S, K = k.shape[1:3]
    key_chunk = _keys_at_a_time(key_chunk, C, S)
    grouped = _grouped(q, K)

    def step(j, carry):
        m, l, out = carry
        k_j, v_j, scores = _scores(grouped, k, v, first, starts, j, key_chunk)
        new_m = jnp.maximum(m, scores.max(-1))
        p, fade = jnp.exp(scores - new_m[..., None]), jnp.exp(m - new_m)
        out = out * fade[..., None] + _einsum("bkgcs,bskh->bkgch", p.astype(v.dtype), v_j)
        return new_m, l * fade + p.sum(-1), out

    rows = (B, K, N // K, C)
    start = (jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros((*rows, H)))
    m, l, out = jax.lax.fori_loop(*_visited(first, starts, C, S, key_chunk), step, start)
    out = _ungrouped(out / l[..., None]).astype(q.dtype)
    return out, (q, k, v, first, starts, out, m + jnp.log(l))


def _backward(key_chunk, saved, d_out):
    q, k, v, first, starts, out, log_sum = saved
    S, K = k.shape[1:3]
    key_chunk = _keys_at_a_time(key_chunk, q.shape[1], S)
    grouped, d_grouped = _grouped(q, K), _grouped(d_out, K)
    delta = jnp.sum(d_grouped.astype(jnp.float32) * _grouped(out, K).astype(jnp.float32), -1)

    def step(j, carry):
        dq, dk, dv = carry
        k_j, v_j, scores = _scores(grouped, k, v, first, starts, j, key_chunk)
        p = jnp.exp(scores - log_sum[..., None])
        dv = _add(dv, _einsum("bkgcs,bkgch->bskh", p.astype(v.dtype), d_grouped), j, key_chunk)
        dp = _einsum("bkgch,bskh->bkgcs", d_grouped, v_j)
        ds = (p * (dp - delta[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
        dk = _add(dk, _einsum("bkgcs,bkgch->bskh", ds, grouped), j, key_chunk)
        return dq + _einsum("bkgcs,bskh->bkgch", ds, k_j), dk, dv

    start = (jnp.zeros(grouped.shape), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = jax.lax.fori_loop(*_visited(first, starts, q.shape[1], S, key_chunk), step, start)
    return _ungrouped(dq).astype(q.dtype), dk, dv, None, None


attend_chunk.defvjp(_forward, _backward)


def _keys_at_a_time(key_chunk: int | None, C: int, S: int) -> int:
    return min(key_chunk or max(SCORES // C, 128), S)  # fewer keys would leave the products too thin


def _visited(first: jax.Array, starts: jax.Array | None, C: int, S: int, key_chunk: int) -> tuple[Any, jax.Array]:
    """Chunks of keys from the earliest start up to the last query's own; padding queries beyond S add none."""
    end = (jnp.minimum(first + C, S) + key_chunk - 1) // key_chunk
    return 0 if starts is None else jnp.min(starts) // key_chunk, end


def _start(j: jax.Array, S: int, key_chunk: int) -> jax.Array:
    """Where key chunk j lies: the last one begins early where S is no multiple, and what it repeats is masked."""
    return jnp.minimum(j * key_chunk, S - key_chunk)


def _scores(grouped, k, v, first, starts, j, key_chunk):
    """Keys and values of chunk j [B, key_chunk, K, H], and their masked float32 scores [B, K, G, C, key_chunk]."""
    S, C = k.shape[1], grouped.shape[3]
    start = _start(j, S, key_chunk)
    k_j, v_j = (jax.lax.dynamic_slice_in_dim(x, start, key_chunk, axis=1) for x in (k, v))
    position = start + jnp.arange(key_chunk)
    seen = (position >= j * key_chunk)[None, :] & (position[None, :] <= first + jnp.arange(C)[:, None])
    if starts is not None:
        seen = (seen & (position >= starts[..., None]))[:, None, None]
    scores = _einsum("bkgch,bskh->bkgcs", grouped, k_j) / math.sqrt(k.shape[-1])
    return k_j, v_j, jnp.where(seen, scores, -jnp.inf)


def _add(total: jax.Array, part: jax.Array, j: jax.Array, key_chunk: int) -> jax.Array:
    """total with `part` added at chunk j. What chunks share gets a value from one of them and zeros from the other."""
    start = _start(j, total.shape[1], key_chunk)
    there = jax.lax.dynamic_slice_in_dim(total, start, key_chunk, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part.astype(total.dtype), start, axis=1)


def _grouped(x: jax.Array, K: int) -> jax.Array:
    """[B, C, N, H] -> [B, K, N / K, C, H]: the queries that share a key head stand together."""
    B, C, N, H = x.shape
    return x.reshape(B, C, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    B, K, G, C, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, C, K * G, H)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
