"""Packs on Ray: several nodes on one machine, one of them killed while it trains. Starts Ray once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import quickstart
from qlora_jax.sweep import cluster
from qlora_jax.sweep.engine import run_packs
from qlora_jax.sweep.grid import axis
from qlora_jax.sweep.ledger import Ledger, reading
from qlora_jax.sweep.packs import make_packs
from qlora_jax.sweep.search import Search, check_search, choice, loguniform, run_search
from tests.sweep import fake

os.environ.update(cluster._RAY_SETTINGS)  # read when ray is imported
ray = pytest.importorskip("ray")
STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def nodes():
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **STORE})
    nodes.doomed = nodes.add_node(num_cpus=1, **STORE)
    yield nodes
    nodes.shutdown()


def test_one_model_starts_as_a_process_on_each_node(nodes):
    """Which both end for what the flags say: what they say is said, and their status is the command's."""
    repository = Path(__file__).resolve().parents[2]
    flags = ["--nodes=2", "--gpus=0", f"--address={nodes.address}", "--", "--config=absent.py", "--workdir=w"]
    command = [sys.executable, "scripts/cluster/train_ray.py", *flags]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert sorted(line[:17] for line in ended.stdout.splitlines()) == ["0: error: config ", "1: error: config "]


def test_a_search_goes_on_where_it_was(nodes, tmp_path):
    """Optuna proposes, ASHA stops, the ledger keeps; with the trials of an earlier search as observed."""
    config = quickstart.get_config()
    config.train.steps = 6
    space = {"optimizer.learning_rate": loguniform(1e-4, 1e-1), "lora.targets": choice([("q_proj",), ("all-linear",)])}
    ledger = Ledger(tmp_path)
    cluster.connect(nodes.address, 1)
    try:
        for trials in (6, 8):
            search = Search(space, "loss", trials, grace_steps=2, reduction=2)
            check_search(search, config)
            run_search(config, search, ledger, fake.runner(), tmp_path, ("CPU", 1))
    finally:
        ray.shutdown()
    assert ledger.counts() == {"pending": 0, "running": 0, "done": 8, "failed": 0}
    outcomes = [(axes, result) for _, axes, result in ledger.outcomes("search")]
    assert {type(axes["lora.targets"]) for axes, _ in outcomes} == {list}
    stopped = [result for _, result in outcomes if result.get("stopped_early")]
    whole = [result for _, result in outcomes if "final_train_loss" in result]
    assert len(stopped) + len(whole) == 8 and stopped and whole
    assert all(2 <= result["step"] < 6 for result in stopped)
    # of the fake the least learning rate is the best: what is stopped is never the best
    best = ledger.best("loss", 1)[0][1]["optimizer.learning_rate"]
    assert best == min(axes["optimizer.learning_rate"] for axes, _ in outcomes)
    ledger.close()


def test_a_node_is_killed_while_it_trains(nodes, tmp_path, capfd, monkeypatch):
    """And beside it a worker that is killed, and a point that cannot be."""
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.1)
    points = fake.points(axis("train.seed", range(10)), steps=30).points
    hashes = [point.hash for point in points]
    ledger = Ledger(tmp_path)
    ledger.add(points)
    cluster.connect(nodes.address, 1)
    trouble = {"7": f"exit {tmp_path / 'mark'}", "9": "input"}
    hurry = tmp_path / "hurry"
    executor = cluster.RayExecutor(fake.runner(0.05, trouble, str(hurry)), workers=2)
    assert executor.devices() == ("CPU", 2)
    killed = []

    def show(state) -> None:
        """Kills the second node while a pack trains there; once its process is gone, none is to be caught again."""
        if killed and all(actor.node_id != nodes.doomed.node_id for actor in executor._actors):
            hurry.touch()
        for name, running in state.running.items():
            actor = next((actor for actor in executor._actors if actor.worker and actor.worker.name == name), None)
            if not killed and actor and actor.node_id == nodes.doomed.node_id and running.step > 0:
                killed.append(actor.worker.node)
                nodes.remove_node(nodes.doomed, allow_graceful=False)

    try:
        state = run_packs(make_packs(points, fake.key, 2), ledger, executor, tmp_path, show)
    finally:
        executor.close()
    with reading(ledger.path) as db:
        attempts = db.execute("SELECT hash, node, status, error FROM attempts ORDER BY id").fetchall()
    assert killed and (state.done, state.failed) == (9, 1), attempts
    by_hash = {digest: [row for row in attempts if row[0] == digest] for digest in hashes}
    lost = {row[0] for row in attempts if row[2] == "lost" and row[1] == killed[0] and row[3]}
    assert len(lost) == 2, attempts  # the pack that was there, and its error is kept
    assert all(by_hash[digest][-1][2] == "done" and by_hash[digest][-1][1] != killed[0] for digest in lost)
    assert [row[2] for row in by_hash[hashes[7]] if row[2] != "lost"] == ["memory", "done"]
    assert by_hash[hashes[9]][-1][2:] == ("failed", "InputError: a value that no run can have")
    assert len(ledger.contents()["metrics"]) == 30 * 10  # of the failed one too
    ledger.close()
    assert "raylet" not in capfd.readouterr().out
