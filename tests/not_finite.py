"""Numbers of every bit pattern, and which of them are finite by the definition of IEEE 754, for tests of many rooms."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# bits of infinity, and of the signs and payloads that a NaN comes with: quiet, signalling, least and largest payload
_EXPONENTS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


def finite_by_definition(values: np.ndarray) -> np.ndarray:
    """bool like values: not all bits of the exponent are set."""
    kind, exponent = _EXPONENTS[values.dtype.name]
    return (values.view(kind) & kind(exponent)) != exponent


def not_finite(name: str) -> dict[str, np.generic]:
    """Both infinities, and NaN quiet and signalling, of both signs, with small and large payloads."""
    kind, infinity = _EXPONENTS[name]
    bits, sign = 8 * np.dtype(kind).itemsize, 1 << (8 * np.dtype(kind).itemsize - 1)
    largest = (~infinity & (sign - 1)) & ((1 << bits) - 1)  # all bits of the mantissa
    quiet = (largest + 1) >> 1
    patterns = {
        "inf": infinity,
        "quiet": infinity | quiet,
        "quiet, payload": infinity | quiet | 3,
        "signalling": infinity | 1,
        "signalling, payload": infinity | (quiet - 1),
        "all ones": infinity | largest,
    }
    signed = patterns | {f"-{key}": value | sign for key, value in patterns.items()}
    return {key: np.asarray(value, kind).view(DTYPES[name])[()] for key, value in signed.items()}


def every_pattern(name: str) -> np.ndarray:
    """All 65,536 numbers of a 16-bit dtype; of float32 as many, with every sign and exponent, a third of them NaN."""
    kind, infinity = _EXPONENTS[name]
    if name != "float32":
        return np.arange(2**16, dtype=kind).view(DTYPES[name])
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    bits[: 2**14] |= infinity  # NaN of any payload
    bits[2**14 : 2**14 + 64] = infinity | (np.uint32(1) << (np.arange(64, dtype=np.uint32) % 23))  # one bit of it
    bits[2**15 : 2**15 + 8] = (infinity, infinity | 1 << 31, infinity - 1, infinity - 1 | 1 << 31, 0, 1 << 31, 1, 2)
    return bits.view(np.float32)
