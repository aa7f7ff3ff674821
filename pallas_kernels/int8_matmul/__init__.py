"""y = x W^T and dx = dy W for W in 8 bits a weight, as LLM.int8() has it (Dettmers et al., 2022).

rows (a matrix in 8 bits, a scale a row: weights and activations) and api (the op: outliers, gradient, packs).
"""

from pallas_kernels.int8_matmul.api import Packed, matmul_joined
from pallas_kernels.int8_matmul.rows import dequantize, largest_float16, quantize_rows

__all__ = ["Packed", "dequantize", "largest_float16", "matmul_joined", "quantize_rows"]
