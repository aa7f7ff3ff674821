"""AdamW and Lion with 8-bit state: block-wise dynamic quantization (Dettmers, Lewis, Shleifer, Zettlemoyer, 2022).

A moment x is stored as uint8 codes and one float32 absmax for every 256 values: x = map[code] * absmax. An update is

    dequantize -> 32-bit update -> parameters; absmax of each new block; code = nearest map value of x * (1 / absmax)

so that the step itself uses the moments before they are rounded. The first moment has the signed dynamic map, Adam's
second the unsigned one. State: 2 + 8 / 256 = 2.03 bytes a parameter (Lion: 1.02).

The leading axis of a parameter is a stack (layers): every row of it is a tensor of its own, as the layers are in
bitsandbytes. Blocks run over a row's values in C order and end with it, the last one short if need be; rows below
MIN_8BIT_SIZE values keep float32 moments. So rows may be cut apart (pages) without changing a block. bitsandbytes given
the whole stack as one tensor would differ only in where blocks end, and not even there if rows are multiples of 256.

Against bitsandbytes 0.50: codes are those of its `default` backend (nearest value, a tie takes the lower), the update
is its CPU backend's. Its CUDA kernels also move a negative first moment that rounds to zero to the code below zero; its
CPU quantization picks codes by 65,536 bins, up to 7 codes off. Here a block whose absmax is below the smallest normal
number (1.2e-38) is a block of zeros, on CPUs that flush such numbers and on GPUs that do not.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.finite import largest_magnitude
from qlora_jax.quant.codebooks import dynamic_map

BLOCK = 256  # values that share one absmax
MIN_8BIT_SIZE = 4096  # values of a row below which its moments stay float32
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_CELL_SHIFT = 16  # sign, exponent and seven bits of the mantissa remain
_FIRST_CELL, _LAST_CELL = (int(np.float32(edge).view(np.uint32)) >> _CELL_SHIFT for edge in (2.0**-23, 1.0))


class Quantized(NamedTuple):
    """A moment of a parameter [L, ...] whose rows have n values."""

    codes: jax.Array  # uint8 [L, ...]
    absmax: jax.Array  # float32 [L, ceil(n / 256)]


Moment = jax.Array | Quantized


class Adam8bitState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32 [], updates done
    mu: Any  # tree of Moment, like the parameters
    nu: Any


class Lion8bitState(NamedTuple):
    mu: Any  # tree of Moment, like the parameters


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """optax.adamw with 8-bit moments.

    p -= learning_rate * (mu / (1 - b1^t) / (sqrt(nu) / sqrt(1 - b2^t) + eps) + weight_decay * p)
    """
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion8bit(
    learning_rate: optax.ScalarOrSchedule, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """optax.lion with an 8-bit moment: p -= learning_rate * (sign(b1 * mu + (1 - b1) * g) + weight_decay * p)."""
    return optax.chain(
        scale_by_lion8bit(b1, b2),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction; parameters and gradients of any float dtype, directions float32."""

    def init(params):
        return Adam8bitState(jnp.zeros((), jnp.int32), jax.tree.map(_zeros, params), jax.tree.map(_zeros, params))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        first, second = _bias_correction(b1, count), _bias_correction(b2, count)

        def one(g, mu, nu):
            g = g.astype(jnp.float32)
            new_mu = b1 * _load(mu, signed=True) + (1 - b1) * g
            new_nu = b2 * _load(nu, signed=False) + (1 - b2) * jnp.square(g)
            direction = new_mu / first / (jnp.sqrt(new_nu) / jnp.sqrt(second) + eps)
            return direction, _store(new_mu, like=mu, signed=True), _store(new_nu, like=nu, signed=False)

        directions, mu, nu = _map(one, grads, state.mu, state.nu)
        return directions, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_lion8bit(b1: float, b2: float) -> optax.GradientTransformation:
    """Lion's direction, -1, 0 or 1, float32; parameters and gradients of any float dtype."""

    def init(params):
        return Lion8bitState(jax.tree.map(_zeros, params))

    def update(grads, state, params=None):
        del params

        def one(g, mu):
            g, old = g.astype(jnp.float32), _load(mu, signed=True)
            direction = jnp.sign(b1 * old + (1 - b1) * g)
            return direction, _store(b2 * old + (1 - b2) * g, like=mu, signed=True)

        directions, mu = _map(one, grads, state.mu)
        return directions, Lion8bitState(mu)

    return optax.GradientTransformation(init, update)


def quantize(x: jax.Array, signed: bool) -> Quantized:
    """float32 [L, ...] -> its blocks; not negative unless `signed`. An infinity or NaN spoils its block alone: the
    block's absmax is infinite, and none of its values is finite when it is read back."""
    rows = x.reshape(x.shape[0], -1)
    padded = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK))).reshape(x.shape[0], -1, BLOCK)
    absmax = largest_magnitude(padded, axis=2)
    absmax = jnp.where(absmax < _SMALLEST_NORMAL, 0, absmax)
    # the barrier keeps XLA from dividing the values instead, which rounds otherwise
    reciprocal = jax.lax.optimization_barrier(1 / jnp.where(absmax == 0, 1, absmax))
    scaled = jnp.clip(rows * _spread(reciprocal, rows.shape[1]), -1, 1)
    return Quantized(_nearest(scaled, signed).reshape(x.shape), absmax)


def dequantize(q: Quantized, signed: bool) -> jax.Array:
    """float32 [L, ...]."""
    values = _look_up(np.asarray(dynamic_map(signed), np.float32), q.codes.reshape(q.codes.shape[0], -1))
    return (values * _spread(q.absmax, values.shape[1])).reshape(q.codes.shape)


def _nearest(x: jax.Array, signed: bool) -> jax.Array:
    """uint8 like x, from -1 to 1: the code of the nearest map value, the lower one of two.

    Its float32 bits down to the seventh of the mantissa choose a cell so small that at most one midpoint lies in it:
    two look-ups and one comparison, exact and all in the pass over x, where a binary search would take eight.
    """
    first_code, midpoints = _cells(signed)
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) >> _CELL_SHIFT
    cell = jnp.clip(magnitude.astype(jnp.int32), _FIRST_CELL, _LAST_CELL) - _FIRST_CELL
    if signed:
        cell += jnp.where(x < 0, len(first_code) // 2, 0)
    code = _look_up(first_code, cell)
    return code + (x > _look_up(midpoints, code)).astype(jnp.uint8)


@cache
def _cells(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [cells], the code of each cell's lowest value, cells of negative values second; float32 [256], the midpoint
    above each code."""
    values = np.asarray(dynamic_map(signed), np.float32)
    midpoints = np.append((values[:-1] + values[1:]) / np.float32(2), np.float32(np.inf))
    edges = np.arange(_FIRST_CELL, _LAST_CELL + 2, dtype=np.uint32) << _CELL_SHIFT
    edges[0] = 0  # the first cell goes down to zero, below the first midpoint of both maps
    lowest = edges[:-1].view(np.float32)
    if signed:
        lowest = np.concatenate([lowest, -(edges[1:] - 1).view(np.float32)])
    return np.searchsorted(midpoints, lowest, side="left").astype(np.uint8), midpoints


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def _spread(blocks: jax.Array, n: int) -> jax.Array:
    """[L, C] -> [L, n]: the value of each one's block."""
    return jnp.broadcast_to(blocks[:, :, None], (*blocks.shape, BLOCK)).reshape(blocks.shape[0], -1)[:, :n]


def _zeros(param: jax.Array) -> Moment:
    n = math.prod(param.shape[1:])
    if param.ndim == 0 or n < MIN_8BIT_SIZE:
        return jnp.zeros(param.shape, jnp.float32)
    return Quantized(jnp.zeros(param.shape, jnp.uint8), jnp.zeros((param.shape[0], -(-n // BLOCK)), jnp.float32))


def _load(moment: Moment, signed: bool) -> jax.Array:
    return dequantize(moment, signed) if isinstance(moment, Quantized) else moment


def _store(x: jax.Array, like: Moment, signed: bool) -> Moment:
    return quantize(x, signed) if isinstance(like, Quantized) else x


def _bias_correction(decay: float, count: jax.Array) -> jax.Array:
    """1 - decay^count without the cancellation that costs float32 two digits at the first updates."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def _map(function: Callable[..., tuple], grads: Any, *moments: Any) -> list[Any]:
    """The trees of what function(gradient, moment, ...) returns: directions and one of each moment."""
    results = jax.tree.map(function, grads, *moments)
    return [jax.tree.map(lambda _, result, i=i: result[i], grads, results) for i in range(1 + len(moments))]
