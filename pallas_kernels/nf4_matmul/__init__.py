"""y = x W^T and dx = dy W from packed 4-bit weights, and with an adapter's low-rank term."""

from pallas_kernels.nf4_matmul.api import BACKENDS, matmul, path
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.lora import low_rank_term, matmul_lora
from pallas_kernels.nf4_matmul.operands import Codec, Packed, dequantize
from pallas_kernels.nf4_matmul.reference import NESTED_BLOCK, unpack

__all__ = [
    "BACKENDS",
    "NESTED_BLOCK",
    "Codec",
    "Packed",
    "dense_matmul",
    "dequantize",
    "matmul",
    "low_rank_term",
    "matmul_lora",
    "path",
    "unpack",
]
