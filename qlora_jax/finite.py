"""What is not finite in arrays on the host: found by bit patterns, at the speed of memory.

A float is NaN or infinite where all bits of its exponent are set. Without its sign such a number is larger, as an
integer, than every finite one: so the largest as a signed integer finds those without a sign, the largest as an
unsigned integer those with one. Nothing is compared as a float, and nothing is copied.
"""

import ml_dtypes
import numpy as np

from qlora_jax.errors import InputError

_AT_A_TIME = 2**19  # bytes that stay in a processor's cache between the two looks
_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}
_KNOWN = {np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}


def first_not_finite(values: np.ndarray) -> int | None:
    """Place, in C order, of the first NaN or infinity; None where there is none, or the values are no floats."""
    if values.dtype not in _KNOWN:
        return None
    flat, size = np.ravel(values), values.dtype.itemsize
    signed, unsigned = _INTEGERS[size]
    positive, negative = (np.asarray([x], values.dtype).view(unsigned)[0] for x in (np.inf, -np.inf))
    step = _AT_A_TIME // size
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        if part.view(signed).max() >= positive or part.view(unsigned).max() >= negative:
            bits = part.view(unsigned) & ~(negative ^ positive)
            return start + int(np.flatnonzero(bits >= positive)[0])
    return None


def check_finite(values: np.ndarray, name: str, mend: str, first: int = 0, total: int | None = None) -> None:
    """Raises InputError where a value is NaN or infinite.

    Args:
      values: of any dtype; what is no float is finite.
      name: what the error calls the array. mend: how to mend it.
      first, total: place of the first of the values in the whole array, and its size, where they are a part of it.
    """
    place = first_not_finite(values)
    if place is None:
        return
    kind = "NaN" if np.isnan(np.float64(np.ravel(values)[place])) else "inf"
    total = values.size if total is None else total
    raise InputError(f"{name} holds {kind} (value {first + place + 1:,} of {total:,}): {mend}")
