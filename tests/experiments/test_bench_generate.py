"""bench_generate on a CPU: each form decodes and is written, mistakes are one line, torch's side runs where it is."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from qlora_jax.bench import generate, torch_side

NAME = "experiments.bench_generate"
pytestmark = pytest.mark.quick_compile


def test_every_form_is_timed_and_written(run_commands, tmp_path):
    out = tmp_path / "found.json"
    (done,) = run_commands([[NAME, "--rows=2", "--rank=2", "--repeats=1", f"--out={out}"]])
    assert done["status"] == 0, done["err"]
    report = json.loads(out.read_text())
    assert report["size"] == "tiny" and report["rank"] == 2 and not report["left_out"]
    found = [(result["form"], result["rows"]) for result in [*report["results"], *report["failures"]]]
    assert sorted(found) == [("dense", 2), ("xla", 2)]
    assert all("noise" in failure["error"] for failure in report["failures"])
    for result in report["results"]:
        assert result["tokens_per_second"] == pytest.approx(2 / result["token_seconds"])
        assert result["bytes_a_token"] > 0 and result["of_copy"] is None


def test_mistakes_are_one_line(run_commands, assert_one_line_error):
    commands = [["--rows=0"], ["--size=7x"], ["--forms=fast"], ["--forms=mosaic"]]
    words = [["--rows=0"], ["--size=7x", "tiny, 7b"], ["--forms=fast", "mosaic"], ["--forms=mosaic", "NVIDIA GPU"]]
    for result, expected in zip(run_commands([[NAME, *flags] for flags in commands]), words, strict=True):
        assert_one_line_error(result, expected)


def test_bytes_of_a_token():
    """4-bit codes and scales, 16-bit adapters and head, and the cache; the embedding's one row is not counted."""
    config = generate.sizes("tiny")
    bare, adapted = (generate.made(config, "xla", rank, "bfloat16") for rank in (0, 4))
    weights = sum(int(np.prod(shape)) for shape in config.linears.values()) * config.L
    cache = 2 * config.L * 3 * (16 + 32) * config.K * config.H * 2
    least = weights // 2 + 2 * config.V * config.D + cache
    assert least < generate.token_bytes(bare, 3) < 1.1 * least
    ranks = 4 * sum(sum(shape) for shape in config.linears.values()) * config.L
    assert generate.token_bytes(adapted, 3) - generate.token_bytes(bare, 3) == 2 * ranks
    changed = generate.with_kernel(adapted, "scratch")
    kernels = {
        leaf.backend
        for leaf in jax.tree.leaves(changed, is_leaf=lambda x: hasattr(x, "backend"))
        if hasattr(leaf, "backend")
    }
    assert kernels == {"scratch"}


def stub_packages(folder, *names):
    for name in names:
        (folder / f"{name}.py").write_text('__version__ = "0"\n')


@pytest.mark.parametrize("script", [torch_side.SCRIPT, torch_side.GENERATE], ids=lambda path: path.name)
def test_a_missing_library_is_not_taken_for_the_file_beside_the_script(script, tmp_path):
    stub_packages(tmp_path, "torch", "transformers", "peft")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], input='{"quant": {"format": "nf4"}}', capture_output=True, text=True, env=environment
    )
    assert done.returncode == 3
    assert "bitsandbytes cannot be imported" in done.stderr and "No module named 'bitsandbytes'" in done.stderr
