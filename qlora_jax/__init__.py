"""Finetune large language models in 4 bits, in JAX (QLoRA; Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023)."""

from qlora_jax.errors import InputError
from qlora_jax.quant.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from qlora_jax.quant.tensor import QuantizedTensor, dequantize, matmul, quantize

__all__ = [
    "InputError",
    "QuantizedTensor",
    "dequantize",
    "from_bitsandbytes",
    "matmul",
    "quantize",
    "to_bitsandbytes",
]
