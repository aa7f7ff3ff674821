"""Rotary embedding: a head's pairs turn by angle = position * frequency, and scalings slow frequencies down.

Frequencies follow from theta, the width that turns, and the scaling that config.json names (transformers' rope types):

    linear     all slowed by `factor`
    llama3     long wavelengths slowed by `factor`, short ones kept, a linear blend between
    yarn       a linear blend, between the pairs that turn beta_fast and beta_slow times in the original context
    dynamic    theta grows with the length of a sequence beyond the model's context
    longrope   each pair slowed by a factor of its own: short_factor, or long_factor beyond the original context

yarn and longrope also scale what is turned (attention_factor). dynamic and longrope look at the length of a sequence:
padding counts unless `lengths` says otherwise. Sources: Su et al., 2021; Peng et al., 2023 (YaRN); Ding et al., 2024
(LongRoPE); transformers' modeling_rope_utils for the exact form.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.models.kind import LOCAL_ROPE, NO_ROPE, OWN_ROPE


class Rotation(NamedTuple):
    """How the heads of one pass turn.

    inverse: float32 [W / 2], angle a position, of the W values of a head that turn; [B, 1, W / 2] where a row's length
      counts. Where layers differ, with an axis before these, which a layer's choice indexes.
    scale: of what is turned, float32 [] or one for each choice; None is 1.
    """

    inverse: jax.Array
    scale: jax.Array | None = None

    def at(self, positions: jax.Array) -> "Turn":
        """What all layers of a pass share: the turn at positions int32 [B, T]."""
        inverse = self.inverse
        if inverse.ndim in (2, 4):  # one for each choice
            inverse = inverse.reshape(len(inverse), -1, 1, inverse.shape[-1])
        angles = positions[..., None].astype(jnp.float32) * inverse
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.scale is not None:
            scale = self.scale[:, None, None, None] if self.scale.ndim else self.scale
            cos, sin = cos * scale, sin * scale
        return Turn(cos, sin)


class Turn(NamedTuple):
    """Cosines and sines of angles: float32 [B, T, W / 2]; where layers differ with an axis before these."""

    cos: jax.Array
    sin: jax.Array

    def of_layer(self, choice: jax.Array | None) -> "Turn":
        """The turn of one layer; `choice` int32 [], None where all are alike."""
        return self if choice is None else Turn(self.cos[choice], self.sin[choice])

    def cut(self, first: jax.Array, size: int) -> "Turn":
        """Of `size` tokens from the place `first` on."""
        return Turn(*(jax.lax.dynamic_slice_in_dim(x, first, size, axis=x.ndim - 2) for x in self))


def depends_on_length(ropes: tuple[tuple[float, tuple], ...]) -> bool:
    return any(dict(scaling).get("rope_type") in ("dynamic", "longrope") for _, scaling in ropes)


def rotation(
    own: tuple[float, tuple],
    local: tuple[float, tuple],
    layer_ropes: tuple[int, ...],
    W: int,
    lengths: jax.Array | None,
) -> Rotation:
    """The rotation of all layers.

    Args:
      own, local: theta and scaling items.
      layer_ropes: as Kind's.
      W: values of a head that turn, even.
      lengths: int32 [B], tokens of each row's sequence; None: as long as the original context at most.
    """
    tables = {OWN_ROPE: _one(own, W, lengths), LOCAL_ROPE: _one(local, W, lengths), NO_ROPE: (jnp.zeros(W // 2), 1.0)}
    choices = set(layer_ropes) or {OWN_ROPE}
    if len(choices) == 1:
        inverse, scale = tables[choices.pop()]
        return Rotation(inverse, None if scale == 1 else jnp.float32(scale))
    found = [tables[choice] for choice in sorted(tables)]
    shape = max((inverse for inverse, _ in found), key=lambda inverse: inverse.ndim).shape
    inverses = jnp.stack([jnp.broadcast_to(inverse, shape) for inverse, _ in found])
    scales = [scale for _, scale in found]
    return Rotation(inverses, None if set(scales) == {1.0} else jnp.asarray(scales, jnp.float32))


def _one(rope: tuple[float, tuple], W: int, lengths: jax.Array | None) -> tuple[jax.Array, float]:
    """(frequencies, scale)."""
    theta, items = rope
    scaling = dict(items)
    kind = scaling.get("rope_type")
    if kind == "dynamic" and lengths is not None:
        return _dynamic(theta, W, scaling, lengths), 1.0
    if kind == "longrope":
        return _longrope(theta, W, scaling, lengths)
    if kind == "yarn":
        return _yarn(theta, W, scaling), _yarn_scale(scaling)
    return rope_inverse_frequencies(W, theta, scaling), 1.0


def rope_inverse_frequencies(H: int, theta: float, scaling: dict) -> jax.Array:
    """float32 [H / 2], angle a position; scaling is {} or transformers' rope parameters of type linear or llama3."""
    inverse = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if scaling.get("rope_type") == "linear":
        return inverse / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        return _llama3_frequencies(inverse, scaling)
    return inverse


def _llama3_frequencies(inverse: jax.Array, scaling: dict) -> jax.Array:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a linear blend between."""
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    blend = jnp.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 - blend) * inverse / scaling["factor"] + blend * inverse


def _dynamic(theta: float, W: int, scaling: dict[str, Any], lengths: jax.Array) -> jax.Array:
    factor, context = scaling["factor"], scaling["context"]
    length = jnp.maximum(lengths, context).astype(jnp.float32)[:, None, None]
    grown = theta * (factor * length / context - (factor - 1)) ** (W / (W - 2))
    return 1.0 / grown ** (jnp.arange(0, W, 2, dtype=jnp.float32) / W)


def _longrope(theta: float, W: int, scaling: dict[str, Any], lengths: jax.Array | None) -> tuple[jax.Array, float]:
    original = scaling["original_max_position_embeddings"]
    growth = scaling.get("factor") or scaling["context"] / original
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(original))
    steps = theta ** (jnp.arange(0, W, 2, dtype=jnp.float32) / W)
    short, long = (1.0 / (jnp.asarray(scaling[name], jnp.float32) * steps) for name in ("short_factor", "long_factor"))
    if lengths is None:
        return short, scale
    return jnp.where((lengths > original)[:, None, None], long, short), scale


def _yarn(theta: float, W: int, scaling: dict[str, Any]) -> jax.Array:
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return W * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, W - 1)
    high = high + 0.001 if low == high else high
    slowed = jnp.clip((jnp.arange(W // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    steps = theta ** (jnp.arange(0, W, 2, dtype=jnp.float32) / W)
    return slowed / (scaling["factor"] * steps) + (1 - slowed) / steps


def _yarn_scale(scaling: dict[str, Any]) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor, both = scaling["factor"], (scaling.get("mscale"), scaling.get("mscale_all_dim"))

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    return grown(both[0]) / grown(both[1]) if both[0] and both[1] else grown(1)


def rotate(x: jax.Array, turn: Turn, pairs: bool = False) -> jax.Array:
    """x [B, T, N, H] turned; `turn` of one layer.

    The first W values of a head turn. Their pairs are (h, h + W / 2), as in most files of Hugging Face, or with `pairs`
    (2 h, 2 h + 1).
    """
    W = 2 * turn.cos.shape[-1]
    if x.shape[-1] > W:
        return jnp.concatenate([rotate(x[..., :W], turn, pairs), x[..., W:]], axis=-1)
    cos, sin = turn.cos[:, :, None, :], turn.sin[:, :, None, :]
    x32 = x.astype(jnp.float32)
    first, second = (x32[..., ::2], x32[..., 1::2]) if pairs else jnp.split(x32, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if pairs:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
