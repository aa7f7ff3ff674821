"""Layers that every decoder shares: a linear layer over a frozen weight, and norms.

A block's arrays are stacked: inside `lax.scan` each layer sees its own slice, so a Linear here is for one layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.nf4_matmul import dense_matmul, is_for_cpu, low_rank_terms
from qlora_jax.mesh.axes import TENSOR
from qlora_jax.mesh.tensor import Split, entered, first_of, left, own
from qlora_jax.models.dropout import Dropout
from qlora_jax.quant.tensor import QuantizedTensor, matmul_adapted, matmul_joined


class Frozen(nnx.Variable):
    """A weight that never trains: a QuantizedTensor, or an array for what stays in 16 or 32 bits."""


class Trained(nnx.LoRAParam):
    """A whole matrix that trains beside the adapters, in float32: it goes wherever they go."""


class Setting(nnx.Variable):
    """A number that says what a layer is, where layers differ: stacked as its weights are."""


class Linear(nnx.Module):
    """y = x W^T (+ bias), plus scale * dropout(x) A^T B^T where an adapter is attached.

    weight: W [O, I], QuantizedTensor or array. bias: [O] or None. lora_a: A [R, I], lora_b: B [O, R], float32.
    split: how devices divide it that compute its product together; the arrays are this one's then (models/divided).
    """

    def __init__(self, weight: QuantizedTensor | jax.Array, bias: jax.Array | None = None):
        self.weight = Frozen(weight)
        if bias is not None:
            self.bias = Frozen(bias)
        self.lora_a: Any = nnx.data(None)
        self.lora_b: Any = nnx.data(None)
        self.lora_scale: Any = 1.0  # a number, or an array [] of the program's input
        self.split: Split | None = None

    def __call__(self, x: jax.Array, dropout: Dropout) -> jax.Array:
        return project([self], x, dropout)[0]

    def own_lora_b(self) -> jax.Array:
        """B of this device's out-features; that of a fused layer stands whole on each."""
        b, sections = self.lora_b.get_value(), () if self.split is None else self.split.sections
        return own(b, -2, sections) if len(sections) > 1 else b


def project(linears: Sequence[Linear], x: jax.Array, dropout: Dropout) -> list[jax.Array]:
    """What each of several linear layers makes of one x [..., I]: [..., O] each.

    On a GPU their products are one, as are those of their adapters, where all are quantized and all have an adapter or
    none has. On a CPU each is computed for itself: batches and joined weights are slower there.
    """
    way = "" if linears[0].split is None else linears[0].split.by
    outputs = _products(linears, entered(x) if way == "out" else x, dropout)
    return [
        out + linear.bias.get_value().astype(out.dtype) if hasattr(linear, "bias") else out
        for linear, out in zip(linears, map(left, outputs) if way == "in" else outputs, strict=True)
    ]


def _products(linears: Sequence[Linear], x: jax.Array, dropout: Dropout) -> list[jax.Array]:
    """`project` without biases."""
    weights = [linear.weight.get_value() for linear in linears]
    adapted = [linear.lora_a is not None for linear in linears]
    quantized = all(isinstance(w, QuantizedTensor) for w in weights)
    if len(linears) > 1 and (is_for_cpu() or not quantized or all(adapted) != any(adapted)):
        outputs: list[jax.Array] = []
        for linear in linears:
            if outputs:
                x, outputs[-1] = in_order(x, outputs[-1])
            outputs += _products([linear], x, dropout)
        return outputs
    if any(adapted):
        a = tuple(linear.lora_a.get_value() for linear in linears)
        b = tuple(linear.own_lora_b() for linear in linears)
        way = "" if linears[0].split is None else linears[0].split.by
        dropped = dropout.each(x, len(linears), first_of(x.shape[-1]) if way == "in" else 0)
        terms = (dropped, a, b, tuple(linear.lora_scale for linear in linears))
    else:
        dropout.skip(len(linears))
    if not quantized:
        y = dense_matmul(x, weights[0].astype(x.dtype), contract=1)
        y = y + low_rank_terms(*terms) if any(adapted) else y
    elif any(adapted) and is_for_cpu():
        y = matmul_joined(x, weights) + low_rank_terms(*terms)
    elif any(adapted):
        dropped, *adapters = terms
        y = matmul_adapted(x, dropped, weights, *adapters)
    else:
        y = matmul_joined(x, weights)
    return jnp.split(y, np.cumsum([w.shape[0] for w in weights])[:-1], axis=-1)


class Norm(nnx.Module):
    """A norm over the last axes, as many as its weight has, in float32; the result has x's dtype.

        rms     x / rms(x) * w                        rms+1    x / rms(x) * (1 + w)
        layer   (x - mean(x)) / std(x) * w (+ bias)   layer+1  (x - mean(x)) / std(x) * (1 + w) (+ bias)

    A weight of two axes [N, H] norms each head by itself. divided: x is one device's part of what is normed.
    """

    def __init__(self, weight: jax.Array, eps: float, kind: str = "rms", bias: jax.Array | None = None):
        self.weight = Frozen(weight)
        if bias is not None:
            self.bias = Frozen(bias)
        self.eps, self.kind = eps, kind
        self.divided = False

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.kind.startswith("layer"):
            x32 = x32 - self._mean(x32)
        x32 = x32 * jax.lax.rsqrt(self._mean(x32 * x32) + self.eps)
        weight = self.weight.get_value()
        x32 = x32 * (1 + weight if self.kind.endswith("+1") else weight)
        if hasattr(self, "bias"):
            x32 = x32 + self.bias.get_value()
        return x32.astype(x.dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return jax.lax.pmean(mean, TENSOR) if self.divided else mean


class NoNorm(nnx.Module):
    """Where a family ends without a norm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Projected(nnx.Module):
    """The final norm, and the projection [E, D] to the head's width that follows it."""

    def __init__(self, norm: Norm | NoNorm, weight: jax.Array):
        self.norm, self.weight = norm, Frozen(weight)

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense_matmul(self.norm(x), self.weight.get_value().astype(x.dtype), contract=1)


class Group(nnx.Module):
    """A name on disk between a layer and its parts, such as "self_attn": it holds them."""


def place(block: nnx.Module, name: str, part: nnx.Module | nnx.Variable) -> None:
    """Puts a part where its name says: place(block, "self_attn.q_proj", linear)."""
    *groups, last = name.split(".")
    owner: Any = block
    for group in groups:
        if not hasattr(owner, group):
            setattr(owner, group, Group())
        owner = getattr(owner, group)
    setattr(owner, last, part)


def part_of(block: nnx.Module, name: str) -> Any:
    """What `place` put there."""
    found: Any = block
    for step in name.split("."):
        found = getattr(found, step)
    return found


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # kind.ACTIVATIONS
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _exact_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
}


def in_order(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, y), where what comes of this x waits for y; so do their gradients for each other.

    Projections of one input need not be computed side by side: where weights are dequantized before they are
    multiplied, a GPU's compiler would hold several of them in 16 bits at once.
    """
    return jax.lax.optimization_barrier((x, y))


@jax.custom_vjp
def gradient_after(y: jax.Array, x: jax.Array) -> jax.Array:
    """y, whose gradient waits for x: in a layer that is computed again, the last weight waits for the first ones."""
    return y


def _gradient_after_forward(y, x):
    return y, x


def _gradient_after_backward(x, dy):
    dy, x = jax.lax.optimization_barrier((dy, x))
    return dy, jnp.zeros_like(x)


gradient_after.defvjp(_gradient_after_forward, _gradient_after_backward)
