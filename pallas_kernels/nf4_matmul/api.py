"""The op: y = x W^T for a packed W, differentiable in x, with the packed arrays as its only residuals.

Three backends. "xla" dequantizes a weight and leaves the product to XLA: every device, every shape; the default.
"triton" (triton_backend.py: NVIDIA GPUs from Ampere on) and "mosaic" (mosaic_hopper.py: Hopper, training row counts)
dequantize inside the product; shapes that their kernels refuse take "xla". `path` tells which way a weight goes.

Three computations of the forward product. "full" multiplies in x's dtype; the default. "fp8" and "fp8_row" round both
operands to 8 bits, x with a scale for every 64 in-features or for every row (fp8.py): with backend "triton" in a kernel
for Ada and Hopper, elsewhere in a plain emulation that is no faster.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import fp8, reference

_KERNELS = {"triton": "triton_backend", "mosaic": "mosaic_hopper"}  # backend -> its module, imported when it is chosen
_FP8_KERNELS = {"triton": "triton_fp8_backend"}
BACKENDS = ("xla", *_KERNELS)
COMPUTE = ("full", "fp8", "fp8_row")
log = logging.getLogger(__name__)


class Codec(NamedTuple):
    """What is fixed when a program is compiled. Tables are tuples so that a codec can be hashed."""

    shape: tuple[int, int]  # (O, I)
    block_size: int  # values that share one absmax
    table: tuple[float, ...]  # 16 values
    absmax_map: tuple[float, ...]  # 256 values, read only with double quantization
    backend: str = "xla"  # one of BACKENDS
    compute: str = "full"  # of the forward product: one of COMPUTE


class Packed(NamedTuple):
    """The arrays of one weight; see reference.py for the layout."""

    codes: jax.Array  # uint8 [ceil(O * I / 2)]
    absmax: jax.Array  # float32 [C'], or uint8 [C'] with double quantization
    nested_absmax: jax.Array | None  # float32 [ceil(C' / 256)]
    offset: jax.Array | None  # float32 []


def dequantize(packed: Packed, codec: Codec, dtype: jnp.dtype) -> jax.Array:
    """W [O, I] in dtype, bit-exact with bitsandbytes' definition."""
    absmax_map = np.asarray(codec.absmax_map, np.float32)
    absmax = reference.dequantize_absmax(packed.absmax, packed.nested_absmax, packed.offset, absmax_map)
    table = np.asarray(codec.table, np.float32)
    return reference.dequantize(packed.codes, absmax, table, codec.shape, codec.block_size, dtype)


def path(codec: Codec, dtype: jnp.dtype) -> str:
    """The backend that `matmul` takes for activations of dtype: the codec's, or "xla" where kernels refuse the weight.

    Raises ValueError for an unknown backend or computation, or two that do not go together; RuntimeError for 8-bit
    kernels where there is no NVIDIA GPU to ask what it has.
    """
    if codec.backend not in BACKENDS:
        raise ValueError(f"backend is {codec.backend!r}, expected one of {', '.join(BACKENDS)}")
    if codec.compute not in COMPUTE:
        raise ValueError(f"compute is {codec.compute!r}, expected one of {', '.join(COMPUTE)}")
    if codec.backend == "xla":
        return "xla"
    if codec.compute != "full" and codec.backend not in _FP8_KERNELS:
        raise ValueError(
            f'backend {codec.backend!r} has no kernel for compute "{codec.compute}": set backend to '
            f'{" or ".join(_FP8_KERNELS)} or xla, or compute to "full"'
        )
    reason = _kernels(codec).unsupported(codec.shape, codec.block_size, dtype)
    if reason is None:
        return codec.backend
    _say_refused(codec.backend, codec.shape, reason)
    return "xla"


def _kernels(codec: Codec) -> ModuleType:
    modules = _KERNELS if codec.compute == "full" else _FP8_KERNELS
    return importlib.import_module(f"pallas_kernels.nf4_matmul.{modules[codec.backend]}")


@functools.cache
def _say_refused(backend: str, shape: tuple[int, int], reason: str) -> None:
    log.warning("nf4_matmul: the weight %s takes backend xla instead of %s: %s", list(shape), backend, reason)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """y = x W^T.

    Args:
      x: [..., I], float32 or bfloat16 or float16.
      packed: the weight's arrays.
      codec: its shape (O, I), block size, tables, backend and computation.
    Returns:
      [..., O] in x's dtype, accumulated in float32.
    Raises:
      ValueError: x's last dimension is not I, or the backend or the computation is unknown, or it has no kernel for it.
      RuntimeError, ImportError: backend "triton" or "mosaic" without its GPU or its packages.
    """
    if x.shape[-1] != codec.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, the weight [out, in] = {list(codec.shape)} takes {codec.shape[1]}"
        )
    if path(codec, x.dtype) != "xla":
        return _fused(_kernels(codec).forward, codec)(x, packed)
    x, packed = _not_before(x, packed)
    if codec.compute != "full":
        return _fused(fp8.forward, codec)(x, packed)
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract=1)


def _not_before(x: jax.Array, packed: Packed) -> tuple[jax.Array, Packed]:
    """The same arrays; a weight that is dequantized from them is not dequantized before x is there.

    Left alone, XLA:GPU dequantizes several of a layer's weights at its start and keeps them all. Only the scales pass
    the barrier: it would make a copy of a layer's slice of the codes.
    """
    x, absmax = jax.lax.optimization_barrier((x, packed.absmax))
    return x, packed._replace(absmax=absmax)


def dense_matmul(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    """x [..., K] times w over w's dimension `contract`, summed in float32; float32 inputs are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, packed, codec):
    return matmul(x, packed, codec), packed


def _backward(codec, packed, dy):
    codec = codec._replace(compute="full")  # fp8.py says why there is no other gradient
    if path(codec, dy.dtype) != "xla":
        return _fused(_kernels(codec).backward, codec)(dy, packed), None
    dy, packed = _not_before(dy, packed)
    return dense_matmul(dy, dequantize(packed, codec, dy.dtype), contract=0), None


def _fused(kernel: Callable, codec: Codec) -> Callable[[jax.Array, Packed], jax.Array]:
    """The kernel on [..., K]: every axis but the last is rows, and so is that of a vmap over x (a pack of adapters)."""

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, packed: Packed) -> jax.Array:
        rows = kernel(x.reshape(-1, x.shape[-1]), packed, codec)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    @product.def_vmap
    def fold(axis_size, batched, x, packed):
        if not any(jax.tree.leaves(batched[1])):
            return product(x, packed), True

        def one(k):  # weights that differ do not meet in one kernel
            return product(*jax.tree.map(lambda leaf, varies: leaf[k] if varies else leaf, (x, packed), tuple(batched)))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return product


matmul.defvjp(_forward, _backward)
