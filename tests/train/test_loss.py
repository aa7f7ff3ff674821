"""Cross-entropy over target tokens, by its definition in numpy, and independent of the chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.head import token_nll
from qlora_jax.train.loss import loss_and_gradient, summed_loss, summed_loss_and_hits

pytestmark = pytest.mark.quick_compile

B, T, D, V = 3, 11, 8, 50


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32)
    tokens, mask = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.5
    mask[:, 0] = True  # has nothing before it: must not count
    return hidden, head, tokens, mask


def by_definition(hidden, head, tokens, mask) -> tuple[float, int]:
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    total = 0.0
    for b in range(B):
        for t in range(1, T):
            if mask[b, t]:
                row = logits[b, t - 1]
                total += np.log(np.exp(row).sum()) - row[tokens[b, t]]
    return total, int(mask[:, 1:].sum())


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_any_chunk_gives_the_sum(inputs, chunk):
    total, count = summed_loss(*map(jnp.asarray, inputs), chunk)
    expected, tokens = by_definition(*inputs)
    assert float(count) == tokens
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_gradient_does_not_depend_on_the_chunk(inputs):
    hidden, *rest = map(jnp.asarray, inputs)
    one, whole = (jax.grad(lambda h, c=chunk: summed_loss(h, *rest, c)[0])(hidden) for chunk in (4, 1000))
    np.testing.assert_allclose(one, whole, atol=1e-6)
    logits = np.einsum("btd,vd->btv", inputs[0], inputs[1])[:, :-1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = ((p - np.eye(V)[inputs[2][:, 1:]]) * inputs[3][:, 1:, None]) @ inputs[1]
    np.testing.assert_allclose(one[:, :-1], by_hand, atol=1e-4)
    assert not np.asarray(one[:, -1]).any()


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_loss_and_gradient_is_the_derivative_through_the_norm(inputs, chunk):
    """Targets stand in a few of 33 rows: 7 and 30 leave a short last chunk, whose rest must not count."""
    x, head, tokens, mask = map(jnp.asarray, inputs)
    norm = lambda x: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))  # noqa: E731
    loss, dx, _ = loss_and_gradient(norm, x, head, tokens, mask, chunk)
    expected, by_jax = jax.value_and_grad(lambda x: summed_loss(norm(x), head, tokens, mask, 1000)[0])(x)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(dx, by_jax, atol=2e-6)
    assert np.abs(by_jax).max() > 0.1


def test_gradient_keeps_no_copy_of_the_hidden_states(inputs):
    """Of B * T rows in 16 bits nothing in 32 bits exists, and nothing but x and d x is made in a scan's carry."""
    x, head, tokens, mask = map(jnp.asarray, inputs)
    x = x.astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x: loss_and_gradient(lambda x: x, x, head, tokens, mask, 5))(x))
    assert f"bf16[{B * T},{D}]" in text
    assert f"f32[{B * T},{D}]" not in text and f"f32[{B},{T},{D}]" not in text
    assert f"f32[5,{V}]" in text and f"f32[{B * T},{V}]" not in text


def test_no_target_at_all(inputs):
    hidden, head, tokens, _ = map(jnp.asarray, inputs)
    total, count = summed_loss(hidden, head, tokens, jnp.zeros((B, T), bool), 4)
    assert (float(total), float(count)) == (0, 0)


def test_logits_are_never_stored_whole(inputs):
    """No array of B * T * V values in the gradient's program when the chunk is smaller."""
    hidden, *rest = map(jnp.asarray, inputs)
    text = str(jax.make_jaxpr(jax.grad(lambda h: summed_loss(h, *rest, 5)[0]))(hidden))
    assert f"f32[5,{V}]" in text
    for rows in (B * T, B * (T - 1)):
        assert f"f32[{rows},{V}]" not in text and f"[6,5,{V}]" not in text


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_what_is_no_target_is_not_computed(inputs, share):
    """NaN in every row but those that predict a target reaches neither loss, hits nor gradient."""
    hidden, head, tokens, _ = inputs
    mask = np.random.default_rng(3).random((B, T)) < share
    predicts = np.roll(mask & (np.arange(T) > 0), -1, axis=1)
    broken = jnp.asarray(np.where(predicts[..., None], hidden, np.nan))
    expected = by_definition(hidden, head, tokens, mask)
    nats, hits, count = summed_loss_and_hits(broken, jnp.asarray(head), jnp.asarray(tokens), jnp.asarray(mask), 4)
    best = (hidden @ head.T).argmax(-1)
    loss, dx, _ = loss_and_gradient(lambda x: x, broken, jnp.asarray(head), jnp.asarray(tokens), jnp.asarray(mask), 4)
    np.testing.assert_allclose(nats, expected[0], rtol=1e-5)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert (float(count), float(hits)) == (expected[1], (best == np.roll(tokens, -1, axis=1))[predicts].sum())
    assert np.isfinite(dx).all() and not np.asarray(dx)[~predicts].any()


def test_large_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0]])
    assert token_nll(logits, jnp.asarray([0])).tolist() == [0.0]
    assert token_nll(logits, jnp.asarray([1])).tolist() == [2e4]
