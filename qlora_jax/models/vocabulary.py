"""Rows of the embedding and the head: room for tokens that a model was not made with."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.models.decoder import Decoder


def grow(model: Decoder, rows: int, fill: Sequence[int], real: int) -> None:
    """Gives embedding and head `rows` rows, in place.

    Rows `fill` become the mean of the first `real` rows, of the embedding and of an untied head each, in float32 and
    rounded once. Exactly as many rows as tokens, not the next multiple of 64: PEFT and transformers make a base fit an
    adapter by len(tokenizer) rows. XLA pads a product's odd size itself.
    """
    if not len(fill):
        return
    if model.config.kind.head_bias:
        raise InputError("tokens cannot be added to a model whose head has a bias: leave data.added_tokens empty")
    for matrix in filter(None, (model.embedding, model.head)):
        matrix.set_value(_grown(matrix.get_value(), np.asarray(fill, np.int32), rows, real))
    set_rows(model, rows)


def set_rows(model: Decoder, rows: int) -> None:
    """Says in the model's config how many rows its embedding has."""
    model.config = dataclasses.replace(model.config, V=rows)


@partial(jax.jit, static_argnames=("rows", "real"))
def _grown(matrix: jax.Array, fill: jax.Array, rows: int, real: int) -> jax.Array:
    mean = jnp.mean(matrix[:real], axis=0, dtype=jnp.float32)
    grown = jnp.pad(matrix, ((0, rows - matrix.shape[0]), (0, 0)))
    return grown.at[fill].set(mean.astype(matrix.dtype))
