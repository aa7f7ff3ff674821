"""A row of an encoder's batch: its tokens, and after them its label as one more token, the row's only target.

So the batches of encoders are those of decoders: tokens int32 [B, T] with a mask of what is learned, [B, T], and
whatever groups, pads, cuts and resumes them need not know. A class stands there as its number, the number of a
regression as the 32 bits of its float32 (data/glue/examples.as_token).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

REGRESSION = 1  # labels of a head that gives a number


class Rows(NamedTuple):
    """A batch taken apart."""

    lengths: jax.Array  # int32 [B], tokens of each row without label and padding; 0 where there is no label
    labels: jax.Array  # int32 [B]
    labelled: jax.Array  # float32 [], rows that have a label


def taken_apart(tokens: jax.Array, loss_mask: jax.Array) -> Rows:
    """tokens int32 [B, T] and loss_mask bool [B, T], true at each row's label alone."""
    places = jnp.argmax(loss_mask, axis=1).astype(jnp.int32)  # 0 where there is none, which no label's place is
    labels = jnp.take_along_axis(tokens, places[:, None], axis=1)[:, 0]
    return Rows(places, labels, jnp.sum(places > 0).astype(jnp.float32))


def as_number(tokens: jax.Array) -> jax.Array:
    """The labels int32 [B] of a regression as float32 [B]."""
    return jax.lax.bitcast_convert_type(tokens, jnp.float32)
