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
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import device_kind as _device_kind
from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.dense import dense_matmul
from pallas_kernels.nf4_matmul.operands import Codec, Packed, for_kernels, scaled, scales
from pallas_kernels.nf4_matmul.shapes import Shape

# backend -> its module, imported when it is chosen
_KERNELS = {"triton": "triton.few_rows", "scratch": "triton.scratch", "mosaic": "mosaic.hopper"}
_FEW_ROWS = {"triton": "triton.few_rows", "mosaic": "mosaic.few_rows"}  # whose launch takes several weights
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


def is_for_cpu() -> bool:
    """Whether programs are traced for a CPU: joined products are no faster there."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if abstract is None else abstract.platform) == "cpu"


def _is_installed(backend: str) -> bool:
    return backend not in _PACKAGES or importlib.util.find_spec(_PACKAGES[backend].replace("-", "_")) is not None


def _kernels(backend: str) -> ModuleType:
    return _module(_KERNELS[backend])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.nf4_matmul.{name}")


@functools.cache
def _say_many_rows() -> None:
    log.warning(
        "nf4_matmul: backend triton is for forward products of up to %d rows; the others take scratch", config.FEW_ROWS
    )


@functools.cache
def _say_refused(backend: str, shape: tuple[int, int], reason: str) -> None:
    log.warning("nf4_matmul: the weight %s takes backend xla instead of %s: %s", list(shape), backend, reason)


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
    return matmul_joined(x, (packed,), (codec,))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_joined(x: jax.Array, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]) -> jax.Array:
    """What several weights [O_k, I] make of one x, side by side: [..., sum of O_k]; otherwise as matmul.

    Where all of them take "xla" that is one product: they are dequantized into one array.
    """
    for codec in codecs:
        if x.shape[-1] != codec.shape[1]:
            raise ValueError(
                f"x has {x.shape[-1]} features, the weight [out, in] = {list(codec.shape)} takes {codec.shape[1]}"
            )
        _check(codec)
    return _product("forward", x, packed, codecs)


def backward(dy: jax.Array, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]) -> jax.Array:
    """dx [..., I] of matmul_joined, from dy [..., sum of O_k]."""
    return _product("backward", dy, packed, codecs)


def is_dense(op: config.Op, x: jax.Array, codecs: tuple[Codec, ...]) -> bool:
    """Whether XLA's product is what all these weights take with rows x [M, .], which are all there."""
    return all(_is_always_xla(op, codec) or path(codec, x.dtype, op, x.shape[0]) == "xla" for codec in codecs)


def _product(op: config.Op, x: jax.Array, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]) -> jax.Array:
    if all(_is_always_xla(op, codec) for codec in codecs):
        return dense_product(op, x, packed, codecs)
    return over_rows(partial(_by_path, op), codecs)(x, packed)


def _is_always_xla(op: config.Op, codec: Codec) -> bool:
    if codec.backend == "auto":
        return not config.is_tuned(_device_kind(), op, Shape(*codec.shape), codec.block_size)
    return codec.backend == "xla"


def _by_path(op: config.Op, x: jax.Array, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]) -> jax.Array:
    """The product of rows [M, .], which are all there: their number decides the way."""
    ways = [path(codec, x.dtype, op, x.shape[0]) for codec in codecs]
    if all(way == "xla" for way in ways):
        return dense_product(op, x, packed, codecs)
    if op == "forward" and (joined := _in_one_launch(ways, x, packed, codecs)) is not None:
        return joined
    parts = [x] * len(codecs) if op == "forward" else _parts(x, codecs)
    products: list[jax.Array] = []
    for way, part, arrays, codec in zip(ways, parts, packed, codecs, strict=True):
        if products:  # one weight at a time
            part, products[-1] = jax.lax.optimization_barrier((part, products[-1]))
        one = partial(dense_product, op) if way == "xla" else _kernel_product(way, op)
        products.append(one(part, (arrays,), (codec,)))
    return jnp.concatenate(products, axis=-1) if op == "forward" else functools.reduce(jnp.add, products)


def _in_one_launch(
    ways: Sequence[str], x: jax.Array, packed: tuple[Packed, ...], codecs: tuple[Codec, ...]
) -> jax.Array | None:
    """The product of several weights by one kernel; None where they do not share one."""
    if len(codecs) == 1 or len(set(ways)) > 1 or ways[0] not in _FEW_ROWS or not config.is_few("forward", x.shape[0]):
        return None
    kernel, weights = _module(_FEW_ROWS[ways[0]]), tuple(map(for_kernels, packed, codecs))
    return kernel.forward_joined(x, weights, codecs) if kernel.may_join(weights, codecs) else None


def _kernel_product(backend: str, op: config.Op) -> Callable[..., jax.Array]:
    kernel = getattr(_kernels(backend), op)
    return lambda x, packed, codecs: kernel(x, *map(for_kernels, packed, codecs), *codecs)


def _parts(dy: jax.Array, codecs: tuple[Codec, ...]) -> list[jax.Array]:
    """dy [M, sum of O_k] -> what belongs to each weight."""
    return jnp.split(dy, np.cumsum([codec.shape[0] for codec in codecs])[:-1], axis=-1)


def dense_product(
    op: config.Op,
    x: jax.Array,
    packed: tuple[Packed, ...],
    codecs: tuple[Codec, ...],
    beside: Sequence[jax.Array] = (),
) -> jax.Array:
    """XLA's product. A weight is not dequantized before x is there: that waits for the scales, and they for x.

    Left alone, XLA:GPU dequantizes several of a layer's weights at its start and keeps them all. `beside`: more columns
    for each weight, [O_k, .].
    """
    joined = _concatenated([scales(one, codec) for one, codec in zip(packed, codecs, strict=True)])
    x, joined = jax.lax.optimization_barrier((x, joined))
    absmax = jnp.split(joined, np.cumsum([one.absmax.shape[0] for one in packed])[:-1])
    arrays = zip(packed, absmax, codecs, strict=True)
    w = [scaled(one.codes, scale, codec, x.dtype) for one, scale, codec in arrays]
    if beside:
        w = [jnp.concatenate(both, axis=1) for both in zip(w, beside, strict=True)]
    # the barrier: what is joined is one array, and not left to whatever way of multiplying XLA takes
    joined = w[0] if len(w) == 1 and not beside else jax.lax.optimization_barrier(_concatenated(w))
    return dense_matmul(x, joined, contract=1 if op == "forward" else 0)


def _concatenated(arrays: list[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _forward(x, packed, codecs):
    return matmul_joined(x, packed, codecs), packed


def _backward(codecs, packed, dy):
    return _product("backward", dy, packed, codecs), None


def over_rows(kernel: Callable, codecs: tuple[Codec, ...]) -> Callable[[jax.Array, Any], jax.Array]:
    """The kernel on [..., K]: every axis but the last is rows, and so is that of a vmap over x (a pack of adapters)."""

    @jax.custom_batching.custom_vmap
    def product(x: jax.Array, packed: Any) -> jax.Array:
        rows = kernel(x.reshape(-1, x.shape[-1]), packed, codecs)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    @product.def_vmap
    def fold(axis_size, batched, x, packed):
        if not any(jax.tree.leaves(batched[1])):
            return product(x, packed), True

        def one(k):  # weights that differ do not meet in one kernel
            return product(*jax.tree.map(lambda leaf, varies: leaf[k] if varies else leaf, (x, packed), tuple(batched)))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return product


matmul_joined.defvjp(_forward, _backward)
