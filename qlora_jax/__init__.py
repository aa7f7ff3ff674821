"""Finetune large language models in 4 bits, in JAX (QLoRA; Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023)."""

import os
from pathlib import Path

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

# With the extra `plan` JAX has a CUDA plugin without CUDA. Where there is no driver, it need not say so at length.
if not any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
