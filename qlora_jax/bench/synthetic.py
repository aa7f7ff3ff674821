"""A model of random weights, made on the device in the form that training holds: no download, no 16-bit copy.

Speed and memory of a run depend on shapes alone, not on what a weight says. Codes are uniform, scales such that a row
of W [O, I] has about unit length: activations of unit size stay near it through any number of pre-norm layers, in
bfloat16 too. Arrays are filled a layer at a time, so that filling takes little more than what it fills.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.quant import mxfp4
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.train.memory import host_memory_bytes, memory_limit
from qlora_jax.train.shapes import AbstractModel, ModelSpec, abstract_model


def random_model(spec: ModelSpec, seed: int = 0) -> AbstractModel:
    """`abstract_model(spec)` with arrays in place of shapes, and an adapter as a run starts with.

    Raises InputError where the frozen model alone is larger than the device's memory.
    """
    model = abstract_model(spec)
    _check_room(model.base)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model.base, is_leaf=_is_quantized)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [_fill(jax.tree_util.keystr(path), leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]

    def fill_matrix(path: Any, leaf: Any) -> Any:  # embedding and head that train; attach draws the rest
        return leaf if "blocks" in jax.tree_util.keystr(path) else fill_dense(leaf, jax.random.key(seed))

    adapter = jax.tree_util.tree_map_with_path(fill_matrix, model.adapter)
    whole = nnx.merge(model.graph, adapter, jax.tree.unflatten(treedef, filled))
    lora.attach(whole, spec.lora, jax.random.key(seed))
    return AbstractModel(*lora.split(whole))


def _check_room(base: Any) -> None:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))
    room = memory_limit() or host_memory_bytes()
    if size > room:
        device = jax.devices()[0].device_kind
        raise InputError(
            f"the frozen model takes {size / 2**30:.2f} GiB, {device} gives {room / 2**30:.2f} GiB: take a smaller "
            "model, or more memory"
        )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _fill(path: str, leaf: Any, key: jax.Array) -> Any:
    """Random values of one array of the base, whose path in it says what it is."""
    if _is_quantized(leaf):
        return fill_quantized(leaf, key)
    if "norm" in path:
        return jnp.ones(leaf.shape, leaf.dtype)
    return fill_dense(leaf, key)


def fill_quantized(q: QuantizedTensor, key: jax.Array) -> QuantizedTensor:
    """Of stacked shapes [L, ...] or [L, E, ...] (see QuantizedTensor); scales are within half of their mean."""
    values = np.arange(-127, 128) / 127 if q.in_8_bits else np.asarray(codebook(q.format).values)
    scale = 1 / math.sqrt(q.shape[1] * float(np.mean(values**2)))
    uniform = partial(_uniform, low=0.5 * scale, high=1.5 * scale)
    codes_key, absmax_key = jax.random.split(key)
    codes = _bytes(codes_key, q.codes.shape)
    if q.in_8_bits:
        codes = jnp.maximum(codes.astype(jnp.int8), -127)
    if not q.double_quant:
        return dataclasses.replace(q, codes=codes, absmax=uniform(absmax_key, q.absmax.shape))
    assert q.nested_absmax is not None and q.offset is not None
    if q.format == mxfp4.FORMAT:
        absmax = jnp.full(q.absmax.shape, mxfp4.scale_byte(scale), jnp.uint8)
        ones, zeros = jnp.ones_like(q.nested_absmax), jnp.zeros_like(q.offset)
        return dataclasses.replace(q, codes=codes, absmax=absmax, nested_absmax=ones, offset=zeros)
    return dataclasses.replace(
        q,
        codes=codes,
        absmax=_bytes(absmax_key, q.absmax.shape),
        nested_absmax=jnp.full(q.nested_absmax.shape, 0.5 * scale, jnp.float32),
        offset=jnp.full(q.offset.shape, scale, jnp.float32),
    )


def fill_dense(leaf: Any, key: jax.Array) -> jax.Array:
    """Gaussian rows of unit length: [O, I], or stacked [L, O, I]."""
    if len(leaf.shape) == 2:
        return _normal(key, (1, *leaf.shape), leaf.dtype)[0]
    return _normal(key, leaf.shape, leaf.dtype)


@partial(jax.jit, static_argnames="shape")
def _bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint8 [L, n] or [L, E, n]: four to a word that is drawn."""
    L, n = shape[0], math.prod(shape[1:])

    def layer(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, (-(-n // 4),), jnp.uint32)
        return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:n]

    return jax.lax.map(layer, jax.random.split(key, L)).reshape(shape)


@partial(jax.jit, static_argnames=("shape", "low", "high"))
def _uniform(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    layer = lambda key: jax.random.uniform(key, shape[1:], jnp.float32, low, high)  # noqa: E731
    return jax.lax.map(layer, jax.random.split(key, shape[0]))


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    std, size = 1 / math.sqrt(shape[-1]), math.prod(shape[1:])  # drawn flat, which XLA:CPU compiles sooner
    layer = lambda key: (std * jax.random.normal(key, (size,), jnp.float32)).astype(dtype)  # noqa: E731
    return jax.lax.map(layer, jax.random.split(key, shape[0])).reshape(shape)
