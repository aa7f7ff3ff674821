"""The output head: hidden states -> logits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.mesh.axes import TENSOR, TOKENS
from qlora_jax.mesh.gather import rows_here
from qlora_jax.mesh.tensor import entered, left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A head that is more than a matrix: cap * tanh((scale * h W^T + bias) / cap).

    weight: [V, D]. bias: [V] or None. softcap: 0 is none. axes: of a mesh, along which V is divided: weight and bias
    are this device's part then, inside `shard_map`.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __getitem__(self, rows: Any) -> "Head":
        """The head of these tokens alone; where it is divided, every device gets all of them."""
        if self.axes:
            taken = lambda part: jax.lax.psum(rows_here(part, rows, self.axes), self.axes)  # noqa: E731
            bias = None if self.bias is None else taken(self.bias)
            return dataclasses.replace(self, weight=taken(self.weight), bias=bias, axes=())
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


def axes_of(head: jax.Array | Head) -> tuple[str, ...]:
    """The axes of a mesh along which the head is divided."""
    return head.axes if isinstance(head, Head) else ()


def rows_of(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Of them those along which devices have tokens of their own."""
    return tuple(axis for axis in axes if axis in TOKENS)


def token_losses(hidden: jax.Array, head: jax.Array | Head, labels: jax.Array) -> jax.Array:
    """hidden [m, D], labels int32 [m] -> float32 [m]: -log softmax(logits)[label], nats."""
    if not axes_of(head):
        return token_nll(head_logits(hidden, head), labels)
    return _Divided.of(hidden, head, labels).losses()


def token_losses_and_hits(
    hidden: jax.Array, head: jax.Array | Head, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As token_losses, and whether the label is the likeliest token: bool [m]."""
    if axes_of(head):
        divided = _Divided.of(hidden, head, labels)
        return divided.losses(), divided.hits()
    logits = head_logits(hidden, head)
    return token_nll(logits, labels), jnp.argmax(logits, axis=-1) == labels


def token_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """float32 [..., V], int32 [...] -> float32 [...]: -log softmax(logits)[label], nats."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


class _Divided(NamedTuple):
    """Logits where each device has a part of the vocabulary: of that part, of all devices' rows.

    Rows travel, the head does not. Each device gets the sums for its own rows: their transposes give it the gradient
    of its own rows. Devices along tensor have the same rows, which need not travel among them.
    """

    logits: jax.Array  # float32 [n * m, V / devices], n devices along fsdp
    labels: jax.Array  # int32 [n * m], counted from the part's first token
    largest: jax.Array  # float32 [n * m], of all parts
    axes: tuple[str, ...]
    m: int

    @classmethod
    def of(cls, hidden: jax.Array, head: Any, labels: jax.Array) -> "_Divided":
        axes, m = head.axes, hidden.shape[0]
        if TENSOR in axes:
            hidden = entered(hidden)
        if axis := rows_of(axes):
            hidden, labels = (jax.lax.all_gather(x, axis, tiled=True) for x in (hidden, labels))
        logits = head_logits(hidden, head)
        largest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), axes)
        return cls(logits, labels - jax.lax.axis_index(axes) * logits.shape[-1], largest, axes, m)

    def losses(self) -> jax.Array:
        V = self.logits.shape[-1]
        is_here = (self.labels >= 0) & (self.labels < V)
        picked = jnp.take_along_axis(self.logits, jnp.clip(self.labels, 0, V - 1)[:, None], axis=-1)[:, 0]
        sums = jnp.sum(jnp.exp(self.logits - self.largest[:, None]), axis=-1)
        return jnp.log(self._total(sums)) + self._own(self.largest) - self._total(jnp.where(is_here, picked, 0.0))

    def hits(self) -> jax.Array:
        """Of equally likely tokens the first counts, as argmax has it."""
        V = self.logits.shape[-1]
        here = jnp.argmax(self.logits, axis=-1) - self.labels  # from the label to the part's likeliest token
        first = jnp.where(jnp.max(self.logits, axis=-1) == self.largest, here, V * jax.lax.axis_size(self.axes))
        return self._own(jax.lax.pmin(first, self.axes)) == 0

    def _total(self, rows: jax.Array) -> jax.Array:
        """Summed over all parts, of this device's rows."""
        if axis := rows_of(self.axes):
            rows = jax.lax.psum_scatter(rows, axis, tiled=True)
        return left(rows) if TENSOR in self.axes else rows

    def _own(self, rows: jax.Array) -> jax.Array:
        axis = rows_of(self.axes)
        return rows if not axis else jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis) * self.m, self.m)
