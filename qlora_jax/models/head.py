"""The output head: hidden states -> logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import dense_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A head that is more than a matrix: cap * tanh((scale * h W^T + bias) / cap).

    weight: [V, D]. bias: [V] or None. softcap: 0 is none.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __getitem__(self, rows: Any) -> "Head":
        """The head of these tokens alone."""
        return dataclasses.replace(self, weight=self.weight[rows], bias=None if self.bias is None else self.bias[rows])


def head_logits(hidden: jax.Array, head: jax.Array | Head) -> jax.Array:
    """hidden [..., D] times head [V, D] -> float32 [..., V]; operands in hidden's dtype, sums in float32."""
    if not isinstance(head, Head):
        return dense_matmul(hidden, head.astype(hidden.dtype), 1, jnp.float32)
    logits = dense_matmul(hidden, head.weight.astype(hidden.dtype), 1, jnp.float32)
    if head.scale != 1:
        logits = logits * head.scale
    if head.bias is not None:
        logits = logits + head.bias.astype(jnp.float32)
    return head.softcap * jnp.tanh(logits / head.softcap) if head.softcap else logits
