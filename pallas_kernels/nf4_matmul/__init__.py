"""y = x W^T and dx = dy W from packed 4-bit weights; dense products and an adapter's low-rank term beside them.

api (the op: gradient, packs, dispatch) on operands (a packed weight) and reference (what it means, in plain JAX), with
dense (XLA's products) or a kernel of triton/ or mosaic/; config (tiles, tuned tables) and shapes (of real models) say
which, and measure (timing) and tune (the fastest right way) find out.
"""

from pallas_kernels.nf4_matmul.adapted import low_rank_terms, matmul_adapted
from pallas_kernels.nf4_matmul.api import BACKENDS, is_for_cpu, matmul, matmul_joined, path
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed, dequantize
from pallas_kernels.nf4_matmul.reference import NESTED_BLOCK, unpack

__all__ = [
    "BACKENDS",
    "NESTED_BLOCK",
    "Codec",
    "Packed",
    "dense_matmul",
    "dequantize",
    "is_for_cpu",
    "low_rank_terms",
    "matmul",
    "matmul_adapted",
    "matmul_joined",
    "path",
    "unpack",
]
