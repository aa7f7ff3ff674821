"""Plans of small models: kinds that add up, what a run measures, advice, and the arithmetic of the roofline."""

import importlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.feed.load import load_data
from qlora_jax.planning import longest
from qlora_jax.planning.advice import Change, changes, first_that_fits
from qlora_jax.planning.gpus import GPUS, PlannedGpu, planned_gpu
from qlora_jax.planning.memory import base_bytes, usable_bytes
from qlora_jax.planning.plan import make_plan
from qlora_jax.planning.roofline import roofline
from qlora_jax.settings import resolved
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.loop import finetune
from qlora_jax.train.memory import MEMORY_FRACTION
from qlora_jax.train.shapes import abstract_model
from qlora_jax.train.spec import read_spec

pytestmark = pytest.mark.quick_compile

CPU = PlannedGpu("a CPU", (0, 0), 0, 2**40, 1e10, 1e11, 0, 0.0, is_here=True)


@pytest.fixture
def quickstart():
    config = importlib.import_module("configs.quickstart").get_config()
    config.model.remat = "block"
    config.lora.targets = ("q_proj", "down_proj")  # compiles in two thirds of the time of all seven
    return config


@pytest.mark.parametrize("name", ["A6000", "RTX A6000", "NVIDIA RTX A6000", "a6000"])
def test_cards_have_several_names(name):
    assert planned_gpu(name) is GPUS["a6000"]


def test_an_unknown_card_lists_the_known():
    with pytest.raises(InputError, match="--gpu=v100: no such GPU here; known: rtx3090, .*b200"):
        planned_gpu("v100")


def test_commands_leave_the_runtime_what_the_plan_leaves_it():
    importlib.import_module("experiments")
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) == MEMORY_FRACTION
    assert usable_bytes(GPUS["h200"]) == int(MEMORY_FRACTION * GPUS["h200"].memory_bytes)
    assert usable_bytes(CPU) == CPU.memory_bytes


def test_the_plan_is_what_a_run_takes(quickstart, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(3, 96, (2, 16, 96)).astype(np.int32))
    quickstart.data.batches, quickstart.eval.every = str(tmp_path / "rows.npy"), 0
    quickstart.train.steps, quickstart.train.checkpoint_every, quickstart.optimizer.warmup_steps = 2, 2, 0
    summary = finetune(quickstart, resolved(quickstart), tmp_path / "run", say=lambda line: None)
    plan = make_plan(quickstart, CPU)
    assert plan.fits and plan.change is None
    assert plan.memory.peak.total == pytest.approx(summary["peak_device_bytes"], rel=0.05)
    base = {kind: plan.memory.peak.bytes[kind] for kind in ("codes", "scales", "embeddings_and_head", "norms")}
    assert sum(base.values()) == summary["base_bytes"]
    assert plan.memory.peak.bytes["adapters"] == 4 * summary["trainable_params"]


def test_a_float32_folder_takes_what_it_takes(quickstart, golden):
    quickstart.model.path = str(golden / "llama" / "llama1")
    phases = make_plan(quickstart, CPU).memory.phases
    assert all(size > 0 for phase in phases for size in phase.bytes.values())
    quickstart.model.compute_dtype = "bfloat16"
    halved = base_bytes(abstract_model(read_spec(quickstart).model))
    assert 2 * halved["embeddings_and_head"] == phases[0].bytes["embeddings_and_head"]


def test_paging_moves_state_off_the_device(quickstart):
    quickstart.data.eval_path, quickstart.data.eval_examples = "", 0
    plans = {}
    for paging in ("never", "always"):
        quickstart.optimizer.paging, quickstart.optimizer.page_bytes = paging, 2**16
        plans[paging] = make_plan(quickstart, CPU)
    assert plans["never"].memory.pinned_host_bytes == 0
    assert plans["always"].memory.pinned_host_bytes == plans["always"].memory.optimizer_bytes
    gradient = {paging: next(p for p in plan.memory.phases if p.name == "gradient") for paging, plan in plans.items()}
    freed = gradient["never"].total - gradient["always"].total
    assert freed == plans["always"].memory.optimizer_bytes


def test_what_does_not_fit_is_told_what_would(quickstart):
    quickstart.data.eval_path, quickstart.data.eval_examples = "", 0
    quickstart.train.batch_size, quickstart.optimizer.paging = 16, "never"
    whole = make_plan(quickstart, CPU).memory.peak.total
    small = PlannedGpu("a small CPU", (0, 0), 0, int(0.9 * whole), 1e10, 1e11, 0, 0.0, is_here=True)
    plan = make_plan(quickstart, small)
    assert not plan.fits and plan.change is not None
    for key, value in plan.change.keys.items():
        quickstart.update_from_flattened_dict({key: value})
    assert make_plan(quickstart, small, advise=False).fits


def test_a_card_too_small_for_the_model_is_not_tried(quickstart):
    held = make_plan(quickstart, CPU).memory.held_bytes
    tiny = PlannedGpu("a tiny CPU", (0, 0), 0, held - 1, 1e10, 1e11, 0, 0.0, is_here=True)
    plan = make_plan(quickstart, tiny, say=lambda line: pytest.fail(line) if "does not fit" in line else None)
    assert not plan.fits and plan.change is None and plan.tried == ()


def test_advice_loses_nothing_first_and_gives_up(quickstart):
    quickstart.train.batch_size, quickstart.train.grad_accum, quickstart.optimizer.paging = 8, 2, "auto"
    spec = read_spec(quickstart)
    tried = [change.keys for change in changes(spec, "auto")]
    assert tried[0] == {"optimizer.paging": "always"}
    assert tried[1] == {"optimizer.paging": "always", "model.remat": "block+offload"}
    assert tried[2]["train.grad_accum"] == 4 and tried[3]["train.grad_accum"] == 8
    assert all("data.max_target_len" not in keys for keys in tried[:4])
    change, failed = first_that_fits(spec, "auto", lambda change: False, tries=3)
    assert change is None and len(failed) == 3
    assert str(Change({"train.grad_accum": 4, "model.remat": "block"})) == (
        "--config.train.grad_accum=4 --config.model.remat=block"
    )


def test_models_whose_sizes_nobody_knows(quickstart, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quickstart.model.path = "nobody/nothing"
    with pytest.raises(InputError, match="nobody/nothing: no such folder.*known here are those of huggyllama/llama-7b"):
        read_spec(quickstart)
    quickstart.model.path = ""
    with pytest.raises(InputError, match="model.path is empty"):
        read_spec(quickstart)


def test_rows_are_as_long_as_the_data_where_the_config_does_not_say(quickstart, tmp_path):
    quickstart.data.max_source_len = quickstart.data.max_target_len = 0
    tokenizer = Tokenizer.from_folder(quickstart.model.path)
    data = load_data(quickstart.data, tokenizer, 16, tokenizer.vocab_size, 128)
    longest = max(len(example) for some in (data.batches.examples, data.heldout) for example in some)
    spec = read_spec(quickstart)
    assert spec.batch.T == spec.evaluation.T == -(-longest // 16) * 16
    assert read_spec(quickstart, 48).batch.T == 48
    quickstart.data.eval_path = ""
    long = {"instruction": "Count.", "output": "one, two, three " * 60}
    (tmp_path / "long.json").write_text(json.dumps([long] * 2))
    quickstart.data.path, quickstart.data.eval_examples = str(tmp_path / "long.json"), 0
    assert read_spec(quickstart).batch.T == read_spec(quickstart).model.sizes.context == 128
    quickstart.data.packing = True
    assert read_spec(quickstart).batch.T == 128
    quickstart.data.pack_length, quickstart.data.path = 512, ""
    assert read_spec(quickstart).batch.T == 512  # no data is needed


@pytest.mark.parametrize(
    ("data", "model", "missing"),
    [
        ("", None, "data.path is empty; give both lengths"),
        ("no/such.json", None, "no/such.json is no file on this machine; give both lengths"),
        ("setup.cfg,no/such.json", None, "no/such.json is no file on this machine; give both lengths"),
        ("alpaca", None, r"alpaca is no file on this machine; give both lengths \(384 and 128 are common for it\)"),
        (None, "huggyllama/llama-7b", "huggyllama/llama-7b is no folder with a tokenizer on this machine"),
    ],
)
def test_where_the_data_is_not_here_lengths_are_asked_for(quickstart, data, model, missing):
    quickstart.data.max_source_len = 0
    quickstart.data.path = quickstart.data.path if data is None else data
    quickstart.model.path = model or quickstart.model.path
    found = "how long rows are is not known: data.max_source_len = 0 and data.max_target_len = 16 take them from the"
    with pytest.raises(InputError, match=f"{found} data set, and {missing}"):
        read_spec(quickstart)
    quickstart.data.max_source_len = 80
    assert read_spec(quickstart).batch.T == 96


def test_mistakes_cost_no_compiling(xla_gpu, quickstart):
    quickstart.train.batch_size, quickstart.train.grad_accum = 15, 4
    with pytest.raises(InputError, match="train.batch_size 15 cannot be cut into train.grad_accum 4"):
        make_plan(quickstart, GPUS["a6000"])
    quickstart.train.grad_accum, quickstart.model.kernel, quickstart.model.compute_dtype = 1, "mosaic", "bfloat16"
    quickstart.model.path = "huggyllama/llama-7b"
    with pytest.raises(InputError, match='RTX A6000: backend "mosaic" needs a Hopper GPU'):
        make_plan(quickstart, GPUS["a6000"])


def test_the_roofline_by_hand(quickstart):
    """2 P a token for each of three passes over P weights of the base; the head goes through two."""
    spec = read_spec(quickstart)
    sizes, batch = spec.model.sizes, spec.batch
    P, r = 1000, 10
    found = roofline(spec, CPU, packed_bytes=500, linear_weights=P, adapter_params=r, bus_bytes=0)
    attention = 4 * 2 * sizes.N * sizes.H * batch.T * sizes.L
    token = 6 * P + 8 * r + 4 * sizes.V * sizes.D + attention
    assert found.flops == batch.tokens * token
    slow_bus = roofline(spec, CPU, 500, P, r, bus_bytes=10**15)
    assert slow_bus.seconds == pytest.approx(10**15 / 25e9)


def test_the_longest_context_is_found(quickstart, monkeypatch):
    """Against plans whose memory is known: 1 MB and 1 kB a token."""

    class Fake:
        def __init__(self, tokens):
            self.memory = SimpleNamespace(peak=SimpleNamespace(total=10**6 + 1000 * tokens))
            self.fits = self.memory.peak.total <= CPU.memory_bytes

    asked = []

    def fake_plan(config, gpu, say, advise):
        asked.append(config.data.max_source_len + config.data.max_target_len)
        assert (config.train.batch_size, config.train.grad_accum, config.data.eval_examples) == (1, 1, 0)
        return Fake(asked[-1])

    monkeypatch.setattr(longest, "make_plan", fake_plan)
    found = longest.longest_context(quickstart, CPU)
    most = (CPU.memory_bytes - 10**6) // 1000 // 1024 * 1024
    assert found.tokens == most and found.too_long == most + 1024
    assert len(asked) == len(set(asked)) <= 6
    monkeypatch.setattr(longest, "usable_bytes", lambda gpu: 10**6)
    with pytest.raises(InputError, match="not even 4096 tokens fit a CPU"):
        longest.longest_context(quickstart, CPU)
