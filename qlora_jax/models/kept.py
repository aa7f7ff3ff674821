"""What of a layer is kept between its forward and its backward pass, by the names that models give to values.

    y, kept = keeping(layer, NAMES)(x)        forward: beside y the values that bear one of the names
    y = with_kept(layer, kept)(x)             backward: the same y, made of the kept values

In the second form a kept value stands in place of the one that is computed, whose gradient it takes. What only led to
the value itself is then never used, and the compiler drops it: a linear layer whose output is kept is not computed
again. A value gets its name in the model, by `jax.ad_checkpoint.checkpoint_name`, which changes nothing else.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

# Of a decoder's layer (block.py): enough that no product is computed again but attention's scores, and with the sums of
# flash attention not those. The last is what the adapters' A give (pallas_kernels.nf4_matmul.low_rank_term).
NAMES = ("queries", "keys", "values", "attention", "log_sums", "attended", "gate", "up", "low_rank")


def keeping(function: Callable[..., Any], names: Collection[str]) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """`function` that also returns its values of these names, those of one name numbered in their order.

    Names within scans and custom gradients are not seen.
    """

    def with_values(*arguments: Any) -> tuple[Any, dict[str, jax.Array]]:
        kept: dict[str, jax.Array] = {}
        if not names:
            return function(*arguments), kept

        def note(name: str, number: int, value: jax.Array) -> jax.Array:
            if name in names:
                kept[f"{name} {number}"] = value
            return value

        return _run(function, arguments, note), kept

    return with_values


def with_kept(function: Callable[..., Any], kept: dict[str, jax.Array]) -> Callable[..., Any]:
    """`function` whose values of these names are those of `kept`; gradients pass to what would have been computed."""

    if not kept:
        return function

    def replace(name: str, number: int, value: jax.Array) -> jax.Array:
        here = kept.get(f"{name} {number}")
        return value if here is None else _instead(value, here)

    return lambda *arguments: _run(function, arguments, replace)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """Values of one dtype that differ in their first axis at most, one after the other along it."""

    values: jax.Array
    parts: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})  # (name, length) of each


def joined(kept: dict[str, jax.Array]) -> list[Joined]:
    """The same values in few arrays: a scan writes each of its outputs by a kernel of its own."""
    alike: dict[Any, list[str]] = {}
    for name, value in kept.items():
        alike.setdefault((value.shape[1:], value.dtype), []).append(name)
    return [
        Joined(
            jnp.concatenate([kept[name] for name in names]) if len(names) > 1 else kept[names[0]],
            tuple((name, len(kept[name])) for name in names),
        )
        for names in alike.values()
    ]


def taken_apart(groups: list[Joined]) -> dict[str, jax.Array]:
    """What `joined` joined."""
    kept: dict[str, jax.Array] = {}
    for group in groups:
        first = 0
        for name, length in group.parts:
            kept[name] = group.values[first : first + length]
            first += length
    return kept


@jax.custom_vjp
def _instead(value: jax.Array, kept: jax.Array) -> jax.Array:
    """`kept`, whose gradient is that of `value`."""
    return kept


_instead.defvjp(lambda value, kept: (kept, None), lambda _, d_kept: (d_kept, None))


Visit = Callable[[str, int, jax.Array], jax.Array]  # name, which of that name, value -> what stands in its place


def _run(function: Callable[..., Any], arguments: tuple, visit: Visit) -> Any:
    """function(*arguments), operation by operation; each named value is what `visit` makes of it."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    out = _evaluate(closed, jax.tree.leaves(arguments), visit)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _evaluate(closed: ClosedJaxpr, inputs: list[Any], visit: Visit) -> list[Any]:
    seen: Counter[str] = Counter()
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, inputs, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for operation in closed.jaxpr.eqns:
        parameters = operation.primitive.get_bind_params(operation.params)
        found = operation.primitive.bind(*map(read, operation.invars), **parameters)
        results = list(found) if operation.primitive.multiple_results else [found]
        if operation.primitive.name == "name":
            name = operation.params["name"]
            results = [visit(name, seen[name], results[0])]
            seen[name] += 1
        values |= dict(zip(operation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]
