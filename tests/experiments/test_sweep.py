"""The command sweep: a tiny grid trained to its end in this process, run again, and mistakes in one line."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from configs.sweeps import paper
from qlora_jax.packs.pack import PackRunner, pack_key
from qlora_jax.settings import flatten
from qlora_jax.sweep import compare
from qlora_jax.sweep.grid import axis, expand
from qlora_jax.sweep.ledger import FILE, contents, reading
from qlora_jax.sweep.packs import make_packs
from tests.sweep import fake
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = "--config=tests/sweep/tiny_sweep.py"
MISTAKES = {
    "no workdir": ([TINY], ["--workdir", "--dry_run"]),
    "no sweep in the file": (["--config=configs/quickstart.py", "--dry_run"], ["neither sweep() nor search()"]),
    "a typo in an axis": (["--config={typo}", "--dry_run"], ["lora.rnak", "did you mean lora.rank"]),
    "a value that no run can have": (["--config={value}", "--dry_run"], ["lora.rank = 0", "at least 1"]),
    "an axis on the command line": ([TINY, "--dry_run", "--config.train.seed=4"], ["--config.train.seed", "sweep()"]),
    "an unknown card": ([TINY, "--dry_run", "--gpu=v100"], ["--gpu=v100", "known: rtx3090"]),
    "a pack of none": ([TINY, "--dry_run", "--pack_size=0"], ["--pack_size=0"]),
    "a cluster for one process": (
        [TINY, "--workdir={out}/x", "--executor=local", "--ray_address=auto"],
        ["--ray_address", "--executor=ray"],
    ),
    "a search without Ray": (["--config={search}", "--workdir={out}/y", "--executor=local"], ["Ray Tune"]),
    "a search for nothing": (["--config={nothing}", "--dry_run"], ["eval.every is 0"]),
}
FILES = {
    "typo": "def sweep():\n    return axis('lora.rnak', [1])\n",
    "value": "def sweep():\n    return axis('lora.rank', [4, 0])\n",
    "search": "def search():\n    return Search({'lora.rank': choice([2, 4])}, 'loss', 2, 1)\n",
    "nothing": "def search():\n    return Search({'lora.rank': choice([2, 4])}, 'eval_loss', 2, 1)\n",
}
BEGIN = (
    "from qlora_jax.sweep.grid import axis\nfrom qlora_jax.sweep.search import Search, choice\n"
    "from tests.sweep.tiny_sweep import get_config\n"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_commands) -> dict:
    out = tmp_path_factory.mktemp("sweep")
    names = {"out": str(out), "model": str(write_tiny_checkpoint(out / "model"))}
    for name, text in FILES.items():
        (out / f"{name}.py").write_text(BEGIN + text)
        names[name] = str(out / f"{name}.py")
    run = [TINY, "--config.model.path={model}", "--workdir={out}/run", "--executor=local"]
    commands = {name: [*words, "--config.model.path={model}"] for name, (words, _) in MISTAKES.items()} | {
        "first": [*run, "--max_points=2"],
        "rest": [*run, "--keep_adapters", "--export={out}/tables"],
        "again": run,
        "dry": ["--config=configs/sweeps/paper.py", "--gpu=h100", "--dry_run"],
    }
    words = [["experiments.sweep", *(word.format(**names) for word in command)] for command in commands.values()]
    return dict(zip(commands, run_commands(words), strict=True)) | {"out": out}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, results):
    result = results[name]
    last = result["err"].splitlines()[-1]
    assert result["status"] == 2 and last.startswith("error: ") and "Traceback" not in result["err"], result
    assert all(word in last for word in MISTAKES[name][1]), last


def test_a_grid_is_run_to_its_end(results):
    assert results["first"]["status"] == 0, results["first"]["err"]
    assert "types: 4 points; quant.format (2), train.seed (2)" in results["first"]["out"]
    assert "running 2 points in 1 packs" in results["first"]["out"]
    assert "2 done" in results["rest"]["out"] and "running 4 points in 2 packs" in results["rest"]["out"]
    assert results["rest"]["status"] == 0 and "models a minute" in results["rest"]["out"]
    assert "nothing is missing" in results["again"]["out"] and results["again"]["status"] == 0
    with reading(results["out"] / "run" / FILE) as db:
        points = contents(db)["points"]
        meta = dict(db.execute("SELECT key, value FROM meta"))
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (6,)
    assert len(points) == 6 and {status for status, *_ in points.values()} == {"done"}
    for _, config, result, *_ in points.values():
        assert result["steps"] == 3 and result["final_eval_loss"] > 0
        assert result["trainable_params"] % config["lora"]["rank"] == 0
    assert len({result["final_eval_loss"] for _, _, result, *_ in points.values()}) == 6
    assert json.loads(meta["versions"])["jax"] and "def sweep()" in meta["config_file"]


def test_adapters_are_kept_where_asked(results):
    adapters = list((results["out"] / "run" / "packs").glob("*/members/*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 4  # of the second command
    assert not list((results["out"] / "run" / "packs").glob("*/checkpoints"))
    assert (results["out"] / "tables" / "points.parquet").is_file()


def test_the_paper_is_planned_without_weights_and_data(results):
    assert results["dry"]["status"] == 0, results["dry"]["err"]
    assert "in all 1,182 points" in results["dry"]["out"] and "GPU-hours" in results["dry"]["out"]


def test_the_papers_grid():
    points = expand(paper.get_config(), paper.sweep())
    assert points.choices == 1_422 and len(points) == 1_182
    assert str(points.choices) in paper.__doc__.replace(",", "") and str(len(points)) in paper.__doc__.replace(",", "")
    stated = [int(line.split("= ")[1].split()[0]) for line in paper.__doc__.splitlines() if "*" in line]
    assert sum(stated) == points.choices
    assert len({point.config["data"]["path"] for point in points.points}) == 17  # 8 sets, 8 tasks of GLUE, T5's
    assert len({point.config["model"]["path"] for point in points.points}) == 10
    packs = make_packs(points.points, pack_key, 16)
    assert len(packs) < len(points) / 5
    keys = flatten(points.points[0].config)
    assert all(value for value in (keys["model.path"], keys["data.path"]))


def test_clusters_are_described_in_files_that_parse():
    for script in ("slurm.sh", "train_slurm.sh"):
        subprocess.run(["bash", "-n", str(REPOSITORY / "scripts" / "cluster" / script)], check=True)
    job = yaml.safe_load((REPOSITORY / "scripts" / "cluster" / "kuberay.yaml").read_text())
    assert job["kind"] == "RayJob" and "experiments.sweep" in job["spec"]["entrypoint"]
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_packs_are_compared_with_processes(monkeypatch):
    seconds = {"train": 0.0, "loop": 4.0, "pack": 2.0}
    asked = []

    def measure(folder, how, configs) -> float:
        asked.append((how, len(configs)))
        return seconds[how]

    monkeypatch.setattr(compare, "_measure", measure)
    points = fake.points(axis("train.seed", range(5))).points
    lines = compare.compare(make_packs(points, fake.key, 4), 3, 1e9, 2)
    assert sorted(asked) == [("loop", 3), ("pack", 3), *[("train", 1)] * 3]
    assert "one by one 45, as a pack 90 models a minute: 2.00 times" in lines[2]
    assert "this sweep, all included: 1e+09 models a minute" in lines[3]


def test_a_sample_trains(results, tmp_path, capsys, monkeypatch):
    """A pack, whose program the sweep above has compiled, and a run by itself; of several runs each is a call."""
    with reading(results["out"] / "run" / FILE) as db:
        found = db.execute("SELECT config, pack FROM points WHERE pack NOT NULL ORDER BY pack").fetchall()
    configs = [json.loads(config) for config, pack in found if pack == found[0][1]]
    assert len(configs) == 2
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    compare._main("pack", tmp_path)
    assert float(capsys.readouterr().out) > 0

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "configs.json").write_text(json.dumps(configs[:1]))
    compare._main("loop", tmp_path / "one")
    assert float(capsys.readouterr().out) > 0

    taken = []
    train = lambda runner, pack, workdir, *_: taken.append(([one.to_dict() for one in pack], workdir))  # noqa: E731
    monkeypatch.setattr(PackRunner, "train", train)
    compare._main("loop", tmp_path)
    assert taken == [([config], None) for config in configs] * 2  # once to compile, once for the clock
    assert float(capsys.readouterr().out) >= 0
