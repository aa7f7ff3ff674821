"""Attention's forms side by side, forward and backward: by slope, as products are timed (nf4_matmul/measure.py)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Scoring, config
from pallas_kernels.nf4_matmul import measure
from qlora_jax.models.attention import causal_attention

WRONG = 0.03  # of a gradient's size: further off is not a rounding of 16-bit values


class Case(NamedTuple):
    """Rows of attention to time."""

    B: int
    T: int
    N: int
    K: int
    H: int
    mask: str = "padded"  # or "packed": four examples a row; or "window": a quarter of the row
    softcap: float = 0.0

    @property
    def flops(self) -> float:
        """Of forward and backward over the causal half, nothing computed again: 2 products, then 4."""
        return 6 * 2 * self.B * self.N * self.T**2 * self.H / 2

    def starts(self) -> np.ndarray | None:
        """int32 [B, T], see causal_attention."""
        places = np.arange(self.T)
        part = max(1, self.T // 4)
        rows = {"padded": None, "packed": places // part * part, "window": np.maximum(places - part + 1, 0)}[self.mask]
        return None if rows is None else np.tile(rows.astype(np.int32), (self.B, 1))


def forms(case: Case, dtype: str, names: tuple[str, ...] = config.FORMS) -> dict[str, measure.Run]:
    """run(rounds) -> (out, d q, d k, d v) of the last round, by form; they are the same arrays in each."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    rows = case.starts()
    starts = None if rows is None else jnp.asarray(rows)
    return {name: partial(_in_rounds(name, Scoring(softcap=case.softcap)), q, k, v, d_out, starts) for name in names}


def _in_rounds(name: str, scoring: Scoring) -> Any:
    """program(q, k, v, d_out, starts, rounds), jitted: each round begins when the one before has ended."""

    def program(q: Any, k: Any, v: Any, d_out: Any, starts: Any, rounds: Any) -> Any:
        def one(_: Any, carry: Any) -> Any:
            q, k, v = carry[0]
            out, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, name, starts, scoring), q, k, v)
            found = (out, *pull(d_out))
            nothing = sum(0 * array[0, 0, 0, 0] for array in found)
            return (q + nothing.astype(q.dtype), k, v), found

        zeros = (jnp.zeros_like(q), jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v))
        return jax.lax.fori_loop(0, rounds, one, ((q, k, v), zeros))[1]

    return jax.jit(program)


def split_wrong(runs: dict[str, measure.Run]) -> tuple[dict[str, measure.Run], dict[str, str]]:
    """The forms that agree with the first that a compiler makes of plain JAX, and what is wrong with the others."""
    found = {name: [np.asarray(x, np.float32) for x in run(np.int32(1))] for name, run in runs.items()}
    plain = next((name for name in ("xla", "chunked") if name in found), None)
    wrong: dict[str, str] = {}
    for name, arrays in found.items() if plain else ():
        for what, mine, theirs in zip(("out", "d q", "d k", "d v"), arrays, found[plain or ""], strict=True):
            error = np.sqrt(np.mean((mine - theirs) ** 2)) / np.sqrt(np.mean(theirs**2))
            if not error <= WRONG:
                wrong[name] = f"its {what} is off by {error:.1%} of that of {plain}"
    return {name: run for name, run in runs.items() if name not in wrong}, wrong


def entries(results: list[dict[str, Any]]) -> config.Table:
    """What the table of the GPU says: of each head width and length the case in which flash attention gains least."""
    found: dict[tuple[int, int], tuple[float, config.Entry]] = {}
    for result in results:
        seconds = result["seconds"]
        key = (result["H"], config.bucket(result["T"]))
        others = [seconds[form] for form in ("xla", "chunked") if form in seconds]
        gain = min(others, default=0.0) / seconds["flash"] if "flash" in seconds else 0.0
        if key not in found or gain < found[key][0]:
            found[key] = gain, seconds
    return {key: seconds for key, (_, seconds) in found.items()}
