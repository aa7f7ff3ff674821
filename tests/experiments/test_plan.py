"""The command plan: its JSON, several cards, and one line for every mistake."""

import json
from pathlib import Path

import pytest

from qlora_jax.planning import topology

MISTAKES = {
    "an unknown card": (["--gpu=v100"], ["--gpu=v100", "known: rtx3090"]),
    "no card": ([], ["--gpu"]),
    "a typo in the config": (["--gpu=h100", "--config.lora.rnak=8"], ["rnak", "lora.rank"]),
    "a value that no run can have": (["--gpu=h100", "--config.train.grad_accum=7"], ["train.grad_accum 7"]),
    "a model that is nowhere": (["--gpu=h100", "--config.model.path=nowhere"], ["nowhere", "huggyllama/llama-7b"]),
    "a run to compare a card with": (["--gpu=h100", "--workdir=x"], ["--gpu=here"]),
    "here among others": (["--gpu=here,h100"], ["stands alone"]),
    "no run there": (["--gpu=here", "--workdir=nowhere"], ["nowhere", "summary.json"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_commands) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    command = ["experiments.plan", "--config=configs/quickstart.py"]
    commands = {name: [*command, *arguments] for name, (arguments, _) in MISTAKES.items()}
    if topology.is_installed():
        commands["cards"] = [*command, "--gpu=h200,A6000", f"--out={folder / 'cards' / 'plan.json'}"]
        commands["cards"] += ["--config.data.eval_examples=0", "--config.data.eval_path="]  # two programs less
        commands["cards"] += ["--config.lora.targets=q_proj,down_proj", "--config.lora.dropout=0.0"]  # fewer kernels
    found = dict(zip(commands, run_commands(list(commands.values())), strict=True))
    return found | {"folder": folder}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, results, assert_one_line_error):
    assert_one_line_error(results[name], MISTAKES[name][1])


def test_several_cards(results):
    if "cards" not in results:
        pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin")
    result = results["cards"]
    assert result["status"] == 0, result["err"]
    assert "NVIDIA H200" in result["out"] and "NVIDIA RTX A6000" in result["out"] and "it fits" in result["out"]
    plans = json.loads((Path(results["folder"]) / "cards" / "plan.json").read_text())
    assert [plan["gpu"] for plan in plans] == ["h200", "A6000"]
    assert plans[0]["device_kind"] == "NVIDIA H200"
    keys = {
        "gpu", "fits", "device_peak_bytes", "device_bytes", "pinned_host_bytes", "load_host_peak_bytes",
        "step_seconds_roofline", "tokens_per_step", "micro_batch_rows", "remat",
    }  # fmt: skip
    for plan in plans:
        assert keys <= plan.keys()
        assert plan["fits"] is True and plan["device_peak_bytes"] == sum(plan["device_bytes"].values())
        assert plan["device_peak_bytes"] == max(sum(kinds.values()) for kinds in plan["phases"].values())
        assert plan["tokens_per_step"] == 16 * 96
        assert (plan["micro_batch_rows"], plan["remat"]) == (16, "selective")  # as the config says
        assert plan["step_seconds_roofline"] > 0 and plan["load_host_peak_bytes"] > 0
