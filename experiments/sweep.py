"""Runs, or resumes, a grid of finetunings.

    python -m experiments.sweep --config=configs/sweeps/mini.py --workdir=runs/mini --dry_run

The config file has sweep() beside get_config(): qlora_jax/sweep/grid.py says how a grid is written; or search(), for
Ray Tune. Points that share a frozen base train together in packs, on every GPU (or CPU) that Ray has. The workdir gets
ledger.sqlite; run again, what is missing is run, and a grid that has grown adds to it. --dry_run shows points, packs,
memory and GPU-hours, and needs neither weights nor GPUs (nor data, where a config gives the lengths of its rows).

Exit statuses beside those of all commands: 3 if points failed, 143 after SIGTERM.
"""

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.planning.gpus import PlannedGpu
    from qlora_jax.sweep.engine import Executor, State
    from qlora_jax.sweep.grid import Point, Points
    from qlora_jax.sweep.ledger import Ledger
    from qlora_jax.sweep.packs import Pack
    from qlora_jax.train.cut import Choice

CONFIG = cli.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep, on a disk of this machine.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print groups, axes, points, packs, memory and GPU-hours; run nothing.")
MAX_POINTS = flags.DEFINE_integer("max_points", 0, "Run the first so many points of the grid; 0 is all.")
PACK_SIZE = flags.DEFINE_integer("pack_size", 16, "Adapters a pack at most; fewer where memory does not take them.")
EXECUTOR = flags.DEFINE_enum("executor", "ray", ["ray", "local"], "ray, or local: one process, no retries elsewhere.")
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address", None, "A running Ray cluster (host:port, auto); default: this machine."
)
WORKERS = flags.DEFINE_integer("workers", 0, "Packs at a time at most; 0 is one a GPU, or one a CPU without GPUs.")
GPU = flags.DEFINE_string("gpu", None, "The cards the sweep runs on, as plan names them: what packs must fit.")
PACKS = flags.DEFINE_string("packs", None, "Folder of packs, which all nodes must see; default: WORKDIR/packs.")
KEEP_ADAPTERS = flags.DEFINE_bool("keep_adapters", False, "Keep every point's folder: PACKS/NAME/members/HASH.")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Run failed points again.")
EXPORT = flags.DEFINE_string("export", None, "Also write points, metrics and attempts to this folder, Parquet and CSV.")
COMPARE = flags.DEFINE_integer(
    "compare_single", 0, "Afterwards, time so many points in one process each, and in a warm loop, against the packs."
)


def main() -> int:
    import jax

    from qlora_jax.errors import InputError

    jax.config.update("jax_platforms", "cpu")  # the driver computes nothing; GPUs are its workers'
    if WORKDIR.value is None and not DRY_RUN.value:
        raise InputError("missing flag --workdir=...; without it there is --dry_run")
    if MAX_POINTS.value < 0 or WORKERS.value < 0 or COMPARE.value < 0:
        raise InputError("--max_points, --workers and --compare_single take 0 or more")
    path = cli.config_path()
    grid = cli.call(path, "sweep")
    if grid is None:
        space = cli.call(path, "search")
        if space is None:
            raise InputError(f"config file {path}: neither sweep() nor search(); see qlora_jax/sweep/grid.py")
        return _search(space)
    from qlora_jax.sweep.check import check_points
    from qlora_jax.sweep.grid import expand

    points = expand(CONFIG.value, grid)
    _refuse_hidden_overrides(path, grid)
    for line in points.statement():
        print(line)
    chosen = points.points[: MAX_POINTS.value or None]
    check_points(points.points, "gpu" if GPU.value else "cpu")
    if DRY_RUN.value:
        _forecast(points, chosen)
        return 0
    return _run(points, chosen)


def _run(points: "Points", chosen: "list[Point]") -> int:
    from qlora_jax.sweep.engine import Stopped, run_packs
    from qlora_jax.sweep.inputs import check_inputs
    from qlora_jax.sweep.ledger import Ledger
    from qlora_jax.sweep.packs import missing
    from qlora_jax.sweep.view import View

    ledger = Ledger(Path(WORKDIR.value or ""))
    try:
        check_inputs(ledger, [point.config for point in points.points])
        _enter(ledger, points)
        if not _is_missing(ledger, chosen):
            print("nothing is missing")
            return _end(ledger, None, _packs(chosen, _limit(None)))
        executor, gpu = _executor()
        try:
            packs = _packs(chosen, _limit(gpu))
            left = missing(packs, ledger.statuses())
            print(f"running {sum(len(pack.points) for pack in left):,} points in {len(left):,} packs", flush=True)
            with _StopOnSigterm() as stop:
                state = run_packs(left, ledger, executor, _packs_folder(), View(), lambda: stop.is_set)
        except Stopped:
            counts = ledger.counts()
            print(f"stopped by SIGTERM: {counts['done']:,} points are done; the same command goes on from there")
            return 143
        finally:
            executor.close()
        return _end(ledger, state, packs)
    finally:
        ledger.close()


def _enter(ledger: "Ledger", points: "Points | None") -> None:
    """The grid into the ledger (of a search there is none), and what it is run with."""
    import platform

    from experiments.support.versions import commit, installed

    added = 0 if points is None else ledger.add(points.points)
    again = ledger.retry_failed() if RETRY_FAILED.value else 0
    ledger.set_meta(
        {
            "config_file": Path(cli.config_path()).read_text(encoding="utf-8"),
            "config_path": cli.config_path(),
            "groups": {} if points is None else points.groups,
            "versions": installed(("flax", "optax", "ray", "numpy")),
            "python": platform.python_version(),
            "commit": commit(),
            "hostname": platform.node(),
        }
    )
    counts = ledger.counts()
    line = f"ledger: {added:,} new points; " + ", ".join(f"{count:,} {status}" for status, count in counts.items())
    if ledger.interrupted:
        line += f" ({ledger.interrupted:,} were running when the last driver ended)"
    if again:
        line += f"; {again:,} failed points run again"
    print(line)


def _is_missing(ledger: "Ledger", points: "list[Point]") -> bool:
    statuses = ledger.statuses()
    return any(statuses[point.hash] == "pending" for point in points)


def _packs(points: "list[Point]", limit: int) -> "list[Pack]":
    from qlora_jax.packs.pack import pack_key
    from qlora_jax.sweep.cost import pack_bytes
    from qlora_jax.sweep.packs import make_packs

    return make_packs(points, pack_key, PACK_SIZE.value, pack_bytes, limit)


def _limit(gpu: "PlannedGpu | None") -> int:
    """Bytes that a pack may take: of a GPU, or of this machine's memory shared by the workers."""
    from qlora_jax.planning.memory import usable_bytes
    from qlora_jax.sweep.cost import host_limit

    return host_limit(_workers()) if gpu is None else usable_bytes(gpu)


def _workers() -> int:
    """On this machine without GPUs."""
    return 1 if EXECUTOR.value == "local" else WORKERS.value or len(os.sched_getaffinity(0))


def _packs_folder() -> Path:
    return Path(PACKS.value or Path(WORKDIR.value or "") / "packs").absolute()


def _make_runner() -> Any:
    from functools import partial

    from qlora_jax.sweep import runner

    return partial(runner.make_runner, KEEP_ADAPTERS.value)


def _cache() -> str:
    """Where this machine's workers keep compiled programs: for each other, and for a sweep that goes on."""
    here = str(Path(WORKDIR.value or "").absolute() / "compiled")
    return "" if RAY_ADDRESS.value else os.environ.get("JAX_COMPILATION_CACHE_DIR", here)


def _executor() -> "tuple[Executor, PlannedGpu | None]":
    import jax

    from qlora_jax.errors import InputError
    from qlora_jax.planning.gpus import planned_gpu

    if EXECUTOR.value == "local":
        from qlora_jax.sweep.local import LocalExecutor

        if RAY_ADDRESS.value:
            raise InputError("--ray_address goes with --executor=ray")
        jax.config.update("jax_compilation_cache_dir", _cache())
        return LocalExecutor(_make_runner()), None
    from qlora_jax.sweep.cluster import RayExecutor, connect

    connect(RAY_ADDRESS.value, _workers())
    executor = RayExecutor(_make_runner(), WORKERS.value, _cache())
    kind, count = executor.devices()
    print(f"Ray: {count} {kind}{'s' * (count != 1)} on {RAY_ADDRESS.value or 'this machine'}", flush=True)
    if kind == "CPU":
        return executor, None
    if not GPU.value:
        executor.close()
        raise InputError("Ray has GPUs: say which, --gpu=NAME as plan names them, so that packs fit into their memory")
    return executor, planned_gpu(GPU.value)


def _forecast(points: "Points", chosen: "list[Point]") -> None:
    """What a run would be: packs, memory, GPU-hours."""
    from qlora_jax.evaluate.tables import as_text
    from qlora_jax.planning.gpus import planned_gpu
    from qlora_jax.planning.plan import EFFICIENCIES
    from qlora_jax.sweep.cost import pack_bytes, pack_cut, pack_seconds

    gpu = planned_gpu(GPU.value) if GPU.value else None
    limit = _limit(gpu)
    packs = _packs(chosen, limit)
    sizes = [len(pack.points) for pack in packs]
    of = f"{len(packs):,} packs of {min(sizes)} to {max(sizes)}"
    print(f"\n{len(chosen):,} points in {of}, at most {limit / 1e9:,.1f} GB each")
    choices = [pack_cut(pack.points, None if gpu is None else limit) for pack in packs]
    takes = [pack_bytes(pack.points, choice.cut) for pack, choice in zip(packs, choices, strict=True)]
    print(f"predicted memory of a pack: {min(takes) / 1e9:,.2f} to {max(takes) / 1e9:,.2f} GB")
    for line in _cuts(packs, choices):
        print(line)
    over = [pack for pack, size in zip(packs, takes, strict=True) if size > limit]
    if over:
        models = sorted({pack.points[0].config["model"]["path"] for pack in over})
        print(f"{len(over):,} of them are points that are not expected to fit even alone: {', '.join(models)}")
    if gpu is None:
        print("--gpu=NAME plans for a card, with GPU-hours")
        return
    seconds: dict[str, float] = {}
    for pack, choice in zip(packs, choices, strict=True):
        each = pack_seconds(pack.points, gpu, choice.cut) / len(pack.points)
        seconds |= {point.hash: each for point in pack.points}

    def row(name: str, members: "list[Point]") -> list[str]:
        hours = sum(seconds[point.hash] for point in members) / 3600
        return [name, f"{len(members):,}", *(f"{hours / share:,.1f}" for share in EFFICIENCIES)]

    rows = [row(name, [point for point in chosen if name in point.groups]) for name in points.groups]
    rows.append(row("all (a point once)", chosen))
    header = ["group", "points", *(f"hours at {share:.0%}" for share in EFFICIENCIES)]
    print(f"\nGPU-hours of the training steps on {gpu.device_kind}, at shares of its roofline:\n")
    print(as_text(header, rows))


def _cuts(packs: "list[Pack]", choices: "list[Choice]") -> list[str]:
    """A line for each model, size of packs and cut of their steps, where configs leave it open."""
    from qlora_jax.settings import AUTO

    found: dict[str, int] = {}
    for pack, choice in zip(packs, choices, strict=True):
        config = pack.points[0].config
        if AUTO in (config["train"]["grad_accum"], config["model"]["remat"]):
            rows, remat = choice.cut
            what = f"{config['model']['path']}, {len(pack.points)} a pack: {rows} rows a micro-batch, remat {remat}"
            found[what] = found.get(what, 0) + 1
    return [f"cut of {what} ({count:,} packs)" for what, count in found.items()]


def _end(ledger: "Ledger", state: "State | None", packs: "list[Pack]") -> int:
    """The summary; the exit status. `packs` are those of the grid, `state` what has just run of them."""
    from qlora_jax.evaluate.tables import as_text
    from qlora_jax.sweep.compare import compare

    counts = ledger.counts()
    rows = [[status, f"{count:,}"] for status, count in counts.items() if count]
    if state is not None and state.done:
        rows.append(["minutes", f"{(time.monotonic() - state.begun) / 60:.1f}"])
        rows.append(["models a minute", f"{state.models_per_minute:.3g}"])
    print(as_text(["of the grid", "points"], rows))
    failures = ledger.failures(10)
    for digest, error in failures:
        print(f"failed: {digest[:12]}: {error}")
    print(f"written: {ledger.path}")
    if EXPORT.value:
        from qlora_jax.sweep.tabulate import export

        print(f"written: {', '.join(map(str, export(ledger.path, Path(EXPORT.value))))}")
    if COMPARE.value and packs:
        rate = None if state is None else state.models_per_minute
        print("\n".join(compare(packs, COMPARE.value, rate, _workers())))
    return 3 if counts["failed"] else 0


def _search(search: Any) -> int:
    """Ray Tune's trials instead of a grid's packs."""
    from qlora_jax.errors import InputError
    from qlora_jax.sweep.check import check_points
    from qlora_jax.sweep.cluster import RayExecutor
    from qlora_jax.sweep.grid import expand, fixed
    from qlora_jax.sweep.inputs import check_inputs
    from qlora_jax.sweep.ledger import Ledger
    from qlora_jax.sweep.search import check_search, configs_of, run_search

    check_search(search, CONFIG.value)
    base = expand(CONFIG.value, fixed({}))
    check_points(base.points, "gpu" if GPU.value else "cpu")
    print(f"a search of {search.trials} trials for the least {search.metric} over {', '.join(search.space)}")
    if DRY_RUN.value:
        return 0
    if EXECUTOR.value == "local":
        raise InputError("a search runs in Ray Tune: leave --executor=ray")
    ledger = Ledger(Path(WORKDIR.value or ""))
    try:
        check_inputs(ledger, configs_of(CONFIG.value, search))
        _enter(ledger, None)
        executor, _ = _executor()
        assert isinstance(executor, RayExecutor)
        try:
            run_search(CONFIG.value, search, ledger, _make_runner(), _packs_folder(), executor.devices(), _cache())
        finally:
            executor.close()
        for digest, axes, value in ledger.best(search.metric, 3):
            print(f"{search.metric} {value:.4f}: {axes} ({digest[:12]})")
        return _end(ledger, None, [])
    finally:
        ledger.close()


def _refuse_hidden_overrides(path: str, grid: Any) -> None:
    """A key that the command line and the grid both set would silently be the grid's."""
    from qlora_jax.errors import InputError
    from qlora_jax.settings import differing_keys, resolved

    changed = {
        line.partition(":")[0] for line in differing_keys(resolved(cli.load_config(path)), resolved(CONFIG.value))
    }
    hidden = sorted(changed & {key for choice in grid for key in choice.values})
    if hidden:
        raise InputError(f"--config.{hidden[0]} is given, but sweep() sets {hidden[0]} itself: change it in {path}")


class _StopOnSigterm:
    """Notes SIGTERM instead of dying of it."""

    is_set = False

    def __enter__(self) -> "_StopOnSigterm":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.is_set = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)


if __name__ == "__main__":
    cli.run(main)
