"""The promise of the project: Guanaco's recipe fits the cards it is said to fit, by XLA's own buffer assignment."""

import importlib

import pytest

from qlora_jax.planning.gpus import GPUS
from qlora_jax.planning.plan import make_plan

# config, card, bytes at the most for rows of 512 tokens
BARS = [
    pytest.param("guanaco_7b", "rtx3090", 6.0e9),
    pytest.param("guanaco_33b", "rtx3090", 22.0e9, marks=pytest.mark.large_plans),
    pytest.param("guanaco_65b", "a6000", 44.0e9, marks=pytest.mark.large_plans),
]


@pytest.mark.parametrize(("name", "card", "most"), BARS)
def test_guanaco_fits(xla_gpu, name, card, most):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.max_source_len, config.data.max_target_len = 16, 496
    if name != "guanaco_7b":
        config.data.eval_examples = 0  # one program less; it takes less than a gradient
    assert (config.lora.rank, config.train.batch_size, config.train.grad_accum) == (64, 16, 16)
    assert tuple(config.lora.targets) == ("all-linear",)
    plan = make_plan(config, GPUS[card], advise=False)
    assert (plan.spec.batch.G, plan.spec.batch.B, plan.spec.batch.T) == (16, 1, 512)
    assert plan.fits
    assert plan.memory.peak.total <= most, f"{plan.memory.peak.total / 1e9:.3f} GB"
    # base, adapter and its gradients must stand there in any case: the figure is no artefact of a program left out
    held = {kind: plan.memory.peak.bytes[kind] for kind in ("codes", "adapters", "gradients")}
    assert sum(held.values()) > 0.75 * most * 0.9 and plan.memory.pinned_host_bytes >= 2 * held["adapters"]
