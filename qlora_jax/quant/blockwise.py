"""Blockwise 4-bit quantization and its double quantization, as bitsandbytes' CPU path computes them.

    scaled = clip(x * (1 / max(absmax, 1e-38)), -1, 1)      full blocks: multiplication by the reciprocal
    scaled = clip(x / max(absmax, 1e-38), -1, 1)            a short last block: division
    code   = number of thresholds strictly below scaled

Source: REFERENCE of the QLoRA paper, section 3; bitsandbytes 0.50, `backends/default/ops.py`. One difference: a scale's 8-bit
code is the nearest value of the dynamic map (as bitsandbytes' CUDA kernel picks it; its CPU path is now and then one off).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import NESTED_BLOCK, Packed
from qlora_jax.quant.codebooks import Codebook, absmax_map

_TINY = 1e-38


@partial(jax.jit, static_argnames=("book", "block_size", "double_quant"))
def quantize_packed(w: jax.Array, book: Codebook, block_size: int, double_quant: bool) -> tuple[Packed, jax.Array]:
    """w [...] any float dtype, n values -> its packed arrays, and float32 [] that is finite when all of w is."""
    flat = w.reshape(-1)
    ranks, absmax = _rank(flat, np.asarray(book.thresholds, np.float32), block_size)
    codes = ranks if book.codes_by_rank == tuple(range(len(book.codes_by_rank))) else _permute(ranks, book.codes_by_rank)
    packed_codes = _pack_halves(codes, pad_code=_zero_code(book))
    check = jnp.max(absmax)
    if not double_quant:
        return Packed(packed_codes, absmax, None, None), check
    offset = jnp.mean(absmax)
    values = np.asarray(absmax_map(), np.float32)
    thresholds = (values[:-1] + values[1:]) / np.float32(2)
    absmax_codes, nested_absmax = _rank(absmax - offset, thresholds, NESTED_BLOCK)
    return Packed(packed_codes, absmax_codes, nested_absmax, offset), check


def _rank(flat: jax.Array, thresholds: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """float [n] -> uint8 [n] number of thresholds strictly below the scaled value, float32 [ceil(n / block_size)] absmax."""
    full = flat.shape[0] // block_size * block_size
    blocks = flat[:full].reshape(-1, block_size).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    reciprocal = jax.lax.optimization_barrier(1.0 / jnp.maximum(absmax, _TINY))
    ranks = _count_below(jnp.clip(blocks * reciprocal[:, None], -1, 1), thresholds).reshape(-1)
    if full == flat.shape[0]:
        return ranks, absmax
    rest = flat[full:].astype(jnp.float32)
    rest_absmax = jnp.maximum(jnp.max(jnp.abs(rest)), _TINY)
    rest_ranks = _count_below(jnp.clip(rest / rest_absmax, -1, 1), thresholds)
    return jnp.concatenate([ranks, rest_ranks]), jnp.append(absmax, rest_absmax)


def _count_below(scaled: jax.Array, thresholds: np.ndarray) -> jax.Array:
    if len(thresholds) > 16:
        return jnp.searchsorted(jnp.asarray(thresholds), scaled, side="left").astype(jnp.uint8)
    count = jnp.zeros(scaled.shape, jnp.uint8)
    for threshold in thresholds:
        count += (scaled > threshold).astype(jnp.uint8)
    return count


def _permute(ranks: jax.Array, codes_by_rank: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(codes_by_rank, jnp.uint8)[ranks]


def _zero_code(book: Codebook) -> int:
    return book.codes_by_rank[int(np.sum(np.asarray(book.thresholds) < 0))]


def _pack_halves(codes: jax.Array, pad_code: int) -> jax.Array:
    """uint8 [n] -> uint8 [ceil(n / 2)]: value j low, value j + ceil(n / 2) high."""
    half = (codes.shape[0] + 1) // 2
    high = codes[half:]
    if high.shape[0] < half:
        high = jnp.append(high, jnp.uint8(pad_code))
    return codes[:half] | (high << 4)
