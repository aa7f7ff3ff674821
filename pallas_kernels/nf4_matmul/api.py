"""The op: y = x W^T for a packed W, differentiable in x, with the packed arrays as its only residuals.

"xla" dequantizes a weight and leaves the product to XLA: every device, every shape; the default. "scratch"
(triton/scratch.py: NVIDIA GPUs from Ampere on) does the same with a kernel that dequantizes. "triton"
(triton/backend.py: those GPUs) and "mosaic" (mosaic/hopper.py: Hopper) dequantize inside the product. Shapes that
kernels refuse take "xla". "auto" takes what the GPU's tuned table (config.py) names as the fastest for an op, a shape
and a number of rows, and "xla" where nothing was measured. `path` tells which way a product goes.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed, dequantize
from pallas_kernels.nf4_matmul.shapes import Shape

# backend -> its module, imported when it is chosen
_KERNELS = {"triton": "triton.backend", "scratch": "triton.scratch", "mosaic": "mosaic.hopper"}
_PACKAGES = {"triton": "jax-triton", "scratch": "jax-triton"}  # what they need beside jax
BACKENDS = ("auto", "xla", *_KERNELS)
log = logging.getLogger(__name__)


def path(codec: Codec, dtype: jnp.dtype, op: config.Op | None = None, rows: int | None = None) -> str:
    """The backend of a product with activations of dtype: the codec's, or "xla" where kernels refuse the weight.

    Backend "auto" needs op and rows (of x or dy, a pack's all together): it takes the tuned table's choice, or "xla".

    Raises ValueError for an unknown backend, and for "auto" without op and rows.
    """
    _check(codec)
    backend = codec.backend
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


def _check(codec: Codec) -> None:
    if codec.backend not in BACKENDS:
        raise ValueError(f"backend is {codec.backend!r}, expected one of {', '.join(BACKENDS)}")


def refusal(codec: Codec, dtype: jnp.dtype) -> str | None:
    """Why the codec's backend, not "auto", does not take its weight with activations of dtype; None if it does."""
    return None if codec.backend == "xla" else _kernels(codec).unsupported(codec.shape, codec.block_size, dtype)


def _fastest(op: config.Op, rows: int, codec: Codec) -> str:
    """What the table says, or "xla"."""
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


def _kernels(codec: Codec) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.nf4_matmul.{_KERNELS[codec.backend]}")


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
    _check(codec)
    return _product("forward", x, packed, codec)


def _product(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    if codec.backend == "auto":
        if config.is_tuned(_device_kind(), op, Shape(*codec.shape), codec.block_size):
            # which one is fastest, is known once all rows are counted
            return fused(partial(_fastest_kernel, op), codec)(x, packed)
        codec = codec._replace(backend="xla")
    backend = path(codec, x.dtype)
    if backend == "xla":
        return _dense(op, x, packed, codec)
    return fused(_kernel(op, codec._replace(backend=backend)), codec)(x, packed)


def _fastest_kernel(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    backend = path(codec, x.dtype, op, x.shape[0])
    return _kernel(op, codec._replace(backend=backend))(x, packed, codec)


def _kernel(op: config.Op, codec: Codec) -> Callable[[jax.Array, Packed, Codec], jax.Array]:
    if codec.backend == "xla":
        return partial(_dense, op)
    return getattr(_kernels(codec), op)


def _dense(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    x, packed = _not_before(x, packed)
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract=1 if op == "forward" else 0)


def _not_before(x: jax.Array, packed: Packed) -> tuple[jax.Array, Packed]:
    """The same arrays; a weight that is dequantized from them is not dequantized before x is there.

    Left alone, XLA:GPU dequantizes several of a layer's weights at its start and keeps them all. Only the scales pass
    the barrier: it would make a copy of a layer's slice of the codes.
    """
    x, absmax = jax.lax.optimization_barrier((x, packed.absmax))
    return x, packed._replace(absmax=absmax)


def _forward(x, packed, codec):
    return matmul(x, packed, codec), packed


def _backward(codec, packed, dy):
    return _product("backward", dy, packed, codec), None


def fused(kernel: Callable, codec: Codec) -> Callable[[jax.Array, Packed], jax.Array]:
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
