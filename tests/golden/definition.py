"""Blockwise 4-bit quantization written out by definition, shared by the golden-file scripts.

Only numpy and torch's rounding are used here, no quantization library: the scripts compare this with bitsandbytes, and
dequantized values are taken from here because bitsandbytes' AVX-512 dequantization is wrong for some shapes.

Letters: O out-features, I in-features, n = O * I, c = ceil(n / block_size) blocks.
"""

import numpy as np
import torch

NESTED_BLOCK = 256

NF4_TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# Bit-pattern order: sign, two exponent bits, one mantissa bit, over the largest value.
FP4_TABLE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """uint8 [ceil(n / 2)] -> 4-bit codes uint8 [count]; the first of two values sits in the high nibble."""
    flat = packed.reshape(-1)
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:count]


def quantize(weight: np.ndarray, quant_format: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [O, I] -> (packed uint8 [ceil(n / 2), 1], absmax float32 [c]).

    Full blocks multiply by the reciprocal of absmax, the ragged last block divides; ties go to the lower value.
    """
    table = TABLES[quant_format]
    order = np.argsort(table, kind="stable")  # fp4 has two zeros, 0 then 8: their midpoint 0 splits the signs
    ascending = table[order]
    midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2)
    flat = weight.reshape(-1).astype(np.float32)
    full = flat.size - flat.size % block_size
    blocks = flat[:full].reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1) if full else np.zeros(0, np.float32)
    reciprocal = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    scaled = np.clip(blocks * reciprocal[:, None], -1, 1).reshape(-1)
    if full < flat.size:
        last = np.maximum(np.abs(flat[full:]).max(), np.float32(1e-38))
        absmax = np.append(absmax, last)
        scaled = np.append(scaled, np.clip(flat[full:] / last, -1, 1))
    if scaled.size % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = order[np.searchsorted(midpoints, scaled, side="left")].astype(np.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax.astype(np.float32)


def nearest_codes(values: np.ndarray, code_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [c] -> (codes uint8 [c], nested absmax float32 [ceil(c / 256)]): brute-force nearest value of the map.

    values * (1 / nested absmax) in float32, then the exact distance to all 256 values in float64; a tie goes to the
    lower code. A block of zeros gives code 0, as both paths of bitsandbytes do (its scale is 0 whatever the code).
    """
    codes = np.zeros(values.size, np.uint8)
    scales = []
    for start in range(0, values.size, NESTED_BLOCK):
        block = values[start : start + NESTED_BLOCK]
        scale = np.abs(block).max()
        scales.append(scale)
        if scale > 0:
            scaled = block * (np.float32(1) / scale)
            distance = np.abs(scaled.astype(np.float64)[:, None] - code_map.astype(np.float64)[None, :])
            codes[start : start + NESTED_BLOCK] = distance.argmin(axis=1)
    return codes, np.array(scales, np.float32)


def nested_absmax_values(
    codes: np.ndarray, nested_absmax: np.ndarray, code_map: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """8-bit codes [c] -> absmax float32 [c]: map[code] * nested_absmax, rounded, + offset, rounded (not fused)."""
    product = code_map[codes] * nested_absmax[np.arange(codes.size) // NESTED_BLOCK]
    return (product.astype(np.float32) + np.float32(offset)).astype(np.float32)


def dequantize(
    packed: np.ndarray, absmax: np.ndarray, table: np.ndarray, block_size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Packed codes and absmax float32 [c] -> float32 of `shape`: table[code] * absmax, rounded once; -0 becomes +0."""
    count = int(np.prod(shape))
    codes = unpack(packed, count)
    values = table[codes] * absmax[np.arange(count) // block_size]
    return (values + np.float32(0)).reshape(shape)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 -> the 16-bit dtype, round to nearest even, -0 becomes +0; bfloat16 as its bits in uint16."""
    tensor = torch.from_numpy(np.array(values)).to(dtype)
    tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
    return tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()


def dynamic_map() -> np.ndarray:
    """The signed dynamic 8-bit map, float32 [256] ascending, from bitsandbytes itself (its rounding is torch's)."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().numpy()


def nf4_double_quantized(weight: np.ndarray, block_size: int = 64) -> np.ndarray:
    """float32 [O, I] -> its NF4 + double-quantized values float32 [O, I], all by definition."""
    packed, absmax = quantize(weight, "nf4", block_size)
    offset = torch.from_numpy(absmax).mean().numpy()
    code_map = dynamic_map()
    codes, nested = nearest_codes(absmax - offset, code_map)
    absmax = nested_absmax_values(codes, nested, code_map, offset)
    return dequantize(packed, absmax, NF4_TABLE, block_size, weight.shape)
