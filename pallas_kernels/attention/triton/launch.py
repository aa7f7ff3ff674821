"""Launches the kernels. Nothing here imports Triton before a kernel is really called."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import config
from pallas_kernels.attention.scoring import Scoring
from pallas_kernels.gpu import current_gpu, load_jax_triton, ptx_version, shared_limit

COUNTED = 1024  # starts that a program looks at together, to find the queries that see its keys
Masks = tuple[jax.Array | None, jax.Array | None]  # starts int32 [B, T], slopes float32 [N]


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, sinks: jax.Array | None, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, H] and log2 of the sums, float32 [B, N, T]; sinks float32 [N]."""
    load_jax_triton("flash")
    from pallas_kernels.attention.triton.forward import forward_kernel

    outputs = (jax.ShapeDtypeStruct(q.shape, q.dtype), _row_sums(q))
    return _call(forward_kernel, "forward", (q, k, v, *masks, sinks), outputs, q, k, scoring)


def queries_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: Masks,
    out: jax.Array,
    d_out: jax.Array,
    log_sums: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """d q, and sum(d_out * out) of each query and head: float32 [B, N, T]."""
    load_jax_triton("flash")
    from pallas_kernels.attention.triton.backward import queries_kernel

    outputs = (jax.ShapeDtypeStruct(q.shape, q.dtype), _row_sums(q))
    return _call(queries_kernel, "queries", (q, k, v, *masks, out, d_out, log_sums), outputs, q, k, scoring)


def keys_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: Masks,
    d_out: jax.Array,
    log_sums: jax.Array,
    deltas: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """d k and d v."""
    load_jax_triton("flash")
    from pallas_kernels.attention.triton.backward import keys_kernel

    outputs = (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype))
    return _call(keys_kernel, "keys", (q, k, v, *masks, d_out, log_sums, deltas), outputs, q, k, scoring)


def _row_sums(q: jax.Array) -> jax.ShapeDtypeStruct:
    B, T, N, _ = q.shape
    return jax.ShapeDtypeStruct((B, N, T), jnp.float32)


def _call(kernel: Any, which: str, arrays: tuple, outputs: tuple, q: jax.Array, k: jax.Array, scoring: Scoring) -> Any:
    gpu = current_gpu("flash")
    B, T, N, H = q.shape
    tiles: config.Tiles = getattr(config.tiles(H, shared_limit(gpu.compute_capability)), which)
    products = {"forward": 2, "queries": 3, "keys": 4}[which]
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *outputs) if a is not None)
    return load_jax_triton("flash").triton_call(
        *arrays,
        T=T,
        kernel=kernel,
        out_type=outputs,
        grid=grid(which, q.shape, k.shape[2], tiles),
        name=f"attention_{which}",
        compute_capability=gpu.compute_capability,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        backend_options=options(gpu.compute_capability),
        cost_estimate={"flops": products * B * N * T * T * H, "bytes_accessed": moved},
        **constants(which, N, k.shape[2], H, tiles, scoring),
    )


def grid(which: str, shape: tuple[int, ...], K: int, tiles: config.Tiles) -> tuple[int, int]:
    """Programs of a kernel for q [B, T, N, H]."""
    B, T, N, _ = shape
    return (B * K, -(-T // tiles.block_k)) if which == "keys" else (B * N, -(-T // tiles.block_q))


def constants(which: str, N: int, K: int, H: int, tiles: config.Tiles, scoring: Scoring) -> dict[str, Any]:
    """A kernel's compile-time arguments."""
    found = {
        "N": N,
        "K": K,
        "H": H,
        "SCALE": float(scoring.scale_of(H)),
        "CAP": float(scoring.softcap),
        "BLOCK_H": config.block_h(H),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_K": tiles.block_k,
    }
    return found | ({"COUNTED": COUNTED} if which == "keys" else {})


def options(compute_capability: int) -> dict[str, Any]:
    """What Triton's compiler is told: here a multiply-add may round once."""
    return {"enable_fp_fusion": True, "ptx_version": ptx_version(compute_capability)}
