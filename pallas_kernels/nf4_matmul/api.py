"""The op: y = x W^T for a packed W, differentiable in x, with the packed arrays as its only residuals."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nf4_matmul import reference


class Codec(NamedTuple):
    """What is fixed when a program is compiled. Tables are tuples so that a codec can be hashed."""

    shape: tuple[int, int]  # (O, I)
    block_size: int  # values that share one absmax
    table: tuple[float, ...]  # 16 values
    absmax_map: tuple[float, ...]  # 256 values, read only with double quantization


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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, packed: Packed, codec: Codec) -> jax.Array:
    """y = x W^T.

    Args:
      x: [..., I], float32 or bfloat16 or float16.
      packed: the weight's arrays.
      codec: its shape (O, I), block size and tables.
    Returns:
      [..., O] in x's dtype, accumulated in float32.
    Raises:
      ValueError: x's last dimension is not I.
    """
    if x.shape[-1] != codec.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, the weight [out, in] = {list(codec.shape)} takes {codec.shape[1]}"
        )
    return dense_matmul(x, dequantize(packed, codec, x.dtype), contract=1)


def dense_matmul(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    """x [..., K] times w over w's dimension `contract`, summed in float32; float32 inputs are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, packed, codec):
    return matmul(x, packed, codec), packed


def _backward(codec, packed, dy):
    dx = dense_matmul(dy, dequantize(packed, codec, dy.dtype), contract=0)
    return dx, None


matmul.defvjp(_forward, _backward)
