"""Plans of packs: what a pack measures, what a member adds, and the largest that fits."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.packs.pack import train_pack
from qlora_jax.planning import pack
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.pack import PackPlan, largest_pack, plan_pack, steps_program
from qlora_jax.train.shapes import abstract_model
from qlora_jax.train.spec import read_spec

pytestmark = pytest.mark.quick_compile

CPU = PlannedGpu("a CPU", (0, 0), 0, 2**40, 1e10, 1e11, 0, 0.0, is_here=True)


@pytest.fixture
def config(golden, tmp_path):
    np.save(tmp_path / "batches.npy", np.random.default_rng(0).integers(3, 96, (1, 2, 16)).astype(np.int32))
    c = base.get_config()
    c.model.path = str(golden / "llama" / "llama1")
    c.model.compute_dtype, c.model.remat = "float32", "none"
    c.lora.update(rank=2, dropout=0.0, targets=("q_proj", "down_proj"))  # compiles in half the time of all seven
    c.data.batches = str(tmp_path / "batches.npy")
    c.train.update(steps=1, batch_size=2, grad_accum=1)
    return c


def test_the_plan_is_what_a_pack_takes(config):
    results = train_pack([config, config], say=lambda line: None)
    plan = plan_pack(config, CPU, 2)
    assert plan.fits and plan.tokens_per_step == 2 * 2 * 16
    assert plan.device_peak_bytes == pytest.approx(results[0].summary["peak_device_bytes"], rel=0.02)
    more = plan_pack(config, CPU, 8)
    added = (more.device_peak_bytes - plan.device_peak_bytes) / 6
    state = 3 * 4 * results[0].summary["trainable_params"]  # adapter and both of Adam's moments, float32
    batches = 16 * 2 * 16 * 5  # tokens and mask of a call's steps
    assert added >= state + batches
    assert more.step_seconds_roofline > plan.step_seconds_roofline


@pytest.mark.parametrize("over", ["map", "vmap"])
def test_no_member_has_a_base_of_its_own(config, over):
    """Whatever is done for a member that takes no step: packed codes appear without the axis of members alone."""
    config.data.batches, config.data.path = "", "unread"
    config.data.max_source_len = config.data.max_target_len = 256
    spec = read_spec(config)
    function, arguments = steps_program(config, spec, abstract_model(spec.model), 5, over)
    text = str(jax.make_jaxpr(function)(*arguments))
    assert "u8[2," in text and "u8[5," not in text
    assert "f32[5,2,2," in text  # adapters, which do have it: [A, L, R, I]


def test_a_mistake_is_named_before_anything_is_compiled(config):
    config.optimizer.learning_rate = 0
    with pytest.raises(InputError, match="learning_rate must be positive"):
        plan_pack(config, CPU, 2)


@pytest.mark.parametrize(
    ("usable", "most", "expected"), [(99, 8, None), (150, 8, 1), (230, 8, 2), (505, 8, 4), (10_000, 8, 8), (500, 1, 1)]
)
def test_the_largest_pack_that_fits(monkeypatch, usable, most, expected):
    """Members of 100 bytes, of which the fourth and later ones take 5 more than the second did."""

    def planned(config, gpu, A):
        return PackPlan(A, 100 * A + 5 * max(A - 3, 0), usable, 1.0, 1)

    monkeypatch.setattr(pack, "plan_pack", planned)
    found = largest_pack(None, dataclasses.replace(CPU), most)
    assert (found and found.A) == expected
    assert found is None or found.fits
