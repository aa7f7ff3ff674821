"""Training of mixtures: torch's gradients with and without the auxiliary loss, and ten steps of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import load_config, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.mixtures.router import check_router_loss
from qlora_jax.train.step import make_gradient
from tests.conftest import TESTS
from tests.families import FAST, FOLDERS

COEFFICIENT = 0.1


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "mixtures" / "gradients.npz") as file:
        return dict(file)


def gradients(golden, coefficient: float, remat: str):
    """By projection: (d A, d B), and the step's metrics."""
    model = load_model(FOLDERS / "qwen3_moe_a", compute_dtype=jnp.float32, remat=remat)
    model.router_aux_loss_coef = coefficient
    lora.attach(model, LoRAConfig(2, 4, 0.0), jax.random.key(0))
    for name in model.config.linears:
        last = name.rpartition(".")[2]
        lora.set_adapter(model, name, golden[f"{last}.A"], golden[f"{last}.B"], 2.0)
    graph, adapter, base = lora.split(model)
    run = jax.jit(make_gradient(graph, 16, 0.0), compiler_options=FAST)
    sums, metrics = run(adapter, base, golden["tokens"][None], golden["loss_mask"][None], None)
    return {name: pair for name, pair in lora.adapter_arrays(sums).items()}, metrics


@pytest.mark.parametrize(("remat", "coefficient"), [("none", 0.0), ("block", 0.0), ("selective", COEFFICIENT)])
def test_gradients_are_torchs(golden, remat, coefficient):
    found, metrics = gradients(golden, coefficient, remat)
    loss = golden["loss"] + coefficient * golden["auxiliary"]
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    kind = "balanced" if coefficient else "plain"
    for name, pair in found.items():
        for letter, mine in zip("AB", pair, strict=True):
            expected = golden[f"{kind}/{name.rpartition('.')[2]}.{letter}"]
            assert np.abs(expected).max() > 0
            np.testing.assert_allclose(mine * metrics.factor, expected, atol=3e-5 * np.abs(expected).max(), rtol=1e-3)


def test_the_auxiliary_loss_moves_gradients(golden):
    """The golden gradients differ by more than what the comparison above allows."""
    for name in ("q_proj.A", "up_proj.B"):
        a, b = golden[f"plain/{name}"], golden[f"balanced/{name}"]
        assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()


@pytest.mark.parametrize(
    ("name", "remat", "chunk", "message"),
    [
        ("llama_a", "block", 0, "but this model has no experts: set it to 0"),
        ("olmoe_a", "none", 0, "set model.remat=block"),
        ("olmoe_a", "block", 64, "set model.sequence_chunk=0"),
    ],
)
def test_where_there_is_no_auxiliary_loss(name, remat, chunk, message):
    with pytest.raises(InputError, match=message):
        check_router_loss(0.01, remat, chunk, load_config(FOLDERS / name))
