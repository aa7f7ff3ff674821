"""The op: causal attention, differentiable in q, k, v and the sinks, that never has a row's scores in memory.

`starts` says of each token the first one that it sees: 0, its example's first in a packed row, or where its window
begins. It never falls along a row, and is at most the token's own place. So one number is every mask: tiles before it
are not visited. Padding stands at a row's end, where causality hides it.

What the backward pass needs beside q, k and v is the output and a float32 number for each query and head. Both have
names ("attention", "log_sums"; jax.ad_checkpoint.checkpoint_name): where they are kept, nothing is computed again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import config
from pallas_kernels.attention.scoring import PLAIN, Scoring
from pallas_kernels.attention.triton import launch
from pallas_kernels.gpu import device_kind, has_jax_triton

LARGEST = 2**31  # values of one row are addressed by 32-bit integers


def refusal(T: int, N: int, H: int, dtype: Any) -> str | None:
    """Why the kernels do not take rows of T tokens, N heads [H] of dtype; None if they do."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(dtype)}: flash attention takes bfloat16 and float16"
    if H not in config.HEAD_WIDTHS:
        return f"heads are {H} wide: flash attention takes multiples of 8 from 16 to 256"
    if T * N * H >= LARGEST:
        return f"a row has {T} x {N} x {H} values, more than 2^31"
    return None


def is_fastest(T: int, N: int, H: int, dtype: Any) -> bool:
    """Whether the table of the GPU that programs are traced for says so, and the kernels can be had."""
    if refusal(T, N, H, dtype) is not None:
        return False
    entry = config.table(device_kind()).get((H, config.bucket(T)), {})
    return config.flash_is_fastest(entry) and has_jax_triton()


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Each token attends to itself and all before it, from its start on.

    Args:
      q: [B, T, N, H], bfloat16 or float16. k, v: [B, T, K, H] of its dtype, N a multiple of K.
      starts: int32 [B, T], the first place that each token sees; never falls along a row. None is 0 for all.
      sinks: [N], a logit of each head that joins the softmax's denominator, or None.
      scoring: see Scoring.
    Returns:
      [B, T, N, H] in q's dtype; scores and sums are float32. It is named "attention".
    Raises:
      ValueError: shapes or dtypes that the kernels do not take.
      RuntimeError, ImportError: no NVIDIA GPU from compute capability 8.0, or no jax-triton.
    """
    _check(q, k, v, starts, sinks, scoring)
    slopes = jnp.asarray(scoring.slopes, jnp.float32) if scoring.slopes else None
    scoring = scoring._replace(slopes=())  # an array from here on
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    arrays = jax.lax.stop_gradient((q, k, v, starts, slopes, sinks))
    # where both go into stacked arrays of all layers, XLA:GPU would launch the kernel again, fused with the copy
    out, log_sums = jax.lax.optimization_barrier(_over_rows(partial(_forward, scoring))(arrays))
    out, log_sums = checkpoint_name(out, "attention"), checkpoint_name(log_sums, "log_sums")
    return _attended(scoring, q, k, v, (starts, slopes), sinks, out, log_sums)


def _check(q, k, v, starts, sinks, scoring) -> None:
    B, T, N, H = q.shape
    if (reason := refusal(T, N, H, q.dtype)) is not None:
        raise ValueError(reason)
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected [B, T, N or K, H]")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    for name, found, shape in (("starts", starts, (B, T)), ("sinks", sinks, (N,))):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} is {list(found.shape)}; expected {list(shape)}")
    if len(scoring.slopes) not in (0, N):
        raise ValueError(f"there are {len(scoring.slopes)} slopes; expected one for each of {N} heads")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(scoring, q, k, v, masks, sinks, out, log_sums):
    """`out`, which has the gradient of attention."""
    return out


def _attended_forward(scoring, q, k, v, masks, sinks, out, log_sums):
    return out, (q, k, v, masks, sinks, out, log_sums)


def _attended_backward(scoring, saved, d_out):
    q, k, v, (starts, slopes), sinks, out, log_sums = saved
    d_q, d_k, d_v, deltas = _over_rows(partial(_backward, scoring))((q, k, v, starts, slopes, out, d_out, log_sums))
    d_sinks = None
    if sinks is not None:  # its own weight in each sum, which nothing but the sum depends on
        weights = jnp.exp2(sinks[:, None] * jnp.log2(jnp.e) - log_sums)
        d_sinks = -jnp.sum(weights * deltas, axis=(0, 2))
    return d_q, d_k, d_v, None, d_sinks, None, None


_attended.defvjp(_attended_forward, _attended_backward)


def _forward(scoring, arrays):
    q, k, v, starts, slopes, sinks = arrays
    return launch.forward(q, k, v, (starts, slopes), sinks, scoring)


def _backward(scoring, arrays):
    q, k, v, starts, slopes, out, d_out, log_sums = arrays
    masks = (starts, slopes)
    d_q, deltas = launch.queries_gradient(q, k, v, masks, out, d_out, log_sums, scoring)
    d_k, d_v = launch.keys_gradient(q, k, v, masks, d_out, log_sums, deltas, scoring)
    return d_q, d_k, d_v, deltas


def _over_rows(kernel):
    """The kernel, where vmap's axis (a pack of adapters) makes more rows of arrays [B, ...]; others do not vary."""

    @jax.custom_batching.custom_vmap
    def attend(arrays):
        return kernel(arrays)

    @attend.def_vmap
    def fold(A, batched, arrays):
        (batched,) = batched

        def folded(array, varies):
            if array is None:
                return None
            if array.ndim - varies == 1:  # slopes and sinks
                if varies:
                    raise ValueError("sinks do not vary within a pack")
                return array
            array = array if varies else jnp.broadcast_to(array, (A, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        is_none = lambda leaf: leaf is None  # noqa: E731
        found = attend(jax.tree.map(folded, arrays, batched, is_leaf=is_none))
        unfolded = jax.tree.map(lambda array: array.reshape(A, -1, *array.shape[1:]), found)
        return unfolded, jax.tree.map(lambda _: True, unfolded)

    return attend
