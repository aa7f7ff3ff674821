"""Products that several devices compute together, on the same rows: inside `shard_map` alone, but for `arranged`.

Within attention and within feed-forward a device has its own heads, or its own part of F:

    y_t = x W_t^T          W [O, I] divided by out-features: x is everyone's, y_t one device's
    z = sum_t y_t V_t^T    V [O, I] divided by in-features: each device's part of the sum, of which all get the total

`entered` stands before the first, `left` behind the second. What one does forward the other does backward: a device has
a part of x's gradient, of which all need the sum; the gradient of z is everyone's already. Source: Shoeybi et al., 2019
(Megatron-LM, arXiv 1909.08053), section 3.

A packed weight is one run of values, and scales belong to blocks of them. For T devices it is laid out as T packed
weights one after the other, whose blocks and scales are those of the whole.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import NESTED_BLOCK, unpack
from qlora_jax.mesh.axes import TENSOR
from qlora_jax.quant.tensor import QuantizedTensor


class Split(NamedTuple):
    """How the devices along tensor divide a linear layer [O, I].

    by: "out" or "in". sections: of the out-features of a fused layer, as queries, keys and values: each device has its
    part of each. (): they are one.
    """

    by: str
    sections: tuple[int, ...] = ()

    def shape(self, whole: tuple[int, int], ways: int) -> tuple[int, int]:
        """[O, I] of one device's part."""
        O, I = whole  # noqa: E741
        return (O // ways, I) if self.by == "out" else (O, I // ways)


@jax.custom_vjp
def entered(x: jax.Array) -> jax.Array:
    """x, which all devices have; its gradient is the sum of theirs."""
    return x


entered.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.psum(dx, TENSOR),))


@jax.custom_vjp
def left(y: jax.Array) -> jax.Array:
    """The sum of all devices' y; its gradient is each one's."""
    return jax.lax.psum(y, TENSOR)


left.defvjp(lambda y: (jax.lax.psum(y, TENSOR), None), lambda _, dy: (dy,))


def first_of(size: int) -> jax.Array:
    """Where this device's `size` of a divided axis begin, int32 []."""
    return jax.lax.axis_index(TENSOR) * size


def own(x: jax.Array, axis: int, sections: tuple[int, ...] = ()) -> jax.Array:
    """This device's part of an array that stands whole on each: of each section of an axis, or of all of it."""
    ways, first, parts = jax.lax.axis_size(TENSOR), 0, []
    for size in sections or (x.shape[axis],):
        parts.append(jax.lax.dynamic_slice_in_dim(x, first + first_of(size // ways), size // ways, axis))
        first += size
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


@partial(jax.jit, static_argnames=("split", "ways"))
def arranged(weight: Any, split: Split, ways: int) -> Any:
    """A weight [O, I] with the parts of `ways` devices one after the other, each as it is.

    Args:
      weight: QuantizedTensor of 4 bits, or an array.
      split: of its linear layer; parts of sections are whole blocks of a packed one.
    Returns:
      QuantizedTensor whose arrays are those of the parts, [ways * n]. One nested scale is of as many scales as have one
      in common in all parts: 256, or a divisor of it. Or an array whose rows are the parts'; its columns need no other
      order.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight if split.by == "in" else _of_parts(weight, split, weight.shape, ways).reshape(weight.shape)
    O, I = weight.shape  # noqa: E741
    codes = _of_parts(unpack(weight.codes, O * I), split, weight.shape, ways)
    half = codes.shape[1] // 2
    packed = (codes[:, :half] | (codes[:, half:] << 4)).reshape(-1)
    absmax = _of_parts(weight.absmax, split, weight.shape, ways)
    nested = weight.nested_absmax
    if nested is not None:
        each = jnp.repeat(nested, NESTED_BLOCK)[: weight.absmax.size]
        together = _together(weight, split, ways)
        nested = _of_parts(each, split, weight.shape, ways)[:, ::together].reshape(-1)
    return dataclasses.replace(weight, codes=packed, absmax=absmax.reshape(-1), nested_absmax=nested)


def _of_parts(x: jax.Array, split: Split, shape: tuple[int, int], ways: int) -> jax.Array:
    """What belongs to the values of [O, I] in their order, one or less of each -> [ways, that of each part]."""
    if split.by == "in":
        return jnp.moveaxis(x.reshape(shape[0], ways, -1), 1, 0).reshape(ways, -1)
    ends = [x.size * rows // shape[0] for rows in np.cumsum(split.sections)[:-1]]
    return jnp.concatenate([part.reshape(ways, -1) for part in jnp.split(x.reshape(-1), ends)], axis=1)


def _together(weight: QuantizedTensor, split: Split, ways: int) -> int:
    """Scales in a row that have one nested scale, wherever a part's runs begin in the whole."""
    O, I = weight.shape  # noqa: E741
    runs = [I // ways] if split.by == "in" else [rows // ways * I for rows in split.sections or (O,)]
    return math.gcd(NESTED_BLOCK, *(run // weight.block_size for run in runs))
