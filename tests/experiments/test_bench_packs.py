"""The command `bench_packs` on a CPU: what it measures and writes, and how it refuses. No speed is judged."""

import json

import pytest

pytestmark = pytest.mark.quick_compile


def test_three_ways_are_compared(run_commands, assert_one_line_error, tmp_path):
    """The third, a process a run, is test_loop's killed command; here it is left out."""
    out = tmp_path / "packs.json"
    small = ["--random", "--members=2", "--steps=2", "--processes=0", "--config.model.remat=none"]
    small += ["--config.lora.targets=q_proj,down_proj"]
    small += ["--config.data.max_target_len=8", "--config.data.max_source_len=8", f"--out={out}"]
    found, none, unknown = run_commands(
        [["experiments.bench_packs", *flags] for flags in (small, ["--members=0"], ["--config.train.stepz=3"])]
    )
    assert found["status"] == 0, found["err"]
    report = json.loads(out.read_text())
    assert (report["members"], report["steps"], report["members_go"]) == (2, 2, "map")
    assert report["a_model"].keys() == {"pack_first", "pack", "loop"}
    pack, loop = (report["a_model"][name] for name in ("pack", "loop"))
    assert report["a_model"]["pack_first"]["seconds"] > pack["seconds"] > 0
    for unit in ("seconds", "cpu_seconds"):
        assert report["ratios"]["loop_to_pack"][unit] == pytest.approx(loop[unit] / pack[unit])
    assert "loop" in found["out"] and f"written: {out}" in found["out"]
    assert_one_line_error(none, ["--members"])
    assert_one_line_error(unknown, ["train.steps"])
