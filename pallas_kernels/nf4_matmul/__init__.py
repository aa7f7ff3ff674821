"""y = x W^T and dx = dy W from packed 4-bit weights."""

from pallas_kernels.nf4_matmul.api import BACKENDS, COMPUTE, Codec, Packed, dense_matmul, dequantize, matmul, path
from pallas_kernels.nf4_matmul.reference import NESTED_BLOCK, unpack

__all__ = [
    "BACKENDS",
    "COMPUTE",
    "NESTED_BLOCK",
    "Codec",
    "Packed",
    "dense_matmul",
    "dequantize",
    "matmul",
    "path",
    "unpack",
]
