"""Blockwise 4-bit quantization and its double quantization, as bitsandbytes' CPU path computes them.

    scaled = clip(x * (1 / max(absmax, 1e-38)), -1, 1)      full blocks: multiplication by the reciprocal
    scaled = clip(x / max(absmax, 1e-38), -1, 1)            a short last block: division
    code   = number of thresholds strictly below scaled

The scales' 8-bit step multiplies in every block, the short last one too; a block of zeros gets code 0. Source: QLoRA,
section 3; bitsandbytes 0.50, `backends/default/ops.py`. One difference: a scale's 8-bit code is the nearest value of
the dynamic map (as bitsandbytes' CUDA kernel picks it; its CPU path is now and then one off).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.finite import largest_magnitude
from pallas_kernels.nf4_matmul import NESTED_BLOCK, Packed
from qlora_jax.quant.codebooks import Codebook, absmax_map

CHUNK = 2**22  # values of a large weight that are in work at a time, in 32 bits
_LOOPED = 2**14  # so many scales and fewer are added up in a loop: levels one by one take longer to compile
_TINY = 1e-38  # below the smallest normal number: XLA computes with it as with zero, but stores it


@partial(jax.jit, static_argnames=("book", "block_size", "double_quant"))
def quantize_packed(w: jax.Array, book: Codebook, block_size: int, double_quant: bool) -> tuple[Packed, jax.Array]:
    """w [...] any float dtype, n values -> its packed arrays, and float32 [] that is finite when all of w and they are.

    Where a value is not finite its block's scale is infinite, and with double quantization every scale is NaN or
    infinite, so that what is dequantized shows it.
    """
    if _in_chunks(w.size, block_size):
        codes, absmax = _pack_in_chunks(w, book, block_size)
    else:
        codes, absmax = _pack(w.reshape(-1), book, block_size)
    check = largest_magnitude(absmax)
    if not double_quant:
        return Packed(codes, absmax, None, None), check
    offset = _mean(absmax)
    absmax_codes, nested_absmax = _rank_scales(absmax - offset)
    check = largest_magnitude(jnp.stack([check, offset, largest_magnitude(nested_absmax)]))  # a mean may overflow
    return Packed(codes, absmax_codes, nested_absmax, offset), check


def temporary_bytes(n: int, block_size: int) -> int:
    """Device memory that `quantize_packed` takes at most beside its n values and its results.

    Ranking takes 32 bits and some bytes of codes a value in work; after it, averaging and rounding the scales takes
    five float32 arrays of the next power of two at most.
    """
    in_work = CHUNK if _in_chunks(n, block_size) else n
    return max(6 * in_work, 20 << (-(-n // block_size) - 1).bit_length()) + 2**21


def _in_chunks(n: int, block_size: int) -> bool:
    return n > CHUNK and n % (2 * block_size) == 0


def _pack_in_chunks(w: jax.Array, book: Codebook, block_size: int) -> tuple[jax.Array, jax.Array]:
    """What `_pack` gives for w's values, with no more than CHUNK of them in 32 bits at a time.

    A chunk is a run of blocks of the first half of w and the run of the second half that shares its bytes. The last
    chunk begins early enough to be whole; what it does twice comes out the same.
    """
    blocks = w.size // 2 // block_size
    halves, step = w.reshape(2, blocks, block_size), min(blocks, CHUNK // (2 * block_size))

    def chunk(index: jax.Array, packed: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, absmax = packed
        start = jnp.minimum(index * step, blocks - step)
        part = jax.lax.dynamic_slice(halves, (0, start, 0), (2, step, block_size))
        part_codes, part_absmax = _pack(part.reshape(-1), book, block_size)
        codes = jax.lax.dynamic_update_slice(codes, part_codes, (start * block_size,))
        return codes, jax.lax.dynamic_update_slice(absmax, part_absmax.reshape(2, step), (0, start))

    empty = jnp.zeros(w.size // 2, jnp.uint8), jnp.zeros((2, blocks), jnp.float32)
    codes, absmax = jax.lax.fori_loop(0, -(-blocks // step), chunk, empty)
    return codes, absmax.reshape(-1)


def _pack(flat: jax.Array, book: Codebook, block_size: int) -> tuple[jax.Array, jax.Array]:
    """float [n] -> packed codes uint8 [ceil(n / 2)], absmax float32 [ceil(n / block_size)]."""
    ranks, absmax = _rank(flat, np.asarray(book.thresholds, np.float32), block_size)
    codes = (
        ranks if book.codes_by_rank == tuple(range(len(book.codes_by_rank))) else _permute(ranks, book.codes_by_rank)
    )
    # the barrier: fused into the packing, ranking is not vectorized and takes six times as long on CPUs
    return _pack_halves(jax.lax.optimization_barrier(codes), pad_code=_zero_code(book)), absmax


def _rank(flat: jax.Array, thresholds: np.ndarray, block_size: int) -> tuple[jax.Array, jax.Array]:
    """float [n] -> thresholds strictly below each scaled value uint8 [n], absmax float32 [ceil(n / block_size)]."""
    full = flat.shape[0] // block_size * block_size
    blocks = flat[:full].reshape(-1, block_size).astype(jnp.float32)
    absmax = largest_magnitude(blocks, axis=1)
    ranks = _count_below(jnp.clip(blocks * _reciprocal(absmax)[:, None], -1, 1), thresholds).reshape(-1)
    if full == flat.shape[0]:
        return ranks, absmax
    rest = flat[full:].astype(jnp.float32)
    rest_absmax = largest_magnitude(rest)
    rest_ranks = _count_below(jnp.clip(rest / jnp.where(rest_absmax == 0, 1, rest_absmax), -1, 1), thresholds)
    rest_absmax = jnp.where(rest_absmax == 0, _TINY, rest_absmax)
    return jnp.concatenate([ranks, rest_ranks]), jnp.append(absmax, rest_absmax)


def _reciprocal(absmax: jax.Array) -> jax.Array:
    """1 / absmax, finite for blocks of zeros; the barrier keeps XLA from dividing the values instead."""
    return jax.lax.optimization_barrier(1 / jnp.where(absmax == 0, 1, absmax))


def _rank_scales(centred: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [C'] -> 8-bit codes uint8 [C'], nested absmax float32 [ceil(C' / 256)]."""
    values = np.asarray(absmax_map(), np.float32)
    thresholds = (values[:-1] + values[1:]) / np.float32(2)
    count = centred.shape[0]
    blocks = jnp.pad(centred, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = largest_magnitude(blocks, axis=1)
    codes = _count_below(jnp.clip(blocks * _reciprocal(absmax)[:, None], -1, 1), thresholds)
    codes = jnp.where(absmax[:, None] == 0, jnp.uint8(0), codes)
    return codes.reshape(-1)[:count], absmax


def _mean(values: jax.Array) -> jax.Array:
    """float32 [n] -> float32 [], the mean rounded once, whatever order a backend would add in.

    The sum is a tree of exact additions (Knuth's two-sum; `high + low` is the sum so far), the quotient is corrected by
    its exact remainder. n and the quotient are cut into halves of 12 bits, so that products are exact.
    """
    n = values.shape[0]
    high = jnp.pad(values, (0, (1 << (n - 1).bit_length()) - n))
    low = jnp.zeros_like(high)
    while (size := high.shape[0]) > _LOOPED:
        high, low = _pairs_added(*(half for part in (high, low) for half in jnp.split(part, 2)))

    def level(done: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        half = size >> (done + 1)
        others = (jax.lax.dynamic_slice(jnp.concatenate([part, part]), (half,), (size,)) for part in sums)
        return _pairs_added(sums[0], next(others), sums[1], next(others))

    # the level that leaves `half` sums adds at all places, of which those below `half` count from then on
    high, low = jax.lax.fori_loop(0, size.bit_length() - 1, level, (high, low))
    high, low = high[0], low[0]
    quotient = high / n
    bits = jax.lax.bitcast_convert_type(quotient, jnp.uint32)
    coarse = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)
    fine = quotient - coarse
    n_coarse, n_fine = float(n & ~0xFFF), float(n & 0xFFF)
    remainder = (((high - coarse * n_coarse) - coarse * n_fine) - fine * n_coarse) - fine * n_fine
    return quotient + (remainder + low) / n


def _pairs_added(a: jax.Array, b: jax.Array, low_a: jax.Array, low_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a + low_a) + (b + low_b), element by element, as a rounded sum and what rounding lost of it."""
    high = a + b
    b_seen = high - a
    return high, low_a + low_b + ((a - (high - b_seen)) + (b - b_seen))


def _count_below(scaled: jax.Array, thresholds: np.ndarray) -> jax.Array:
    if len(thresholds) > 16:
        return _count_by_halving(scaled, thresholds)
    count = jnp.zeros(scaled.shape, jnp.uint8)
    for threshold in thresholds:
        count += (scaled > threshold).astype(jnp.uint8)
    return count


def _count_by_halving(scaled: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """_count_below of 2^k - 1 sorted thresholds; all of them for NaN. searchsorted takes twice as long to compile, four
    times as long to run, and three times the memory."""
    levels = len(thresholds).bit_length()
    assert len(thresholds) == 2**levels - 1
    table = jnp.asarray(thresholds)

    def level(done: jax.Array, count: jax.Array) -> jax.Array:
        more = jnp.int32(1 << (levels - 1)) >> done
        return jnp.where(jnp.take(table, count + more - 1, mode="clip") >= scaled, count, count + more)

    return jax.lax.fori_loop(0, levels, level, jnp.zeros(scaled.shape, jnp.int32)).astype(jnp.uint8)


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
