"""LoRA dropout: which values of an adapter's input are zeroed.

A mask's bits are a hash of where a value stands, so that nothing is kept between the forward and the backward pass:

    token = mix(mix(mix(k0 ^ place) + b) + t),  other = mix(token ^ k1),  bits = mix(mix(token + i) ^ other)

for row b of the step's batch, token t and feature i, the linear layer's place in its layer, and two words k0, k1 drawn
from the layer's key. So a step's masks are the same however its batch is cut into micro-batches. `mix` is a bijection
of 32-bit words in which each input bit flips each output bit half of the time (its constants are of Wellons' hash
prospector). Two rounds with words of their own a token keep two tokens from having the same mask shifted. That is 18
instructions a value; jax.random.bits hashes each by twenty rounds of Threefry, over 100, which were 6 to 8% of a 7B
step and a fifth of the time that a CPU takes to compile one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class DropoutRate(NamedTuple):
    """A dropout rate as arithmetic uses it: numbers, or arrays [] where it is an input of the program (packs)."""

    threshold: Any  # of 65,536 equally likely numbers those below it drop a value
    kept_scale: Any  # of the values that are kept: 1 / (1 - rate), rounded to float32

    @classmethod
    def of(cls, rate: "float | DropoutRate") -> "DropoutRate":
        if isinstance(rate, DropoutRate):
            return rate
        return cls(min(round(rate * 65536), 65535), float(np.float32(1 / (1 - rate))))


class DropoutKey(NamedTuple):
    """What the masks of some rows are drawn from."""

    key: Any  # key [], the same for all rows of a step
    first_row: Any = 0  # int32 [] or a number: which row of the step's batch x [B, T, I] begins with
    words: Any = None  # uint32 [2], what a layer draws from its key; or of all layers [L, 2]; None: not drawn yet
    first_token: Any = 0  # int32 [] or a number: which token of its rows x [B, T, I] begins with

    @classmethod
    def of(cls, key: "jax.Array | DropoutKey") -> "DropoutKey":
        return key if isinstance(key, DropoutKey) else cls(key)

    def fold_in(self, number: Any) -> "DropoutKey":
        """Another key, for the same rows."""
        return self._replace(key=jax.random.fold_in(self.key, number), words=None)

    def for_layers(self, L: int) -> "DropoutKey":
        """The same, with the words of L layers drawn at once."""
        draw = jax.vmap(lambda layer: _words(jax.random.fold_in(self.key, layer)))
        return self._replace(words=draw(jnp.arange(L)))

    def of_layer(self, layer: Any) -> "DropoutKey":
        """The key of a layer's number, int32 []."""
        own = self.fold_in(layer)
        return own if self.words is None else own._replace(words=self.words[layer])


class Dropout:
    """LoRA dropout of one layer in one step: hands each linear layer its own mask.

    The mask depends on the key, the linear layer's place and each value's own place in the step's batch alone: a
    recomputed forward pass (remat) draws the same one, as does a batch that is cut otherwise, or has more padding, or
    an adapter on fewer linear layers.
    """

    def __init__(self, rate: float | DropoutRate, key: jax.Array | DropoutKey | None):
        self.rate = DropoutRate.of(rate)
        self.place = 0
        self.first_row: Any = 0
        self.first_token: Any = 0
        self.is_off = key is None or (isinstance(self.rate.threshold, int) and self.rate.threshold == 0)
        self.words = None
        if key is not None and not self.is_off:
            drawn = DropoutKey.of(key)
            self.first_row, self.first_token = drawn.first_row, drawn.first_token
            self.words = _words(drawn.key) if drawn.words is None else drawn.words

    def skip(self, count: int = 1) -> None:
        """Passes by linear layers without an adapter."""
        self.place += count

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., T, I] with a share `rate` of its values zeroed and the others scaled by 1 / (1 - rate)."""
        return x if self.words is None else self.each(x, 1)[0]

    def each(self, x: jax.Array, count: int, first: Any = 0) -> jax.Array:
        """x [..., T, I] as `count` linear layers take it: [count, ..., T, I]; [1, ..., T, I] where each takes x.

        `first`: which feature x begins with, where it is a part of what they take.
        """
        if self.words is None:
            return x[None]
        places = [self.place + 1 + k for k in range(count)]
        self.place += count
        # the high bits are the best mixed
        begins = (self.first_row, first, self.first_token)
        bits = jnp.stack([random_bits(self.words, place, x.shape, *begins) for place in places])
        keep = (bits >> 16) >= jnp.asarray(self.rate.threshold, jnp.uint32)
        # behind a barrier a constant is no other factor than an input of the program: XLA would merge it with its like
        scale = jax.lax.optimization_barrier(jnp.asarray(self.rate.kept_scale, jnp.float32).astype(x.dtype))
        return jnp.where(keep, x * scale, jnp.zeros((), x.dtype))


def _words(key: jax.Array) -> jax.Array:
    """uint32 [2] of a layer's key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def random_bits(
    words: jax.Array,
    place: int,
    shape: tuple[int, ...],
    first_row: Any = 0,
    first_feature: Any = 0,
    first_token: Any = 0,
) -> jax.Array:
    """uint32 of `shape`, 32 random bits for each place in it.

    Args:
      words: uint32 [2], random.
      place: numbers whose bits shall differ.
      shape: the bits of [b, t, i] are the same in every shape that has this place.
      first_row, first_feature, first_token: int32 [] or a number, b of the first row, i of the first feature, t of the
        first token.
    """
    token = mix(words[0] ^ jnp.uint32(place))
    for axis in range(len(shape) - 1):
        numbers = jnp.arange(shape[axis], dtype=jnp.uint32)
        if axis == 0:
            numbers = numbers + jnp.asarray(first_row, jnp.uint32)
        elif axis == len(shape) - 2:
            numbers = numbers + jnp.asarray(first_token, jnp.uint32)
        token = mix(token[..., None] + numbers)
    other = mix(token ^ words[1])
    features = jnp.arange(shape[-1], dtype=jnp.uint32) + jnp.asarray(first_feature, jnp.uint32)
    return mix(mix(token[..., None] + features) ^ other[..., None])


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words whose output bits depend evenly on all input bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
