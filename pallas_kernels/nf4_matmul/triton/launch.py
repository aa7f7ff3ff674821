"""What both launchers of Triton kernels need beside pallas_kernels/gpu.py: options of its compiler, the scales."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import ptx_version
from pallas_kernels.nf4_matmul.operands import Codec, Packed


def backend_options(compute_capability: int) -> dict[str, Any]:
    """What Triton's compiler is told. enable_fp_fusion: a multiply-add would round once where the reference rounds
    twice; dot products are not concerned."""
    return {"enable_fp_fusion": False, "ptx_version": ptx_version(compute_capability)}


def scale_operands(packed: Packed, codec: Codec) -> tuple[jax.Array | None, ...]:
    """absmax, scale_map, nested_absmax, offset as they are stored; plain scales are absmax alone."""
    if packed.nested_absmax is None:
        return packed.absmax, None, None, None
    return packed.absmax, jnp.asarray(np.asarray(codec.absmax_map, np.float32)), packed.nested_absmax, packed.offset
