"""The nucleus is exact, draws follow the renormalised distribution, and settings outside their ranges are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.generate.sampling import Sampling, filtered, next_tokens

pytestmark = pytest.mark.quick_compile

P = np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])


def draw(probabilities: np.ndarray, count: int, temperature: float, top_p: float) -> np.ndarray:
    """Shares of `count` draws, [V]."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (count, len(probabilities)))
    keys = jax.random.split(jax.random.key(7), count)
    settings = (jnp.float32(temperature), jnp.float32(top_p), jnp.int32(0), jnp.float32(0))
    tokens = jax.jit(next_tokens)(logits, keys, *settings)
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(probabilities)) / count


def keep(logits: jax.Array, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> jax.Array:
    return jax.jit(filtered)(logits, jnp.float32(top_p), jnp.int32(top_k), jnp.float32(min_p))


def support(probabilities: list[float], top_p: float) -> list[int]:
    kept = keep(jnp.log(jnp.asarray([probabilities], jnp.float32)), top_p)
    return np.flatnonzero(np.isfinite(np.asarray(kept)[0])).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.79, [1, 3, 4]),
        (0.89, [1, 2, 3, 4]),
        (0.94, [0, 1, 2, 3, 4]),  # of two equal ones the lower id
        (0.96, [0, 1, 2, 3, 4, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, expected) -> None:
    assert support(P.tolist(), top_p) == expected


def test_ties_rank_by_id() -> None:
    assert support([0.25, 0.25, 0.25, 0.25], 0.3) == [0, 1]
    assert support([0.2, 0.3, 0.3, 0.2], 0.5) == [1, 2]
    assert support([0.2, 0.3, 0.3, 0.2], 0.65) == [0, 1, 2]


def test_top_p_1_keeps_the_longest_tail() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32000)) * 8, jnp.float32)
    assert np.isfinite(np.asarray(keep(logits))).all()


def reference(logits: np.ndarray, top_p: float, top_k: int, min_p: float) -> tuple[set[int], float]:
    """Tokens kept, filter after filter in float64, and how near the nearest limit was to going the other way."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    nearest = 1.0
    if top_p < 1:
        total = np.cumsum(p)
        nearest = float(np.min(np.abs(total - top_p)))
        order = order[: int(np.sum(total < top_p)) + 1]
    p = p[: len(order)] / p[: len(order)].sum()
    nearest = min(nearest, float(np.min(np.abs(p / p[0] - min_p))) if min_p < 1 else 1.0)
    return {token for token, share in zip(order, p / p[0], strict=True) if share >= min_p}, nearest


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=9, max_size=9),
    st.sampled_from([1e-6, 0.3, 0.5, 0.9, 0.99, 1.0]),
    st.integers(0, 11),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_filters_keep_what_a_plain_reference_keeps(logits, top_p, top_k, min_p) -> None:
    expected, nearest = reference(np.asarray(logits, np.float64), top_p, top_k, min_p)
    assume(nearest > 1e-5)  # at a limit itself rounding decides
    found = np.asarray(keep(jnp.asarray([logits], jnp.float32), top_p, top_k, min_p))[0]
    assert set(np.flatnonzero(np.isfinite(found)).tolist()) == expected
    assert all(found[token] == np.float32(logits[token]) for token in expected)


def test_each_filter_sees_what_the_one_before_it_left() -> None:
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]], jnp.float32))

    def kept(**settings) -> list[int]:
        return np.flatnonzero(np.isfinite(np.asarray(keep(logits, **settings))[0])).tolist()

    assert kept(top_p=0.65) == [0, 1]
    assert kept(top_k=2) == [0, 1] and kept(top_k=9) == kept() == [0, 1, 2, 3]
    assert kept(top_p=0.5, top_k=2) == [0]  # of 0.7 the first is more than a half
    assert kept(min_p=0.51) == [0, 1] and kept(min_p=0.49) == [0, 1, 2] and kept(min_p=1.0) == [0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.7), (0.5, 0.7), (2.0, 0.9)])
def test_draws_follow_the_distribution(temperature, top_p) -> None:
    tempered = P ** (1 / temperature)
    tempered /= tempered.sum()
    order = np.argsort(-tempered, kind="stable")
    count = int(np.searchsorted(np.cumsum(tempered[order]), top_p - 1e-6)) + 1
    expected = np.zeros(len(P))
    expected[order[:count]] = tempered[order[:count]] / tempered[order[:count]].sum()
    n = 20_000
    found = draw(P, n, temperature, top_p)
    assert (found[expected == 0] == 0).all()
    inside = expected > 0
    chi_square = n * np.sum((found[inside] - expected[inside]) ** 2 / expected[inside])
    assert chi_square < 25  # 5 degrees of freedom at most: exceeded by chance once in 7,000


def test_greedy_is_the_most_probable_the_lower_id_among_equals() -> None:
    assert draw(P, 10, 0.0, 0.9)[1] == 1
    assert draw(np.array([0.2, 0.3, 0.3, 0.2]), 10, 0.0, 0.9)[1] == 1
    assert draw(P, 100, 1.0, 1e-9)[1] == 1
    assert draw(P, 100, 1e-30, 1.0)[1] == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named) -> None:
    with pytest.raises(InputError, match=named):
        Sampling(**settings)
