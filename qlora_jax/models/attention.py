"""Causal attention, and its form for long sequences: online softmax over chunks of keys, so no [T, S] scores exist.

    s = q k^T / sqrt(H);  m = max s;  l = sum exp(s - m);  out = sum exp(s - m) v / l          (float32 m, l and out)

A chunk of keys updates (m, l, out) of a chunk of queries and is forgotten; the backward pass computes the scores again
from log l + m. Keys beyond a chunk's last query are not visited at all. Source: Rabe and Staats, 2021 (arXiv
2112.05682); Dao, 2023 (arXiv 2307.08691) for the backward pass.

Of a row that holds several examples one after the other (packing) each token sees those of its own example alone:
`starts` names the first of them for every token. A window is a start too: a token's own place, less the window, plus
one.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import PLAIN, Scoring, flash_attention, is_fastest
from qlora_jax.models.chunks import chunk_size, in_chunks

IMPLEMENTATIONS = ("auto", "xla", "chunked", "flash", "cudnn")
LONGEST_WHOLE = 2048  # tokens: what "auto" still gives to "xla", which keeps all scores: 1 GB of float32 at 64 heads
WHOLE_SCORES = 2**29  # bytes: of prompts, which memory for training was not planned for
QUERY_CHUNK = 1024  # queries that "chunked" takes at a time
SCORES = 1024 * 512  # of a head at a time: 134 MB of float32 at 64 heads


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 n / N), n = 1..N; where N is no power of two those of the next smaller, then every second of the next."""
    power = 2 ** math.floor(math.log2(heads))
    steps = [2 ** (-8 * n / power) for n in range(1, power + 1)]
    between = [2 ** (-4 * n / power) for n in range(1, 2 * (heads - power) + 1, 2)]
    return tuple(steps + between)


def window_starts(starts: jax.Array | None, places: jax.Array, window: Any) -> jax.Array:
    """The first place that each token sees where it sees `window` tokens, itself among them, within `starts`.

    Args:
      starts: int32 [B, T], or None for 0. places: int32 [B, T], of the tokens in their rows.
      window: int or int32 []; 0 is no window.
    """
    first = jnp.where(jnp.asarray(window) > 0, jnp.maximum(places - window + 1, 0), 0)
    return first if starts is None else jnp.maximum(starts, first)


def chosen(implementation: str, T: int, N: int = 0, H: int = 0, dtype: Any = jnp.float32) -> str:
    """What "auto" means for rows of T tokens and N heads [H] in dtype; every other name means itself.

    "flash" where it was measured to be the fastest on the GPU that programs are traced for; else "xla", or "chunked"
    above LONGEST_WHOLE.
    """
    if implementation != "auto":
        return implementation
    if is_fastest(T, N, H, dtype):
        return "flash"
    return "xla" if T <= LONGEST_WHOLE else "chunked"


def for_prompts(implementation: str, shape: tuple[int, int, int, int], dtype: Any) -> str:
    """As `chosen`, for queries [B, T, N, H]: what "auto" gives to "xla" has at most WHOLE_SCORES bytes of scores."""
    B, T, N, H = shape
    found = chosen(implementation, T, N, H, dtype)
    return "chunked" if implementation == "auto" and found == "xla" and 4 * B * N * T * T > WHOLE_SCORES else found


def segment_starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T] ids, equal ones side by side -> int32 [B, T]: where each token's segment begins in its row."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    starts: jax.Array | None = None,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Each token attends to itself and all before it, from its start on.

    Args:
      q: [B, T, N, H]. k, v: [B, T, K, H], N a multiple of K.
      implementation: one of IMPLEMENTATIONS; "cudnn" takes no starts.
      starts: int32 [B, T], the first place that each token sees, which never falls along a row; None is 0 for all.
      scoring: see Scoring; "cudnn" takes a scale alone.
      sinks: [N] or None: a score of each head that joins the softmax's denominator and has no value (gpt-oss). Frozen;
        not with "cudnn".
    Returns:
      [B, T, N, H] in q's dtype, named "attention"; the softmax is float32.
    """
    _, T, N, H = q.shape
    implementation = chosen(implementation, T, N, H, q.dtype)
    if implementation == "flash":  # which names its output itself, beside what else its gradient needs
        return flash_attention(q, k, v, starts, sinks, scoring)
    return checkpoint_name(_unnamed(q, k, v, implementation, starts, scoring, sinks), "attention")


def _unnamed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    starts: jax.Array | None,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> jax.Array:
    """causal_attention by an implementation that is neither "auto" nor "flash"."""
    if implementation == "chunked":
        return chunked_attention(q, k, v, starts=starts, scoring=scoring, sinks=sinks)
    named: Any = implementation
    if starts is None and scoring.is_a_scale and sinks is None:
        return jax.nn.dot_product_attention(q, k, v, implementation=named, is_causal=True, scale=scoring.scale)
    if implementation == "cudnn":  # JAX would hand it a bias of [B, 1, T, T]: what flash attention is there to avoid
        raise ValueError("cudnn attention takes no starts, no softcap, no slopes and no sinks")
    places = jnp.arange(k.shape[1])
    if not scoring.is_a_scale or sinks is not None:
        seen = places <= places[:, None]  # [T, S]
        seen = seen[None] if starts is None else seen & (places >= starts[..., None])
        return masked_attention(q, k, v, seen, places[None], scoring, sinks)
    assert starts is not None
    seen = places >= starts[..., None]  # [B, T, S]
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], implementation=named, is_causal=True, scale=scoring.scale
    )


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    places: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention with all scores at once.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H].
      seen: bool [B or 1, T, S].
      places: int32 [B or 1, T], of the queries among the keys, for ALiBi's distances.
      scoring: see Scoring. sinks: see causal_attention.
    Returns:
      [B, T, N, H] in q's dtype; the softmax is float32.
    """
    if scoring.is_a_scale and sinks is None:
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scoring.scale)
    S, K, H = k.shape[1:]
    grouped = _grouped(q, K)
    distances = places[..., None] - jnp.arange(S)  # [B or 1, T, S]
    scores = _scored(_einsum("bkgch,bskh->bkgcs", grouped, k), H, K, distances, scoring)
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sunk = jnp.broadcast_to(_of_heads(sinks, K)[..., None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sunk], axis=-1), axis=-1)[..., :-1]
    return _ungrouped(_einsum("bkgcs,bskh->bkgch", weights.astype(v.dtype), v)).astype(q.dtype)


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_chunk: int = QUERY_CHUNK,
    key_chunk: int | None = None,
    starts: jax.Array | None = None,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """As causal_attention, for query_chunk queries and key_chunk keys at a time (see attend_chunk): memory O(T).

    With `first`, int32 [], q [B, C, N, H] and starts [B, C] are of the tokens from that place on, k and v of all.
    """
    T = q.shape[1]
    size = chunk_size(T, query_chunk)
    padded = jnp.pad(q, ((0, 0), (0, -T % size), (0, 0), (0, 0)))  # queries that nobody reads
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, -T % size)), mode="edge")
    attend = _Attend(key_chunk, size, scoring)
    return in_chunks(attend, size, (starts, sinks, first), (k, v), padded)[:, :T]


class _Attend:
    """attend_chunk as a function for in_chunks; equal ones are one function to a compilation."""

    def __init__(self, key_chunk: int | None, size: int, scoring: Scoring):
        self.key_chunk, self.size, self.scoring = key_chunk, size, scoring

    def __call__(
        self, frozen: tuple[Any, Any, Any], keys: tuple[jax.Array, jax.Array], q: jax.Array, first: jax.Array
    ) -> jax.Array:
        starts, sinks, before = frozen
        if starts is not None:
            starts = jax.lax.dynamic_slice_in_dim(starts, first, self.size, axis=1)
        first = first if before is None else before + first
        return attend_chunk(q, *keys, first, starts, self.key_chunk, self.scoring, sinks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Attend) and self._settings == other._settings

    def __hash__(self) -> int:
        return hash((_Attend, self._settings))

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.key_chunk, self.size, self.scoring


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    starts: jax.Array | None = None,
    key_chunk: int | None = None,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of consecutive queries to the keys at and before each, from its start on.

    Args:
      q: [B, C, N, H], at positions first..first + C - 1.
      k, v: [B, S, K, H], at positions 0..S - 1.
      first: int32 [].
      starts: int32 [B, C], the first key that each query sees; None is 0 for all. Chunks of keys before the earliest
        are not visited.
      key_chunk: keys whose scores exist at a time; None makes them SCORES a head.
      scoring: see Scoring. sinks: see causal_attention.
    Returns:
      [B, C, N, H] in q's dtype.
    """
    return _forward(q, k, v, first, starts, key_chunk, scoring, sinks)[0]


def _forward(q, k, v, first, starts, key_chunk, scoring, sinks):
    B, C, N, H = q.shape
    S, K = k.shape[1:3]
    key_chunk = _keys_at_a_time(key_chunk, C, S)
    grouped = _grouped(q, K)

    def step(j, carry):
        m, l, out = carry
        k_j, v_j, scores = _scores(grouped, k, v, first, starts, j, key_chunk, scoring)
        new_m = jnp.maximum(m, scores.max(-1))
        p, fade = jnp.exp(scores - new_m[..., None]), jnp.exp(m - new_m)
        out = out * fade[..., None] + _einsum("bkgcs,bskh->bkgch", p.astype(v.dtype), v_j)
        return new_m, l * fade + p.sum(-1), out

    rows = (B, K, N // K, C)
    start = (jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros((*rows, H)))
    m, l, out = jax.lax.fori_loop(*_visited(first, starts, C, S, key_chunk), step, start)
    if sinks is not None:  # one score more, which the backward pass finds in log l + m
        sunk = jnp.broadcast_to(_of_heads(sinks, K), rows)
        new_m = jnp.maximum(m, sunk)
        fade = jnp.exp(m - new_m)
        m, l, out = new_m, l * fade + jnp.exp(sunk - new_m), out * fade[..., None]
    out = _ungrouped(out / l[..., None]).astype(q.dtype)
    return out, (q, k, v, first, starts, out, m + jnp.log(l))


def _backward(key_chunk, scoring, saved, d_out):
    q, k, v, first, starts, out, log_sum = saved
    S, K = k.shape[1:3]
    key_chunk = _keys_at_a_time(key_chunk, q.shape[1], S)
    grouped, d_grouped = _grouped(q, K), _grouped(d_out, K)
    delta = jnp.sum(d_grouped.astype(jnp.float32) * _grouped(out, K).astype(jnp.float32), -1)

    def step(j, carry):
        dq, dk, dv = carry
        k_j, v_j, scores = _scores(grouped, k, v, first, starts, j, key_chunk, scoring)
        p = jnp.exp(scores - log_sum[..., None])
        dv = _add(dv, _einsum("bkgcs,bkgch->bskh", p.astype(v.dtype), d_grouped), j, key_chunk)
        dp = _einsum("bkgch,bskh->bkgcs", d_grouped, v_j)
        ds = _unscored(p * (dp - delta[..., None]), grouped, k_j, scoring).astype(q.dtype)
        dk = _add(dk, _einsum("bkgcs,bkgch->bskh", ds, grouped), j, key_chunk)
        return dq + _einsum("bkgcs,bskh->bkgch", ds, k_j), dk, dv

    start = (jnp.zeros(grouped.shape), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = jax.lax.fori_loop(*_visited(first, starts, q.shape[1], S, key_chunk), step, start)
    return _ungrouped(dq).astype(q.dtype), dk, dv, None, None, None


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


def _scores(grouped, k, v, first, starts, j, key_chunk, scoring):
    """Keys and values of chunk j [B, key_chunk, K, H], and their masked float32 scores [B, K, G, C, key_chunk]."""
    S, C = k.shape[1], grouped.shape[3]
    start = _start(j, S, key_chunk)
    k_j, v_j = (jax.lax.dynamic_slice_in_dim(x, start, key_chunk, axis=1) for x in (k, v))
    position = start + jnp.arange(key_chunk)
    seen = (position >= j * key_chunk)[None, :] & (position[None, :] <= first + jnp.arange(C)[:, None])
    if starts is not None:
        seen = (seen & (position >= starts[..., None]))[:, None, None]
    distances = first + jnp.arange(C)[:, None] - position
    scores = _scored(_einsum("bkgch,bskh->bkgcs", grouped, k_j), k.shape[-1], k.shape[2], distances[None], scoring)
    return k_j, v_j, jnp.where(seen, scores, -jnp.inf)


def _scored(products: jax.Array, H: int, K: int, distances: jax.Array, scoring: Scoring) -> jax.Array:
    """float32 q k^T [B, K, G, C, S] -> scores; distances int32 [B or 1, C, S]."""
    scores = products / math.sqrt(H) if scoring.scale is None else products * scoring.scale
    if scoring.softcap:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    if scoring.slopes:
        slopes = jnp.asarray(scoring.slopes, jnp.float32).reshape(K, -1)[:, :, None, None]
        scores = scores - slopes * distances[:, None, None].astype(jnp.float32)
    return scores


def _unscored(d_scores: jax.Array, grouped: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """d scores -> d products, of `_scored`."""
    H = grouped.shape[-1]
    if scoring.softcap:
        scale = 1 / math.sqrt(H) if scoring.scale is None else scoring.scale
        bent = jnp.tanh(_einsum("bkgch,bskh->bkgcs", grouped, k) * (scale / scoring.softcap))
        d_scores = d_scores * (1 - bent * bent)
    return d_scores / math.sqrt(H) if scoring.scale is None else d_scores * scoring.scale


def _add(total: jax.Array, part: jax.Array, j: jax.Array, key_chunk: int) -> jax.Array:
    """total with `part` added at chunk j. What chunks share gets a value from one of them and zeros from the other."""
    start = _start(j, total.shape[1], key_chunk)
    there = jax.lax.dynamic_slice_in_dim(total, start, key_chunk, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part.astype(total.dtype), start, axis=1)


def _of_heads(sinks: jax.Array, K: int) -> jax.Array:
    """[N] -> float32 [1, K, N / K, 1], beside a query's scores."""
    return sinks.astype(jnp.float32).reshape(1, K, -1, 1)


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
