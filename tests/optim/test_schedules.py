"""Learning rates update by update, and the optimizers of a config against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.optim.schedules import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule


def rates(name: str, steps: int, warmup: int) -> np.ndarray:
    schedule = make_schedule(name, 1.0, steps, warmup)
    return np.asarray([float(schedule(k)) for k in range(steps + 1)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_from_the_first_update_on(name):
    found = rates(name, 20, 4)
    np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert (np.diff(found[4:]) <= 0).all()


def test_constant():
    np.testing.assert_allclose(rates("constant", 10, 0), 1.0)


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_falls_to_zero_at_the_end(warmup):
    found, rest = rates("linear", 20, warmup), 20 - warmup
    np.testing.assert_allclose(found[warmup:], 1 - np.arange(rest + 1) / rest, atol=1e-6)
    assert found[19] > 0  # the last update still moves


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_falls_to_zero_at_the_end(warmup):
    found, rest = rates("cosine", 20, warmup), 20 - warmup
    np.testing.assert_allclose(found[warmup:], (1 + np.cos(np.pi * np.arange(rest + 1) / rest)) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "message"),
    [
        ("step", 10, 0, "optimizer.schedule is 'step'; known: constant, linear, cosine"),
        ("linear", 10, 10, "optimizer.warmup_steps is 10; expected 0 to below train.steps"),
        ("linear", 10, -1, "optimizer.warmup_steps is -1"),
    ],
)
def test_refused(name, steps, warmup, message):
    with pytest.raises(InputError, match=message):
        make_schedule(name, 1.0, steps, warmup)


def section(**changes) -> ConfigDict:
    config = base.get_config().optimizer
    config.learning_rate, config.schedule = 0.5, "constant"
    config.update(changes)
    return config


def three_updates(**changes) -> list[float]:
    """Of one parameter that starts at 2 under gradients 3, -1, 0.5."""
    tx = make_optimizer(section(**changes), steps=3)
    params, values = jnp.asarray([2.0]), []
    state = tx.init(params)
    for g in (3.0, -1.0, 0.5):
        updates, state = tx.update(jnp.asarray([g]), state, params)
        params = params + updates
        values.append(float(params[0]))
    return values


def test_adamw():
    p, m, v, expected = 2.0, 0.0, 0.0, []
    for k, g in enumerate((3.0, -1.0, 0.5), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p -= 0.5 * (m / (1 - 0.8**k) / (np.sqrt(v / (1 - 0.95**k)) + 1e-3) + 0.1 * p)
        expected.append(p)
    found = three_updates(name="adamw", beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sgd_with_momentum_and_decay():
    p, m, expected = 2.0, 0.0, []
    for g in (3.0, -1.0, 0.5):
        m = 0.9 * m + g + 0.1 * p
        p -= 0.5 * m
        expected.append(p)
    np.testing.assert_allclose(three_updates(name="sgd", beta1=0.9, weight_decay=0.1), expected, rtol=1e-5)


def test_lion():
    p, m, expected = 2.0, 0.0, []
    for g in (3.0, -1.0, 0.5):
        p -= 0.5 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        m = 0.99 * m + 0.01 * g
        expected.append(p)
    found = three_updates(name="lion", beta1=0.9, beta2=0.99, weight_decay=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_learning_rate_follows_the_schedule():
    found = three_updates(name="sgd", beta1=0.0, schedule="linear")
    np.testing.assert_allclose(np.diff([2.0, *found]), [-0.5 * 3, 0.5 * 2 / 3, -0.5 / 3 * 0.5], rtol=1e-5)


def test_unknown_optimizer():
    with pytest.raises(InputError, match=f"optimizer.name is 'adam'; known: {', '.join(OPTIMIZERS)}"):
        make_optimizer(section(name="adam"), 10)
