"""Plans count what added tokens cost: rows, whole matrices, their gradients and optimizer state."""

import json

import numpy as np
import pytest

from configs import base
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.memory import base_bytes
from qlora_jax.planning.plan import make_plan
from qlora_jax.planning.roofline import step_flops
from qlora_jax.settings import resolved
from qlora_jax.train.loop import finetune
from qlora_jax.train.shapes import abstract_model
from qlora_jax.train.spec import read_spec
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

CPU = PlannedGpu("a CPU", (0, 0), 0, 2**40, 1e10, 1e11, 0, 0.0, is_here=True)
V, D = 401, 32


@pytest.fixture
def config(tmp_path):
    """One added token and a pad token: of 400 rows, 402."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(3, V, (2, 4, 32)).astype(np.int32))
    c = base.get_config()
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"torch_dtype": "float32"}))
    c.model.path, c.model.compute_dtype = str(folder), "float32"
    c.lora.rank, c.lora.dropout, c.lora.targets = 2, 0.0, ("q_proj",)
    c.data.batches, c.data.added_tokens = str(tmp_path / "rows.npy"), ("<think>",)
    c.train.steps, c.train.batch_size, c.train.grad_accum = 2, 4, 2
    return c


def test_the_plan_is_what_a_run_takes(config, tmp_path):
    summary = finetune(config, resolved(config), tmp_path / "run", say=lambda line: None)
    plan = make_plan(config, CPU)
    gradient = next(phase for phase in plan.memory.phases if phase.name == "gradient")
    kinds, matrices = gradient.bytes, 2 * (V + 1) * D
    assert gradient.total == pytest.approx(summary["peak_device_bytes"], rel=0.05)
    assert kinds["modules_to_save"] == 4 * matrices
    assert kinds["modules_to_save"] + kinds["adapters"] == kinds["gradients"] == 4 * summary["trainable_params"]
    assert "embeddings_and_head" not in kinds
    assert sum(kinds[kind] for kind in ("codes", "scales", "norms")) == summary["base_bytes"]
    state = 8 * summary["trainable_params"]  # two moments, and a step count a page
    assert state < plan.memory.optimizer_bytes < state + 16 * len(plan.memory.page_bytes)


def test_pages_of_a_matrix_hold_rows(config):
    """The embedding is cut like any other array where the transformation allows it."""
    config.optimizer.page_bytes = 2**14
    plan = make_plan(config, CPU, advise=False)
    assert len(plan.memory.page_bytes) > 8 and max(plan.memory.page_bytes) <= 2**14 + 16


def test_frozen_matrices_cost_rows_alone(config):
    config.lora.modules_to_save = ()
    spec = read_spec(config)
    assert (spec.model.sizes.V, spec.model.lora.modules_to_save) == (V + 1, ())
    assert base_bytes(abstract_model(spec.model))["embeddings_and_head"] == 2 * 4 * (V + 1) * D
    config.lora.modules_to_save = ("auto",)
    trained = read_spec(config)
    heads = 2 * (V + 1) * D * trained.batch.tokens
    assert step_flops(trained, 0, 0) - step_flops(spec, 0, 0) == heads


def test_a_tied_matrix_counts_once(config, golden):
    config.model.path, config.data.added_tokens = str(golden / "llama" / "llama3"), ()
    config.lora.modules_to_save = ("lm_head",)
    spec = read_spec(config)
    assert spec.model.lora.modules_to_save == ("embed_tokens", "lm_head")
    found = abstract_model(spec.model)
    assert found.adapter["embedding"].get_value().shape == (96, 32) and "head" not in found.adapter
    assert base_bytes(found)["embeddings_and_head"] == 0


def test_a_model_that_is_not_here_is_taken_to_need_every_row(config):
    config.model.path = "huggyllama/llama-7b"
    assert read_spec(config).model.sizes.V == 32000 + 2
    config.data.added_tokens = ()
    assert read_spec(config).model.sizes.V == 32000
