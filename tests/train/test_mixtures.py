"""Training of mixtures: torch's gradients with and without the auxiliary loss, and ten steps of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import load_config, load_model
from qlora_jax.io.peft import read_adapter
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.mixtures.router import check_router_loss
from qlora_jax.packs.pack import PackRunner, train_pack
from qlora_jax.settings import resolved
from qlora_jax.train.loop import finetune
from qlora_jax.train.step import make_gradient
from tests import forked
from tests.conftest import TESTS
from tests.families import FAST, FOLDERS

pytestmark = pytest.mark.quick_compile
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
        section = SimpleNamespace(router_aux_loss_coef=0.01, remat=remat, sequence_chunk=chunk)
        check_router_loss(section, load_config(FOLDERS / name))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Ten steps of 4 rows of 12 tokens of a 4-bit mixture, with dropout and the auxiliary loss."""
    path = tmp_path_factory.mktemp("data") / "batches.npy"
    np.save(path, np.random.default_rng(0).integers(3, 40, (1, 4, 12)).repeat(10, 0).astype(np.int32))
    c = base.get_config()
    c.model.update(path=str(FOLDERS / "qwen3_moe_a"), compute_dtype="float32", router_aux_loss_coef=0.02)
    c.quant.block_size = 32
    c.lora.update(rank=4, dropout=0.1, targets=("q_proj", "up_proj", "down_proj"))
    c.data.batches = str(path)
    c.optimizer.learning_rate = 1e-2
    c.train.update(steps=10, batch_size=4, grad_accum=2)
    return c


def quiet(line: str) -> None:
    """Says nothing."""


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """(folder, summary) of the run on one device."""
    folder = tmp_path_factory.mktemp("one") / "alone"
    return folder, finetune(config, resolved(config), folder, say=quiet)


def test_ten_steps_alone_and_in_a_pack(config, one):
    """The loss falls; a member of a pack ends as it does alone, with its own adapter for each expert."""
    folder, alone = one
    losses = [row["loss"] for row in rows(folder)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    other = config.copy_and_resolve_references()
    other.lora.update(rank=2, targets=("q_proj", "up_proj"))
    results = train_pack([config, other], say=quiet, runner=PackRunner("vmap"))
    assert results[0].summary["trainable_params"] == alone["trainable_params"]
    found = {name: pair for name, pair in results[0].adapter.items()}
    assert found["mlp.experts.up_proj"][0].shape == (2, 6, 4, 16)
    assert results[1].adapter["mlp.experts.up_proj"][1].shape == (2, 6, 12, 2)
    model = load_model(FOLDERS / "qwen3_moe_a", compute_dtype=jnp.float32)
    _, arrays = read_adapter(model, folder / "adapter", to_train=True)
    for name, pair in arrays.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=3e-3)


MESHES = """
import json, os, signal, sys
from pathlib import Path
from configs import base
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, Stopped, finetune

config, folder = base.get_config(), Path(sys.argv[1])
with config.unlocked():
    for section, values in json.loads(sys.argv[2]).items():
        config[section].update(values)
step = Run._step
def told_to_stop(self, index):
    if index == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, index)
for mesh in ({"expert": 2, "fsdp": 1}, {"expert": 1, "fsdp": 2}):
    config.mesh.update(mesh)
    Run._step = told_to_stop if mesh["expert"] == 2 else step
    try:
        finetune(config, resolved(config), folder, say=print)
    except Stopped as stopped:
        print(stopped)
"""


def test_experts_on_two_devices_that_a_divided_model_goes_on_from(config, one, tmp_path):
    """Losses, the auxiliary one among them, and gradients' norms of ten steps are those of one device."""
    wanted = {name: dict(config[name]) for name in ("model", "quant", "lora", "data", "optimizer", "train")}
    done = forked.run(MESHES, tmp_path / "run", json.dumps(wanted), devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped by SIGTERM after step 5 of 10" in done.stdout and "resumed" in done.stdout, done.stdout
    found, alone = rows(tmp_path / "run"), rows(one[0])
    assert [row["step"] for row in found] == list(range(1, 11))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in found], [row[key] for row in alone], rtol=2e-4, err_msg=key)
