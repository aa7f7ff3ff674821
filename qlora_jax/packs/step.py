"""Steps of a pack: A adapters train in one program over one frozen base.

    for each member a:  for each of the steps s:  adapter_a, optimizer_a <- step(adapter_a, optimizer_a, batch_{a,s})

What differs between members (learning rate, scale, dropout, clipping, weight decay, seed, steps) is an input of the
program, so one compilation serves every pack of the same shapes. A smaller rank is a larger one whose last rows of A
and columns of B are zero: each one's gradient has the other as a factor, so they stay zero, as does an adapter on a
layer that is not targeted.

A member takes no step after its last, nor after one whose loss or gradient is not finite: its bits stay.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qlora_jax import lora
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.dropout import DropoutRate
from qlora_jax.optim.schedules import make_transformation
from qlora_jax.train.step import loss_and_hits, make_gradient

OVER_MEMBERS = ("map", "vmap")  # one after the other, or all at once


def over_members(over: str) -> str:
    """One of OVER_MEMBERS; "auto" is map on CPUs, else vmap. Raises ValueError for anything else."""
    if over not in ("auto", *OVER_MEMBERS):
        raise ValueError(f"over is {over!r}; expected auto, {' or '.join(OVER_MEMBERS)}")
    return over if over != "auto" else "map" if jax.default_backend() == "cpu" else "vmap"


class Member(NamedTuple):
    """What a program is told of a member; in a pack each array has a leading A."""

    scale: Any  # float32 [], of the adapter's output
    dropout: DropoutRate  # arrays []
    dropout_key: Any  # key []
    max_grad_norm: Any  # float32 []; 0 does not clip
    weight_decay: Any  # float32 []
    steps: Any  # int32 []


class MemberState(NamedTuple):
    adapter: Any  # of lora.split
    optimizer: Any  # optax's
    alive: Any  # bool []: every loss and gradient so far was finite


class Steps(NamedTuple):
    """Of at most K steps in a row; in a pack all but the last two have a leading A."""

    learning_rate: Any  # float32 [K]
    tokens: Any  # int32 [K, G, B, T]
    loss_mask: Any  # bool [K, G, B, T]
    segments: Any  # int32 [K, G, B, T] of packed rows, as Decoder takes them; else None
    first: Any  # int32 [], number of the first step, from 0
    count: Any  # int32 [], how many of the K are to be taken


class Taken(NamedTuple):
    """Of the steps that were taken, float32 [K]; zero elsewhere. In a pack [A, K]."""

    loss: jax.Array  # nats a target token
    grad_norm: jax.Array  # before clipping
    target_tokens: jax.Array


class Optimizer(NamedTuple):
    """What members share of the config's section; the rest of it is theirs."""

    name: str
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, section: Any) -> "Optimizer":
        return cls(section.name, section.beta1, section.beta2, section.eps)


def make_steps(graph: Any, optimizer: Optimizer, loss_chunk: int, has_dropout: bool, over: str) -> Callable[..., Any]:
    """The function to jit.

    Args:
      graph: of lora.split, with adapters on every layer that any member targets.
      loss_chunk: see summed_loss.
      has_dropout: whether any member drops out.
      over: one of OVER_MEMBERS.
    Returns:
      steps(state MemberState [A], base, member Member [A], Steps) -> (MemberState, Taken).
    """

    def one(state: MemberState, base: Any, member: Member, of: Steps):
        rates, tokens, masks, segments, first, count = of
        gradient = make_gradient(graph, loss_chunk, member.max_grad_norm, _merge_for(member))

        def step(k: jax.Array, carry: tuple[MemberState, Taken]) -> tuple[MemberState, Taken]:
            state, taken = carry

            def advance(state: MemberState) -> tuple[MemberState, tuple[jax.Array, ...]]:
                key = jax.random.fold_in(member.dropout_key, first + k) if has_dropout else None
                sums, metrics = gradient(
                    state.adapter, base, tokens[k], masks[k], key, None if segments is None else segments[k]
                )
                sums, metrics = jax.lax.optimization_barrier((sums, metrics))  # rounds as a program of its own
                finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
                update = lambda: _update(optimizer, state, member, rates[k], sums, metrics.factor)  # noqa: E731
                new = _either(over, finite, update, lambda: state)
                return new._replace(alive=finite), (metrics.loss, metrics.grad_norm, metrics.target_tokens)

            takes = state.alive & (first + k < member.steps)
            nothing = (jnp.float32(0),) * 3
            state, row = _either(over, takes, lambda: advance(state), lambda: (state, nothing))
            return state, Taken(*(column.at[k].set(value) for column, value in zip(taken, row, strict=True)))

        start = Taken(*[jnp.zeros(len(rates), jnp.float32)] * 3)
        return jax.lax.fori_loop(0, count, step, (state, start))

    def steps(state: MemberState, base: Any, member: Member, of: Steps) -> tuple[MemberState, Taken]:
        def each(arrays: Any) -> Any:
            state, member, (rates, tokens, masks, segments) = arrays
            return one(state, base, member, Steps(rates, tokens, masks, segments, of.first, of.count))

        return _over(over, each, (state, member, of[:4]))

    return steps


def make_pack_evaluation(graph: Any, loss_chunk: int, over: str) -> Callable[..., Any]:
    """evaluate(adapter [A], base, scale [A], wanted bool [A], tokens int32 [B, T], loss_mask bool [B, T],
    segments int32 [B, T] or None).

    Returns summed nats, targets that are the likeliest token, and targets, float32 [A] each; zeros where not wanted. Of
    an encoder its loss, and rows in place of tokens.
    """

    def one(adapter: Any, base: Any, scale: jax.Array, wanted: jax.Array, *batch: Any) -> Any:
        tokens, mask, segments = batch

        def evaluate():
            model = _scaled(nnx.merge(graph, adapter, base), scale)
            return loss_and_hits(model, tokens, mask, segments, loss_chunk)

        return _either(over, wanted, evaluate, lambda: (jnp.float32(0),) * 3)

    def evaluation(adapter, base, scale, wanted, tokens, mask, segments=None):
        each = lambda arrays: one(arrays[0], base, arrays[1], arrays[2], tokens, mask, segments)  # noqa: E731
        return _over(over, each, (adapter, scale, wanted))

    return evaluation


def initial_optimizer(optimizer: Any, adapter: Any) -> Any:
    """optax's state of adapters [A, ...], each its own."""
    return jax.vmap(make_transformation(optimizer, 0.0, 0.0).init)(adapter)


def _over(how: str, function: Callable[[Any], Any], arrays: Any) -> Any:
    return jax.lax.map(function, arrays) if how == "map" else jax.vmap(function)(arrays)


def _either(over: str, condition: jax.Array, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """One of two; where members go side by side both are computed, for lax.cond would make a base for each member."""
    if over == "map":
        return jax.lax.cond(condition, then, otherwise)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then(), otherwise())


def _update(optimizer: Any, state: MemberState, member: Member, rate: jax.Array, sums: Any, factor: Any) -> MemberState:
    grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), sums)
    tx = make_transformation(optimizer, rate, member.weight_decay)
    updates, inner = tx.update(grads, state.optimizer, state.adapter)
    return MemberState(optax.apply_updates(state.adapter, updates), inner, state.alive)


def _merge_for(member: Member) -> Callable[..., Decoder]:
    def merge(graph: Any, adapter: Any, base: Any) -> Decoder:
        model = _scaled(nnx.merge(graph, adapter, base), member.scale)
        model.dropout_rate = nnx.data(member.dropout)
        return model

    return merge


def _scaled(model: Decoder, scale: jax.Array) -> Decoder:
    """The model whose adapters have this scale; a layer's slice of it is a scalar."""
    for name in model.config.linears:
        layer = lora.linear(model, name)
        if layer.lora_a is not None:
            layer.lora_scale = nnx.data(jnp.broadcast_to(scale, (model.config.depth(name),)))
    return model


# One function for one model, as train/step.gradient_of
steps_of = functools.lru_cache(maxsize=8)(make_steps)
pack_evaluation_of = functools.lru_cache(maxsize=8)(make_pack_evaluation)
