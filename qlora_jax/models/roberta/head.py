"""The head of an encoder: of the first token's state, classes or one number. It trains whole, in float32.

    y = tanh(x W^T + b) V^T + c        W, b: "dense"; V, c: "out_proj"; as RobertaClassificationHead, without dropout

Its loss is that of RobertaForSequenceClassification: cross entropy, or for one label the squared error.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.kind import Bidirectional
from qlora_jax.models.layers import Frozen, Trained
from qlora_jax.models.roberta.names import head_shapes
from qlora_jax.models.roberta.row import REGRESSION, as_number


class _Layer(nnx.Module):
    """weight [O, I] and bias [O]."""

    def __init__(self, weight: nnx.Variable, bias: nnx.Variable):
        self.weight, self.bias = weight, bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight.get_value().T + self.bias.get_value()


class Head(nnx.Module):
    """Its parts stand under their names on disk.

    arrays: {"dense.weight" [D, D], "dense.bias" [D], "out_proj.weight" [labels, D], "out_proj.bias" [labels]}, float32.
    """

    def __init__(self, arrays: Mapping[str, Any], trains: bool):
        held = Trained if trains else Frozen
        parts = [
            _Layer(*(held(arrays[f"{part}.{name}"]) for name in ("weight", "bias"))) for part in ("dense", "out_proj")
        ]
        self.dense, self.out_proj = parts

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] of each row's first token -> float32 [B, labels]."""
        return self.out_proj(jnp.tanh(self.dense(x.astype(jnp.float32))))

    def arrays(self) -> dict[str, jax.Array]:
        """What it was made of."""
        parts = {"dense": self.dense, "out_proj": self.out_proj}
        return {
            f"{name}.{which}": getattr(part, which).get_value()
            for name, part in parts.items()
            for which in ("weight", "bias")
        }

    @property
    def labels(self) -> int:
        return self.out_proj.bias.get_value().shape[0]


def fresh_head(kind: Bidirectional, D: int, labels: int, key: jax.Array) -> dict[str, jax.Array]:
    """Arrays of a head as transformers starts one: weights normal of the model's initializer_range, biases zero."""
    arrays = {}
    for place, (name, shape) in enumerate(head_shapes(kind, D, labels).items()):
        if name.endswith("weight"):
            drawn = jax.random.normal(jax.random.fold_in(key, place), (math.prod(shape),), jnp.float32)
            arrays[name.removeprefix(f"{kind.head}.")] = kind.init_std * drawn.reshape(shape)
        else:
            arrays[name.removeprefix(f"{kind.head}.")] = jnp.zeros(shape, jnp.float32)
    return arrays


def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """float32 [B]: of logits [B, labels] and the labels int32 [B] of rows (row.py)."""
    if logits.shape[-1] == REGRESSION:
        return (logits[:, 0] - as_number(labels)) ** 2
    taken = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - taken
