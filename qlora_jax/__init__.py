"""Finetune large language models in 4 bits, in JAX (QLoRA; Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023).

    import qlora_jax as qj

    model = qj.load("quickstart", quant="nf4+dq")  # a folder, a hub name, or the model that comes with the package
    run = qj.finetune(model, "alpaca.jsonl", steps=100)
    run.plot()
    print(model.generate("Name three primes."))
    model.save_adapter("my-adapter")

Names are imported when they are first asked for: importing the package costs nothing.
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.errors import InputError

if TYPE_CHECKING:
    from qlora_jax.api.finetune import FinetuneRun, finetune
    from qlora_jax.api.model import Model, load
    from qlora_jax.api.plan import PlanReport, plan
    from qlora_jax.quant.bitsandbytes import from_bitsandbytes, to_bitsandbytes
    from qlora_jax.quant.tensor import QuantizedTensor, dequantize, matmul, quantize

__all__ = [
    "FinetuneRun",
    "InputError",
    "Model",
    "PlanReport",
    "QuantizedTensor",
    "dequantize",
    "finetune",
    "from_bitsandbytes",
    "load",
    "matmul",
    "plan",
    "quantize",
    "to_bitsandbytes",
]

_HOMES = {
    "FinetuneRun": "api.finetune",
    "finetune": "api.finetune",
    "Model": "api.model",
    "load": "api.model",
    "PlanReport": "api.plan",
    "plan": "api.plan",
    "from_bitsandbytes": "quant.bitsandbytes",
    "to_bitsandbytes": "quant.bitsandbytes",
    "QuantizedTensor": "quant.tensor",
    "dequantize": "quant.tensor",
    "matmul": "quant.tensor",
    "quantize": "quant.tensor",
}

# What JAX reads when it is first imported. Its C++ parts write log lines to stderr from their first call on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# JAX's allocator takes 0.75 of a GPU by default; plans are made for this (qlora_jax.train.memory.MEMORY_FRACTION)
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
# With the extra `plan` JAX has a CUDA plugin without CUDA. Where there is no driver, it need not say so at length.
if not any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
