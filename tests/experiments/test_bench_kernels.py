"""The command `bench_kernels` on a CPU: what it writes and how it refuses. No figure is judged."""

import json

import pytest

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def results(run_commands, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    commands = {
        "small": ["--shapes=tinyllama-1b/key_value", "--rows=1,8", "--repeats=1", "--block_size=32", f"--out={out}"],
        "tune": ["--tune"],
        "shape": ["--shapes=llama-9000b"],
        "rows": ["--rows=16,some"],
        "op": ["--ops=sideways"],
        "block": ["--block_size=48"],
        "repeats": ["--repeats=0"],
        "minutes": ["--minutes=0", "--shapes=tinyllama-1b/key_value"],
    }
    found = run_commands([["experiments.bench_kernels", *flags] for flags in commands.values()])
    return dict(zip(commands, found, strict=True)) | {"file": out}


def test_every_form_of_every_product_is_reported(results):
    assert results["small"]["status"] == 0, results["small"]["err"]
    report = json.loads(results["file"].read_text())
    assert (report["dtype"], report["format"], report["block_size"]) == ("float32", "nf4", 32)
    assert report["left_out"] == [] and report["versions"]["jax"]
    assert all("noise" in failure["error"] for failure in report["failures"])  # of a machine that others use too
    assert "--block_size=32" in report["command"] and report["method"].startswith("slope")
    assert all(rate > 0 for rate in report["ceilings"].values())
    found = {(r["rows"], r["op"], r["form"]) for r in report["results"] + report["failures"]}
    forms = ("xla", "dense")
    assert found == {(rows, op, form) for rows in (1, 8) for op in ("forward", "backward") for form in forms}
    for result in report["results"]:
        assert (result["out_features"], result["in_features"]) == (256, 2048)
        assert result["flops_per_second"] == pytest.approx(2 * result["rows"] * 256 * 2048 / result["seconds"])
        assert result["form"] != "dense" or result["speed_to_dense"] == 1
    assert results["small"]["out"].count("tinyllama-1b/key_value 256x2048") == len(report["results"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tune", "--tune measures GPU kernels, this process computes on cpu: run it on a GPU"),
        ("shape", "--shapes=llama-9000b: expected a model (tinyllama-1b, "),
        ("rows", "--rows=16,some: expected whole numbers above 0"),
        ("op", "--ops=sideways: expected forward or backward"),
        ("block", "block_size is 48; expected a power of two from 32 to 4096"),
        ("repeats", "--repeats=0: expected at least 1"),
        ("minutes", "--minutes=0.0: over before anything was timed; give more"),
    ],
)
def test_mistakes_are_one_line(results, name, message):
    assert results[name]["status"] == 2
    assert results[name]["err"].startswith(f"error: {message}")
    assert results[name]["err"].count("\n") == 1
