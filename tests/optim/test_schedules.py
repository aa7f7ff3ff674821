"""Learning rates update by update, and the optimizers of a config against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.optim.schedules import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule, paging


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


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_small_parameters_keep_32_bits_under_every_name(name):
    plain = name.removeprefix("paged_").removesuffix("8bit")
    expected = three_updates(name=plain, weight_decay=0.1, beta2=0.99)
    np.testing.assert_allclose(three_updates(name=name, weight_decay=0.1, beta2=0.99), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit", "lion8bit", "paged_lion8bit"])
def test_8bit_names_have_8bit_state(name):
    state = make_optimizer(section(name=name), 10).init(jnp.zeros((2, 4096)))
    assert "uint8" in {str(leaf.dtype) for leaf in jax.tree.leaves(state)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_paged_name_pages_always(name):
    for value in ("auto", "always"):
        assert paging(section(name=name, paging=value)) == ("always" if name.startswith("paged_") else value)


def test_a_paged_name_that_may_never_page_is_refused():
    with pytest.raises(InputError, match="'paged_lion8bit', but optimizer.paging is \"never\": set "):
        paging(section(name="paged_lion8bit", paging="never"))
    assert paging(section(name="lion8bit", paging="never")) == "never"
