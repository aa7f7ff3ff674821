"""The values that 4-bit codes and 8-bit codes (of scales, of optimizer state) stand for.

nf4, fp4: bitsandbytes' tables (`functional.get_4bit_type`); fp4's codes are ordered by bit pattern (sign, exponent,
mantissa), not by value. fp4 is the E2M1 of the paper (two bits of exponent, one of mantissa); fp4-e3m0 its E3M0: three
bits of exponent, so powers of two from 2^-6 to 1 and zero, as bitsandbytes' `create_fp8_map(True, 3, 0, 4)` has them.
int4: symmetric, -7..7 over absmax. Where 15 values are all, code 15 is never written.
Thresholds lie midway between neighbouring values, computed in float32; a value on one takes the lower neighbour.
"""

import dataclasses
from functools import cache

import numpy as np

from qlora_jax.errors import InputError

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_OVER_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
_E3M0_OVER_64 = (-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64, 64)
_INT4_OVER_7 = (*range(-7, 8), 7)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A 4-bit format.

    values: float32, value of code 0..15.
    thresholds: float32, ascending; the number of thresholds strictly below a scaled weight is its rank.
    codes_by_rank: the code of each rank (the identity where codes ascend with value).
    """

    name: str
    values: tuple[float, ...]
    thresholds: tuple[float, ...]
    codes_by_rank: tuple[int, ...]


def _codebook(name: str, values: np.ndarray, used: int = 16) -> Codebook:
    order = np.argsort(values[:used], kind="stable")
    ascending = values[order]
    thresholds = (ascending[:-1] + ascending[1:]) / np.float32(2)
    return Codebook(name, tuple(map(float, values)), tuple(map(float, thresholds)), tuple(map(int, order)))


CODEBOOKS = {
    "nf4": _codebook("nf4", np.asarray(_NF4, np.float32)),
    "fp4": _codebook("fp4", np.asarray(_FP4_OVER_12, np.float32) / np.float32(12)),
    "int4": _codebook("int4", np.asarray(_INT4_OVER_7, np.float32) / np.float32(7), used=15),
    "fp4-e3m0": _codebook("fp4-e3m0", np.asarray(_E3M0_OVER_64, np.float32) / np.float32(64), used=15),
}
_READ_ONLY = {"mxfp4": _codebook("mxfp4", np.asarray(_E2M1, np.float32))}  # quant/mxfp4: nothing is quantized to it


KNOWN = CODEBOOKS | _READ_ONLY


def codebook(name: str) -> Codebook:
    """The 4-bit format of that name. Raises InputError for an unknown one."""
    if name not in KNOWN:
        raise InputError(f"unknown 4-bit format {name!r}; known: {', '.join(CODEBOOKS)}")
    return KNOWN[name]


def absmax_map() -> tuple[float, ...]:
    """The 256 ascending values of an 8-bit scale: the signed dynamic map."""
    return dynamic_map(signed=True)


def scale_map(format: str) -> tuple[float, ...]:
    """The 256 values that the 8-bit scales of a format stand for."""
    return _powers_of_two() if format == "mxfp4" else absmax_map()


@cache
def _powers_of_two() -> tuple[float, ...]:
    """2^(s - 127); the last is NaN in MXFP4 and stands for no weight."""
    return (*(2.0 ** (s - 127) for s in range(255)), 0.0)


@cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 ascending values of dynamic 8-bit quantization (bitsandbytes' `create_dynamic_map`).

    Per decade i of 7: the midpoints of linspace(0.1, 1, k + 1) times 10^(i - 6), with k = 2^i of both signs, or
    k = 2^(i + 1) unsigned; plus 0 and 1. The largest decade is the finest.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        positive = (np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))).tolist()
        values.extend([*positive, *(-v for v in positive)] if signed else positive)
    return tuple(map(float, np.sort(np.asarray(values, np.float32))))


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """float32 [count] with torch's last bits: a float32 step from the nearer end, fused multiply-add."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)
