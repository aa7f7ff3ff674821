"""An optimizer whose rates are inputs of the program updates as the one whose rates are constants.

Programs of other structure than a run's: equal but for rounding. test_pack.py compares runs bit for bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from qlora_jax.optim.schedules import OPTIMIZERS, make_optimizer, make_transformation
from qlora_jax.packs.members import learning_rates
from qlora_jax.packs.step import initial_optimizer

pytestmark = pytest.mark.quick_compile

STEPS = 4


@dataclasses.dataclass
class Arrays:
    params: dict
    grads: list[dict]


@pytest.fixture(scope="module")
def arrays():
    """One array of 8-bit blocks, one too small for them."""
    rng = np.random.default_rng(0)
    draw = lambda: {"a": jnp.float32(rng.normal(size=(2, 64, 80))), "b": jnp.float32(rng.normal(size=(2, 3)))}  # noqa: E731
    return Arrays(draw(), [draw() for _ in range(STEPS)])


@pytest.mark.parametrize(
    ("name", "schedule", "decay"),
    [
        ("adamw", "linear", 0.0),
        *((name, "cosine", 0.1) for name in OPTIMIZERS if not name.startswith("paged")),
    ],
)
def test_rates_as_inputs_are_the_rates(arrays, name, schedule, decay):
    section = base.get_config().optimizer
    section.update(name=name, schedule=schedule, weight_decay=decay, learning_rate=3e-3, warmup_steps=1)
    alone = make_optimizer(section, STEPS)
    rates = learning_rates(schedule, 3e-3, STEPS, 1).used

    @jax.jit
    def step_alone(params, state, grads):
        updates, state = alone.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step_of_pack(params, state, grads, rate, decay):
        def one(arrays):
            params, state, rate, decay = arrays
            updates, state = make_transformation(section, rate, decay).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.map(one, (params, state, rate, decay))

    params, state = arrays.params, alone.init(arrays.params)
    pack = jax.tree.map(lambda x: jnp.stack([x, x]), arrays.params)
    pack_state = initial_optimizer(section, pack)
    for grads, rate in zip(arrays.grads, rates, strict=True):
        params, state = step_alone(params, state, grads)
        both = np.float32([rate, 2 * rate]), np.float32([decay, 0.5])
        pack, pack_state = step_of_pack(pack, pack_state, grads, *both)
    for key in params:
        np.testing.assert_allclose(pack[key][0], params[key], rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(pack[key][1]) - np.asarray(params[key])).max() > 1e-3
