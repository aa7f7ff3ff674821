"""What attention means, with all scores at once: it defines correctness, and no model uses it.

s = cap tanh(scale q k^T / cap) - slope (t - s);  p = exp(s) / (sum exp(s) + exp(sink)) over start[t] <= s <= t
out = p v                                                                                    (float32 throughout)
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.scoring import PLAIN, Scoring


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H], starts int32 [B, T], sinks [N] -> [B, T, N, H] in q's dtype."""
    T, N = q.shape[1:3]
    k, v = (jnp.repeat(x.astype(jnp.float32), N // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision="highest") * scoring.scale_of(q.shape[3])
    if scoring.softcap:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    places = jnp.arange(T)
    if scoring.slopes:
        scores -= jnp.asarray(scoring.slopes, jnp.float32)[:, None, None] * (places[:, None] - places)
    seen = (places <= places[:, None])[None]
    if starts is not None:
        seen &= places >= starts[..., None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :T]
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest").astype(q.dtype)
