"""y = x W^T and dx = dy W from packed 4-bit weights."""

from pallas_kernels.nf4_matmul.api import Codec, Packed, dense_matmul, dequantize, matmul
from pallas_kernels.nf4_matmul.reference import NESTED_BLOCK, unpack

__all__ = ["NESTED_BLOCK", "Codec", "Packed", "dense_matmul", "dequantize", "matmul", "unpack"]
