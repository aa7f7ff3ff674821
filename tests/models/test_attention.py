"""Attention in chunks against its definition, forward and backward, at ragged lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import reference
from qlora_jax.models import attention
from qlora_jax.models.attention import Scoring, alibi_slopes, causal_attention, chunked_attention, window_starts
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

B, N, K, H = 2, 4, 2, 8


def arrays(T: int, dtype=jnp.float32):
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return [2 * random_normal(T + place, shape, dtype) for place, shape in enumerate(shapes)]


def chunks(query_chunk: int, key_chunk: int):
    return lambda q, k, v: chunked_attention(q, k, v, query_chunk, key_chunk)


def whole(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def by_definition(q, k, v, d_out):
    """out, dq, dk, dv in float64: every score at once, and the derivative of softmax written out."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    T, group = q.shape[1], N // K
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))  # a key head serves its group of query heads
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / np.sqrt(H)
    d_k, d_v = np.einsum("bnts,btnh->bsnh", d_scores, q), np.einsum("bnts,btnh->bsnh", weights, d_out)
    d_k, d_v = (x.reshape(B, T, K, group, H).sum(axis=3) for x in (d_k, d_v))
    return np.einsum("bnts,bsnh->btnh", weights, v), np.einsum("bnts,bsnh->btnh", d_scores, k), d_k, d_v


def with_gradient(attend, q, k, v, d_out):
    """out, dq, dk, dv as float32."""

    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return [np.asarray(x, np.float32) for x in both(q, k, v, d_out)]


@pytest.mark.parametrize(
    ("T", "query_chunk", "key_chunk"),
    [(1, 16, 8), (2, 1, 1), (7, 3, 5), (16, 16, 16), (33, 16, 7), (100, 64, 128), (257, 64, 32), (300, 128, 96)],
)
def test_chunks_give_attention_by_definition(T, query_chunk, key_chunk):
    found = with_gradient(chunks(query_chunk, key_chunk), *arrays(T))
    for mine, theirs in zip(found, by_definition(*arrays(T)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=3e-5, rtol=3e-6)  # of values up to about 30


def test_bfloat16_is_as_exact_as_the_whole():
    """Against float64 on the same numbers. d k and d v are sums over 19 chunks: rounded at each, their error would be
    2.3 and 2.5 times the whole's. d q is made from 16-bit d scores, which the whole keeps in 32 bits on a CPU."""
    rounded = arrays(300, jnp.bfloat16)
    exact = by_definition(*rounded)
    errors = [
        [np.abs(x - true).mean() for x, true in zip(with_gradient(attend, *rounded), exact, strict=True)]
        for attend in (chunks(16, 32), whole)
    ]
    for mine, theirs, times in zip(*errors, (1, 3, 2, 2), strict=True):
        assert 0 < mine < times * theirs


def test_auto_is_whole_up_to_its_limit(monkeypatch):
    assert attention.chosen("auto", attention.LONGEST_WHOLE) == "xla"
    assert attention.chosen("auto", attention.LONGEST_WHOLE + 1) == "chunked"
    assert [attention.chosen(name, 10**6) for name in ("xla", "chunked", "cudnn")] == ["xla", "chunked", "cudnn"]
    monkeypatch.setattr(attention, "LONGEST_WHOLE", 8)
    q, k, v, _ = arrays(9)
    monkeypatch.setattr(attention, "chunked_attention", lambda q, *_, **__: 2 * q)
    assert np.array_equal(causal_attention(q, k, v, "auto"), 2 * q)
    assert causal_attention(q, k, v, "xla").shape == q.shape


def test_flash_is_handed_everything(monkeypatch):
    q, k, v, _ = arrays(9)
    starts, sinks, scoring = jnp.zeros((B, 9), jnp.int32), jnp.ones(N), Scoring(0.5, 30.0)
    monkeypatch.setattr(attention, "flash_attention", lambda *arguments: arguments)
    found = causal_attention(q, k, v, "flash", starts, scoring, sinks)
    assert all(mine is theirs for mine, theirs in zip(found, (q, k, v, starts, sinks, scoring), strict=True))
    monkeypatch.setattr(attention, "is_fastest", lambda *asked: asked == (9, N, H, q.dtype))
    assert causal_attention(q, k, v, "auto")[0] is q
    assert causal_attention(q[:, :8], k[:, :8], v[:, :8], "auto").shape == q[:, :8].shape


@pytest.mark.parametrize("starts", [None, jnp.asarray([[0, 0, 0, 0, 4, 4, 4, 4, 4]] * B)], ids=["padded", "packed"])
def test_sinks_in_every_plain_form(starts):
    q, k, v, d_out = arrays(9)
    sinks = jnp.linspace(-1.0, 2.0, N)
    for attend in (
        lambda q, k, v: causal_attention(q, k, v, "xla", starts, sinks=sinks),
        lambda q, k, v: chunked_attention(q, k, v, 4, 3, starts, sinks=sinks),
    ):
        found = with_gradient(attend, q, k, v, d_out)
        expected = with_gradient(lambda q, k, v: reference.attention(q, k, v, starts, sinks), q, k, v, d_out)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_no_array_of_all_scores():
    """The gradient's program at 512 tokens: no array has as many elements as the scores, nor half of them."""
    q, k, v, _ = arrays(512)
    text = jax.make_jaxpr(jax.grad(lambda q: chunked_attention(q, k, v, 64, 32).sum()))(q)
    largest = max(v.aval.size for eqn in every_equation(text.jaxpr) for v in eqn.outvars)
    assert largest == B * 512 * N * H < B * N * 512 * 512 / 2


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from every_equation(inner)


def inner_jaxprs(eqn):
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


@pytest.mark.parametrize(
    "scoring", [Scoring(0.3, 1.5), Scoring(None, 0.0, alibi_slopes(N)), Scoring(0.5, 2.0, alibi_slopes(N))]
)
def test_scores_with_caps_and_slopes_in_a_window(scoring):
    """Whole and in chunks, forward and backward; whole against numpy."""
    T, window = 21, 6
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    starts = window_starts(None, places, jnp.int32(window))
    whole = with_gradient(lambda q, k, v: causal_attention(q, k, v, "xla", starts, scoring), *arrays(T))
    cut = with_gradient(lambda q, k, v: chunked_attention(q, k, v, 8, 5, starts, scoring), *arrays(T))
    for mine, theirs in zip(cut, whole, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=2e-4)
    q, k, v, _ = (np.asarray(x, np.float64) for x in arrays(T))
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * (scoring.scale or H**-0.5)
    scores = scoring.softcap * np.tanh(scores / scoring.softcap) if scoring.softcap else scores
    distance = np.arange(T)[:, None] - np.arange(T)
    if scoring.slopes:
        scores = scores - np.asarray(scoring.slopes)[:, None, None] * distance
    weights = np.exp(np.where((distance >= 0) & (distance < window), scores, -np.inf))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(whole[0], expected, atol=2e-5)


def test_slopes_of_alibi():
    """Powers of two, and what BLOOM's 112 heads and six heads have (Press et al., 2022)."""
    assert alibi_slopes(8) == tuple(2.0**-n for n in range(1, 9))
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    assert len(alibi_slopes(112)) == 112 and alibi_slopes(112)[64] == 2 ** (-4 / 64)


def test_sinks():
    """A score of each head that takes its share of the softmax: whole, in chunks, with a window, and gradients."""
    T, sinks = 33, jnp.asarray([0.5, -1.0, 3.0, 9.0])
    q, k, v, d_out = arrays(T)
    starts = window_starts(None, jnp.broadcast_to(jnp.arange(T), (B, T)), 9)

    def by_hand(q, k, v):
        keys, values = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, keys, precision="highest") / H**0.5
        places = jnp.arange(T)
        seen = (places <= places[:, None]) & (places >= starts[0][:, None])
        scores = jnp.where(seen, scores, -jnp.inf)
        shares = jnp.exp(scores) / (jnp.exp(scores).sum(-1) + jnp.exp(sinks)[:, None])[..., None]
        return jnp.einsum("bnts,bsnh->btnh", shares, values, precision="highest")

    expected = with_gradient(by_hand, q, k, v, d_out)
    for attend in (
        lambda q, k, v: causal_attention(q, k, v, "xla", starts, sinks=sinks),
        lambda q, k, v: chunked_attention(q, k, v, 16, 7, starts, sinks=sinks),
    ):
        for mine, theirs in zip(with_gradient(attend, q, k, v, d_out), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())
