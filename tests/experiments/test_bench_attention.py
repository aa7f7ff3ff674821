"""bench_attention on a CPU: its forms agree, what is wrong is said, and the table is what auto reads."""

import json

import numpy as np
import pytest

from pallas_kernels.attention import config
from qlora_jax.bench import attention

pytestmark = pytest.mark.quick_compile

NAME = "experiments.bench_attention"


def test_forms_are_timed_and_written(run_commands, tmp_path):
    out = tmp_path / "found.json"
    flags = ["--tokens=24", "--total=24", "--heads=2,1,16", "--masks=padded,packed", "--repeats=1", f"--out={out}"]
    (done,) = run_commands([[NAME, *flags]])
    assert done["status"] == 0, done["err"]
    report = json.loads(out.read_text())
    assert [(r["T"], r["H"], r["mask"]) for r in report["results"]] == [(24, 16, "padded"), (24, 16, "packed")]
    for result in report["results"]:
        assert set(result["seconds"]) | set(result["failures"]) == {"xla", "chunked"}
        assert all("noise" in reason for reason in result["failures"].values())
    assert "1 x 24 tokens, heads 2 of 16 (1 of keys), packed" in done["out"]


def test_mistakes_are_one_line(run_commands, assert_one_line_error):
    commands = [["--heads=3,2,64"], ["--masks=dense"], ["--tokens=a"], ["--write_table"]]
    words = [["--heads=3,2,64", "N a multiple of K"], ["--masks=dense"], ["--tokens=a", "whole numbers"], ["on a GPU"]]
    for result, expected in zip(run_commands([[NAME, *flags] for flags in commands]), words, strict=True):
        assert_one_line_error(result, expected)


def test_a_form_with_other_gradients_is_not_ranked():
    array = np.ones((1, 4, 1, 8), np.float32)
    right = lambda rounds: [array] * 4  # noqa: E731
    wrong = lambda rounds: [array, array, array, 1.1 * array]  # noqa: E731
    broken = lambda rounds: [array, array * np.nan, array, array]  # noqa: E731
    taken, failing = attention.split_wrong({"flash": wrong, "xla": right, "chunked": right, "cudnn": broken})
    assert list(taken) == ["xla", "chunked"]
    assert failing == {
        "flash": "its d v is off by 10.0% of that of xla",
        "cudnn": "its d q is off by nan% of that of xla",
    }


def test_the_table_has_the_case_where_flash_gains_least():
    def result(T, flash, xla):
        return {"H": 128, "T": T, "seconds": {"flash": flash, "xla": xla}}

    found = attention.entries([result(600, 1.0, 4.0), result(1024, 1.0, 2.0), result(512, 1.0, 3.0)])
    assert found == {(128, 1024): {"flash": 1.0, "xla": 2.0}, (128, 512): {"flash": 1.0, "xla": 3.0}}
    failed = {"H": 128, "T": 600, "seconds": {"xla": 2.0}}  # wrong or broken in one case: not the default at all
    assert not config.flash_is_fastest(attention.entries([result(600, 1.0, 4.0), failed])[128, 1024])
