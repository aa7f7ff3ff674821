"""The driver: what becomes of packs that fail, and how a sweep looks while it runs. No Ray, no training."""

import io
import sys
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.sweep.cluster import connect
from qlora_jax.sweep.engine import Event, Failed, Finished, Progress, Stopped, Trained, Worker, run_packs
from qlora_jax.sweep.grid import axis, product
from qlora_jax.sweep.ledger import Ledger, reading
from qlora_jax.sweep.local import LocalExecutor
from qlora_jax.sweep.packs import make_packs
from qlora_jax.sweep.view import View, table
from tests.sweep import fake


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path)
    yield found
    found.close()


def run(ledger: Ledger, trouble: dict[str, str] | None = None, count: int = 8, pack_size: int = 4, **more):
    points = fake.points(axis("train.seed", range(count))).points
    ledger.add(points)
    packs = make_packs(points, fake.key, pack_size)
    state = run_packs(packs, ledger, LocalExecutor(fake.runner(trouble=trouble)), Path(ledger.path).parent, **more)
    return [point.hash for point in points], state


def attempts(ledger: Ledger, digest: str) -> list[tuple]:
    with reading(ledger.path) as db:
        return db.execute("SELECT status, error FROM attempts WHERE hash = ? ORDER BY id", (digest,)).fetchall()


def test_results_and_metrics_are_in_the_ledger(ledger):
    hashes, state = run(ledger)
    assert (state.done, state.failed) == (8, 0)
    contents = ledger.contents()
    result = contents["points"][hashes[3]][2]
    assert result["final_eval_loss"] == 0.25 and "tokens_per_second" not in result  # measured, not computed
    assert [row[1:3] for row in contents["metrics"] if row[0] == hashes[3]] == [(n, "loss") for n in (1, 2, 3)]
    with reading(ledger.path) as db:
        assert "tokens_per_second" in db.execute("SELECT result FROM points").fetchone()[0]
        assert db.execute("SELECT DISTINCT name FROM metrics").fetchall() == [("loss",)]


def test_out_of_memory_splits_in_two(ledger):
    hashes, state = run(ledger, {"1": "memory"})
    assert (state.done, state.failed) == (8, 0)
    assert [status for status, _ in attempts(ledger, hashes[1])] == ["memory", "memory", "done"]
    assert [status for status, _ in attempts(ledger, hashes[3])] == ["memory", "done"]
    assert "RESOURCE_EXHAUSTED" in attempts(ledger, hashes[1])[0][1]


@pytest.mark.parametrize("what, tries", [("error", ["error"] * 5), ("input", ["input"] * 2)])
def test_a_point_that_fails_alone_is_failed(ledger, what, tries):
    """An error is tried twice in packs of 4, 2 and 1; what no run can have once each."""
    hashes, state = run(ledger, {"1": what})
    assert (state.done, state.failed) == (7, 1)
    assert [status for status, _ in attempts(ledger, hashes[1])] == [*tries, "failed"]
    status, _, result, *_, error, _ = ledger.contents()["points"][hashes[1]]
    assert status == "failed" and result is None
    assert error in ("ValueError: a lasting trouble", "InputError: a value that no run can have")


def test_a_passing_error_is_tried_again(ledger, tmp_path):
    hashes, state = run(ledger, {"1": f"once {tmp_path / 'mark'}"})
    assert (state.done, state.failed) == (8, 0)
    assert [status for status, _ in attempts(ledger, hashes[0])] == ["error", "done"]


def test_a_member_that_is_not_finite_fails_by_itself(ledger):
    hashes, state = run(ledger, {"2": "nan"})
    assert (state.done, state.failed) == (7, 1)
    assert attempts(ledger, hashes[2]) == [("failed", "loss is not finite at step 2")]
    assert ledger.contents()["points"][hashes[2]][2] == {"final_eval_loss": None}


def test_being_stopped_gives_running_packs_back(ledger):
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) > 20  # each row asks, and a pack has 12: in the second pack

    with pytest.raises(Stopped):
        run(ledger, stopping=stopping)
    assert ledger.counts() == {"pending": 4, "running": 0, "done": 4, "failed": 0}
    _, state = run(ledger)
    assert ledger.counts()["done"] == 8


class Scripted:
    """Two workers on two nodes, whose packs end as told: an answer for each start."""

    def __init__(self, answers: list[str]):
        self.workers = [Worker("a", "node 1"), Worker("b", "node 2")]
        self.answers, self.busy, self.started = answers, {}, []

    def idle(self, wanted: int) -> list[Worker]:
        return [worker for worker in self.workers if worker.name not in self.busy]

    def nodes(self) -> set[str]:
        return {worker.node for worker in self.workers}

    def start(self, worker, pack, folder) -> None:
        self.busy[worker.name] = (worker, pack)
        self.started.append((worker.node, pack.key, len(pack.points)))

    def wait(self, seconds, emit) -> None:
        for worker, pack in list(self.busy.values()):
            del self.busy[worker.name]
            answer = self.answers.pop(0) if self.answers else "done"
            event: Event = Failed(worker, answer, f"it was {answer}")
            if answer == "short":
                event = Finished(worker, [], [])
            if answer == "done":
                event = Finished(worker, [Trained({}) for _ in pack.points], [])
            emit(event)
            emit(Progress(worker, [(0, {"step": 1, "loss": 1.0})]))  # late: of no running pack

    def close(self) -> None: ...


def scripted(ledger: Ledger, answers: list[str], pack_size: int = 2, formats: tuple = ("nf4",), seeds: int = 2):
    points = fake.points(product(axis("quant.format", formats), axis("train.seed", range(seeds)))).points
    ledger.add(points)
    executor = Scripted(answers)
    return run_packs(make_packs(points, fake.key, pack_size), ledger, executor, Path(".")), executor


def test_a_lost_pack_runs_whole_on_another_node(ledger):
    state, executor = scripted(ledger, ["lost", "error", "done"])
    assert executor.started == [("node 1", "nf4", 2), ("node 2", "nf4", 2), ("node 1", "nf4", 2)]
    assert state.done == 2 and ledger.contents()["metrics"] == []


def test_a_pack_that_loses_every_node_is_not_tried_for_ever(ledger):
    state, executor = scripted(ledger, ["lost"] * 100)
    assert state.failed == 2 and len(executor.started) == 3 * 6  # whole, then each half


def test_a_killed_worker_alone_is_tried_once_more(ledger):
    state, executor = scripted(ledger, ["memory"] * 3, pack_size=1, seeds=1)
    assert state.failed == 1 and [node for node, *_ in executor.started] == ["node 1", "node 2"]


def test_results_of_the_wrong_number_are_an_error(ledger):
    state, executor = scripted(ledger, ["short"])
    assert state.done == 2 and "0 results for 2 points" in state.failures[0]


def test_workers_keep_to_what_they_have_warm(ledger):
    _, executor = scripted(ledger, [], pack_size=1, formats=("nf4", "fp4"), seeds=4)
    by_node = {node: [key for there, key, _ in executor.started if there == node] for node in ("node 1", "node 2")}
    assert by_node == {"node 1": ["nf4"] * 4, "node 2": ["fp4"] * 4}


def test_a_log_gets_lines_and_a_terminal_a_table(ledger):
    log, shown = io.StringIO(), []
    view = View(log)
    _, state = run(ledger, {"2": "nan"}, show=lambda state: (shown.append(table(state)), view(state)))
    text = log.getvalue()
    assert "loss is not finite at step 2" in text and text.count("loss is not finite") == 1
    assert "sweep: 7 of 8 done, 1 failed" in text
    running = [line for lines in shown for line in lines if "pack" in line]
    assert any("4 x, step" in line and "of 3" in line for line in running), running

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    view = View(terminal)
    view(state)
    view(state)
    assert terminal.getvalue().count("\x1b[") == 2  # the second drawing goes over the first


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"\[sweep\].*--executor=local"):
        connect(None, 1)


def test_a_cluster_that_is_not_there():
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="--ray_address=127.0.0.1:1: ConnectionRefusedError"):
        connect("127.0.0.1:1", 1)
