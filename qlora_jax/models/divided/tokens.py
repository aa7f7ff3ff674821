"""Attention of a device that has some of each row's tokens (mesh.sequence): its queries, and the keys of all."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import PLAIN, Scoring
from qlora_jax.mesh import sequence
from qlora_jax.models.attention import chosen, chunked_attention, masked_attention

IMPLEMENTATIONS = ("auto", "xla", "chunked")  # of models/attention's those that know where their queries begin


def attention_to_all(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    implementation: str,
    starts: jax.Array | None = None,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """causal_attention of consecutive tokens of each row; inside `shard_map`.

    Args:
      q: [B, C, N, H]. k, v: [B, C, K, H], of the same tokens.
      first: int32 [], their place in the row of T = S C tokens.
      implementation: one of IMPLEMENTATIONS; "auto" is "xla" for short rows, "chunked" for long ones.
      starts, scoring, sinks: see causal_attention.
    Returns:
      [B, C, N, H] in q's dtype, named "attention".
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation} attention takes queries from the first place on, not from another")
    k, v = sequence.of_all((k, v))
    T = k.shape[1]
    if chosen(implementation, T) == "chunked":
        out = chunked_attention(q, k, v, starts=starts, scoring=scoring, sinks=sinks, first=first)
    else:
        places, of_keys = first + jnp.arange(q.shape[1]), jnp.arange(T)
        seen = (of_keys <= places[:, None])[None]  # [1, C, T]
        seen = seen if starts is None else seen & (of_keys >= starts[..., None])
        out = masked_attention(q, k, v, seen, places[None], scoring, sinks)
    return checkpoint_name(out, "attention")
