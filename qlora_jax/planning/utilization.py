"""What share of a device's rate a measured train step reaches.

model FLOPs      what the step's mathematics needs: 4 P of a frozen base's P weights a token, not 6 P, because frozen
                 weights take no gradient; 6 r of the adapters, the head and attention (planning/roofline.py)
hardware FLOPs   model FLOPs and what remat computes again
"""

import dataclasses

from qlora_jax.models.sizes import linear_weights
from qlora_jax.planning.gpus import PlannedGpu, gpu_of_kind
from qlora_jax.planning.roofline import step_flops
from qlora_jax.train.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Utilization:
    model_flops: float  # of a step
    hardware_flops: float
    flops_per_second: float  # of the device
    rate_source: str  # data sheet | measured matmul
    mfu: float  # model FLOPs over the step's time, as a share of the device's rate
    hfu: float  # hardware FLOPs likewise


def utilization(spec: RunSpec, adapter_params: int, step_seconds: float, here: PlannedGpu) -> Utilization:
    """Of a step of `spec.batch`. `here`: `gpu_here()`, whose rate holds where the card's data sheet is not known."""
    sheet = gpu_of_kind(here.device_kind)
    rate = here.flops_per_second if sheet is None else sheet.flops_per_second
    weights = linear_weights(spec.model.sizes)
    model = step_flops(spec, weights, adapter_params, recomputed=False)
    hardware = step_flops(spec, weights, adapter_params)
    return Utilization(
        model,
        hardware,
        rate,
        "measured matmul" if sheet is None else "data sheet",
        model / step_seconds / rate,
        hardware / step_seconds / rate,
    )
