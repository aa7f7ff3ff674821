"""The op: y = x W^T for a packed W, differentiable in x, with the packed arrays as its only residuals.

A product goes one of four ways, its backend:
xla      dequantizes a weight and leaves the product to XLA: every device, every shape; the default.
scratch  the same with a kernel that dequantizes (triton/scratch.py: NVIDIA GPUs from Ampere on).
triton   decodes inside the product (triton/few_rows.py: those GPUs): forward, up to 16 rows of x. "triton" sends all
         other products, and so all of training, the way of "scratch".
mosaic   decodes inside the product (mosaic/hopper.py: Hopper), forward and backward, any number of rows.
Weights that a kernel refuses take "xla". "auto" takes what the GPU's tuned table (config.py) names as the fastest for
an op, a shape and a number of rows, and "xla" where nothing was measured. `path` tells which way a product goes.
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

from pallas_kernels.gpu import device_kind as _device_kind
from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed, dequantize
from pallas_kernels.nf4_matmul.shapes import Shape

# backend -> its module, imported when it is chosen
_KERNELS = {"triton": "triton.few_rows", "scratch": "triton.scratch", "mosaic": "mosaic.hopper"}
_PACKAGES = {"triton": "jax-triton", "scratch": "jax-triton"}  # what they need beside jax
BACKENDS = ("auto", "xla", *_KERNELS)
log = logging.getLogger(__name__)


def path(codec: Codec, dtype: jnp.dtype, op: config.Op, rows: int) -> str:
    """The way of a product with activations of dtype: one of BACKENDS, but never "auto".

    `rows`: of x or dy, a pack's all together. Raises ValueError for an unknown backend.
    """
    _check(codec)
    backend = _fastest(op, rows, codec) if codec.backend == "auto" else codec.backend
    if backend == "triton" and not config.is_few(op, rows):
        _say_many_rows()
        backend = "scratch"
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
    return None if codec.backend == "xla" else _kernels(codec.backend).unsupported(codec.shape, codec.block_size, dtype)


def _fastest(op: config.Op, rows: int, codec: Codec) -> str:
    """What the table says, or "xla"."""
    choice = config.tuned_table(_device_kind()).get(_key(op, rows, codec)) if rows else None
    return "xla" if choice is None else choice.backend


def _key(op: config.Op, rows: int, codec: Codec) -> config.Key:
    return op, Shape(*codec.shape), codec.block_size, config.row_bucket(rows)


def _is_installed(backend: str) -> bool:
    return backend not in _PACKAGES or importlib.util.find_spec(_PACKAGES[backend].replace("-", "_")) is not None


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.nf4_matmul.{_KERNELS[backend]}")


@functools.cache
def _say_many_rows() -> None:
    log.warning(
        "nf4_matmul: backend triton is for forward products of up to %d rows; the others take scratch", config.FEW_ROWS
    )


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
    backend = codec.backend
    if backend == "auto" and not config.is_tuned(_device_kind(), op, Shape(*codec.shape), codec.block_size):
        backend = "xla"
    if backend == "xla":
        return _dense(op, x, packed, codec)
    return _over_rows(partial(_by_path, op), codec)(x, packed)


def _by_path(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """The product of rows [M, .], which are all there: their number decides the way."""
    backend = path(codec, x.dtype, op, x.shape[0])
    if backend == "xla":
        return _dense(op, x, packed, codec)
    return getattr(_kernels(backend), op)(x, packed, codec)


def _dense(op: config.Op, x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    x, packed = _not_before(x, packed)
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract=1 if op == "forward" else 0)


def _not_before(x: jax.Array, packed: Packed) -> tuple[jax.Array, Packed]:
    """The same arrays; a weight that is dequantized from them is not dequantized before x is there.

    Left alone, XLA:GPU dequantizes several of a layer's weights at its start and keeps them all. Of the scales' offset,
    one number, all weights depend; without one the scales pass the barrier. It makes a copy of a layer's slice of
    whatever passes it: a kernel more.
    """
    held = "absmax" if packed.offset is None else "offset"
    x, value = jax.lax.optimization_barrier((x, getattr(packed, held)))
    return x, packed._replace(**{held: value})


def _forward(x, packed, codec):
    return matmul(x, packed, codec), packed


def _backward(codec, packed, dy):
    return _product("backward", dy, packed, codec), None


def _over_rows(kernel: Callable, codec: Codec) -> Callable[[jax.Array, Packed], jax.Array]:
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
