"""Equations of a program, those inside of its loops and functions too."""

from typing import Any

import jax


def equations(jaxpr: Any) -> int:
    """How many, where text may show what is shared once or twice."""
    parameters = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=is_jaxpr)
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in parameters if is_jaxpr(p))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
