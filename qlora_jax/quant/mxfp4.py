"""MXFP4, the 4-bit form of gpt-oss' experts: read as it is, never made here.

A row's values lie in blocks of 32. A block is 16 bytes, the first of two values in the low nibble, and a scale, a byte
s that stands for 2^(s - 127) (E8M0); a value is a number of 1 sign, 2 exponent and 1 mantissa bits (e2m1: 0, 0.5, 1,
1.5, 2, 3, 4, 6) times its block's scale, exact in bfloat16. Source: OCP Microscaling Formats 1.0.

In a QuantizedTensor the bytes s stand where 8-bit scales do, with a table of powers of two in place of the dynamic map,
nested scales of 1 and an offset of 0: so whatever takes double quantization takes this.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import NESTED_BLOCK
from qlora_jax.errors import InputError
from qlora_jax.quant.tensor import QuantizedTensor

FORMAT, BLOCK = "mxfp4", 32
_LARGEST = 252  # the byte of a scale whose largest value, 6 * 2^125, is finite in float32; 255 is NaN


def scale_byte(scale: float) -> int:
    """The byte of the power of two that is nearest to a scale."""
    return 127 + round(math.log2(scale))


def read(blocks: np.ndarray, scales: np.ndarray, name: str) -> QuantizedTensor:
    """A weight [O, I] of its parts uint8 [O, I / 32, 16] and [O, I / 32].

    Raises InputError for scales that are NaN or overflow. Values below 2^-126 may come out as zero.
    """
    if (largest := int(scales.max())) > _LARGEST:
        raise InputError(
            f"{name} has a scale byte of {largest}, which is {'NaN' if largest == 255 else 'too large for float32'}; a "
            "frozen weight must be finite"
        )
    codes = blocks.reshape(-1)
    half = codes.size // 2
    low, high = codes[:half], codes[half:]  # of the first half of all values, of the second
    packed = np.empty(codes.size, np.uint8)
    packed[::2] = (low & 0xF) | (high << 4)
    packed[1::2] = (low >> 4) | (high & 0xF0)
    return QuantizedTensor(
        jax.device_put(packed),
        jax.device_put(scales.reshape(-1)),
        jnp.ones(-(-scales.size // NESTED_BLOCK), jnp.float32),
        jnp.float32(0),
        shape=(blocks.shape[0], blocks.shape[1] * BLOCK),
        format=FORMAT,
        block_size=BLOCK,
    )
