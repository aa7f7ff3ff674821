"""The op: y = x W^T for a packed W, differentiable in x, with the packed arrays as its only residuals.

"xla" dequantizes a weight and leaves the product to XLA: every device, every shape; the default. "scratch" (scratch.py:
NVIDIA GPUs from Ampere on) does the same with a kernel that dequantizes. "triton" (triton_backend.py: those GPUs) and
"mosaic" (mosaic_hopper.py: Hopper, training row counts) dequantize inside the product. Shapes that kernels refuse take
"xla". "auto" takes what the GPU's tuned table (config.py) names as the fastest for an op, a shape and a number of rows,
and "xla" where nothing was measured. `path` tells which way a product goes.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import config, reference
from pallas_kernels.nf4_matmul.shapes import Shape

# backend -> its module, imported when it is chosen
_KERNELS = {"triton": "triton_backend", "scratch": "scratch", "mosaic": "mosaic_hopper"}
_PACKAGES = {"triton": "jax-triton", "scratch": "jax-triton"}  # what they need beside jax
BACKENDS = ("auto", "xla", *_KERNELS)
log = logging.getLogger(__name__)


class Codec(NamedTuple):
    """What is fixed when a program is compiled. Tables are tuples so that a codec can be hashed."""

    shape: tuple[int, int]  # (O, I)
    block_size: int  # values that share one absmax
    table: tuple[float, ...]  # 16 values
    absmax_map: tuple[float, ...]  # 256 values, read only with double quantization
    backend: str = "xla"  # one of BACKENDS


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


def path(codec: Codec, dtype: jnp.dtype, op: config.Op | None = None, rows: int | None = None) -> str:
    """The backend of a product with activations of dtype: the codec's, or "xla" where kernels refuse the weight.

    Backend "auto" needs op and rows (of x or dy, a pack's all together): it takes the tuned table's choice, or "xla".

    Raises ValueError for an unknown backend, and for "auto" without op and rows.
    """
    backend = codec.backend
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if op is None or rows is None:
            raise ValueError('backend "auto" depends on op and rows: path(codec, dtype, op, rows)')
        backend = _fastest(op, rows, codec)
    if backend == "xla":
        return "xla"
    reason = refusal(codec._replace(backend=backend), dtype)
    if reason is None and codec.backend == "auto" and not _is_installed(backend):
        reason = f"the tuned table's fastest needs {_PACKAGES[backend]}: pip install {_PACKAGES[backend]}"
    if reason is None:
        return backend
    _say_refused(backend, codec.shape, reason)
    return "xla"


def refusal(codec: Codec, dtype: jnp.dtype) -> str | None:
    """Why the codec's backend, not "auto", does not take its weight with activations of dtype; None if it does."""
    return None if codec.backend == "xla" else _kernels(codec.backend).unsupported(codec.shape, codec.block_size, dtype)


def _fastest(op: config.Op, rows: int, codec: Codec) -> str:
    choice = config.tuned_table(_device_kind()).get(_key(op, rows, codec)) if rows else None
    return "xla" if choice is None else choice.backend


def _key(op: config.Op, rows: int, codec: Codec) -> config.Key:
    return op, Shape(*codec.shape), codec.block_size, config.row_bucket(rows)


def _device_kind() -> str:
    """Of the device that programs are traced for: the abstract mesh's, or this process's first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if abstract is None else abstract.device_kind


def _is_installed(backend: str) -> bool:
    return backend not in _PACKAGES or importlib.util.find_spec(_PACKAGES[backend].replace("-", "_")) is not None


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.nf4_matmul.{_KERNELS[backend]}")


@functools.cache
def _say_refused(backend: str, shape: tuple[int, int], reason: str) -> None:
    log.warning("nf4_matmul: the weight %s takes backend xla instead of %s: %s", list(shape), backend, reason)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """y = x W^T.

    Args:
      x: [..., I], float32 or bfloat16 or float16.
      packed: the weight's arrays.
      codec: its shape (O, I), block size, tables and backend.
    Returns:
      [..., O] in x's dtype, accumulated in float32.
    Raises:
      ValueError: x's last dimension is not I, or the backend is unknown.
      RuntimeError, ImportError: backend "triton", "scratch" or "mosaic" without its GPU or its packages.
    """
    if x.shape[-1] != codec.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, the weight [out, in] = {list(codec.shape)} takes {codec.shape[1]}"
        )
    return _product("forward", x, packed, codec)


def _product(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    if codec.backend == "auto" and config.is_tuned(_device_kind(), op, Shape(*codec.shape), codec.block_size):
        return _fused(partial(_fastest_kernel, op), codec)(x, packed)  # which one, is known once all rows are counted
    backend = "xla" if codec.backend == "auto" else path(codec, x.dtype)
    return _fused(_kernel(op, backend), codec)(x, packed) if backend != "xla" else _dense(op, x, packed, codec)


def _fastest_kernel(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    return _kernel(op, path(codec, x.dtype, op, x.shape[0]))(x, packed, codec)


def _kernel(op: config.Op, backend: str) -> Callable[[jax.Array, Packed, Codec], jax.Array]:
    return partial(_dense, op) if backend == "xla" else getattr(_kernels(backend), op)


def _dense(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract=1 if op == "forward" else 0)


def dense_matmul(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    """x [..., K] times w over w's dimension `contract`, summed in float32; float32 inputs are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, packed, codec):
    return matmul(x, packed, codec), packed


def _backward(codec, packed, dy):
    return _product("backward", dy, packed, codec), None


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
