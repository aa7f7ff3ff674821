"""Searches: sweeps whose points are not written down but proposed, by Optuna, and stopped early, by ASHA, in Ray Tune.

    def search():
        return Search(
            space={"optimizer.learning_rate": loguniform(1e-5, 1e-3), "lora.rank": choice([8, 16, 64])},
            metric="eval_loss", trials=40, grace_steps=50,
        )

A trial is a point like any other: its config, hash, metrics and result are in the ledger. A search that was killed goes
on: what is done is told to Optuna as observed, and the trials that are missing are run. Which trials these are depends
on which end first, so two searches of one config differ, as grids do not.
"""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.sweep.engine import MakeRunner, Trained, describe, row_metrics
from qlora_jax.sweep.grid import Choice, Point, expand
from qlora_jax.sweep.ledger import Ledger, Outcome

GROUP = "search"
_FINAL = {"eval_loss": "final_eval_loss", "loss": "final_train_loss"}  # metric of rows -> of results


@dataclasses.dataclass(frozen=True)
class Domain:
    """Values of one key: one of `options`, or a float between low and high."""

    options: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def choice(options: Sequence[Any]) -> Domain:
    return Domain(options=tuple(options))


def uniform(low: float, high: float) -> Domain:
    return Domain(low=low, high=high)


def loguniform(low: float, high: float) -> Domain:
    """Uniform in the logarithm."""
    return Domain(low=low, high=high, log=True)


@dataclasses.dataclass(frozen=True)
class Search:
    space: Mapping[str, Domain]
    metric: str  # eval_loss (eval.every says when there is one) | loss
    trials: int  # in all
    grace_steps: int  # steps that a trial has before ASHA may stop it
    reduction: int = 3  # of `reduction` trials that come as far, one goes on
    seed: int = 0  # of Optuna


def check_search(search: Any, config: ConfigDict) -> None:
    """Raises InputError for a search that cannot be, before Ray starts."""
    if not isinstance(search, Search):
        raise InputError("search() must return a Search (qlora_jax/sweep/search.py)")
    if search.metric not in _FINAL:
        raise InputError(f"search: metric is {search.metric!r}; expected {' or '.join(_FINAL)}")
    if search.metric == "eval_loss" and not config.eval.every:
        raise InputError("search: metric is eval_loss, but eval.every is 0: set it to the steps between evaluations")
    if not search.space or search.trials < 1 or search.grace_steps < 1 or search.reduction < 2:
        raise InputError("search: expected a space, at least 1 trial and 1 grace step, and a reduction of 2 or more")
    for key, domain in search.space.items():
        ends = domain.options or (domain.low, domain.high)
        expand(config, [Choice({key: value}) for value in ends])
        if not domain.options and not (domain.low < domain.high and (domain.low > 0 or not domain.log)):
            raise InputError(f"search: {key} from {domain.low} to {domain.high}; expected low < high, above 0 for logs")


def configs_of(config: ConfigDict, search: Search) -> list[dict[str, Any]]:
    """The config itself, and with each of the options that the space lists, one at a time."""
    options = [Choice({key: value}) for key, domain in search.space.items() for value in domain.options]
    return [point.config for point in expand(config, [Choice({}), *options]).points]


def run_search(
    config: ConfigDict,
    search: Search,
    ledger: Ledger,
    make_runner: MakeRunner,
    folder: Path,
    devices: tuple[str, int],
    cache: str = "",
) -> None:
    """Runs what is missing of the search's trials on the Ray that `cluster.connect` joined.

    Args:
      folder: for what trials and Tune write.
      devices: of RayExecutor.devices(); a trial has one.
      cache: of cluster.prepare_worker.
    """
    import optuna
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    kind, count = devices
    past = [row for row in ledger.outcomes(GROUP) if set(row[1]) == set(search.space)]
    missing = search.trials - len(past)
    if missing <= 0:
        return
    observed = [
        (_encoded(axes, search), result[search.metric])
        for status, axes, result in past
        if status == "done" and result.get(search.metric) is not None
    ]
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors of trials are in the ledger
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    algorithm = OptunaSearch(
        space={key: _distribution(domain) for key, domain in search.space.items()},
        metric=search.metric,
        mode="min",
        seed=search.seed + len(past),  # the same seed would propose the same points again
        points_to_evaluate=[point for point, _ in observed] or None,
        evaluated_rewards=[value for _, value in observed] or None,
    )
    scheduler = AsyncHyperBandScheduler(
        time_attr="step",
        metric=search.metric,
        mode="min",
        max_t=max(config.train.steps + 1, search.grace_steps),  # one more than any step: the result
        grace_period=search.grace_steps,
        reduction_factor=search.reduction,
    )
    trainable = _trainable(config, search, make_runner, str(folder.absolute()), cache, kind == "GPU")
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": 1 if kind == "GPU" else 0}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(algorithm, max_concurrent=count),
            scheduler=scheduler,
            num_samples=missing,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str((folder / "tune").absolute()), verbose=0, callbacks=[_keeper(config, search, ledger)]
        ),
    )
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        tuner.fit()


def _point(config: ConfigDict, search: Search, encoded: Mapping[str, Any]) -> Point:
    values = {
        key: domain.options[encoded[key]] if domain.options else encoded[key] for key, domain in search.space.items()
    }
    point = expand(config, [Choice(values, (GROUP,))]).points[0]
    axes = {key: point.config[key.partition(".")[0]][key.partition(".")[2]] for key in values}
    return dataclasses.replace(point, axes=axes)


def _encoded(axes: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """Values as Optuna has them: the place of an option, since options may be lists."""
    plain = {key: [_listed(option) for option in domain.options] for key, domain in search.space.items()}
    return {key: plain[key].index(_listed(value)) if plain[key] else value for key, value in axes.items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if domain.options:
        return CategoricalDistribution(list(range(len(domain.options))))
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _trainable(
    config: ConfigDict, search: Search, make_runner: MakeRunner, packs: str, cache: str, on_gpu: bool
) -> Any:
    """A function for Tune; nested, so that it is sent by value and the runner stays in the process."""
    warm: dict[str, Any] = {}
    folder = os.getcwd()

    def train(encoded: dict[str, Any]) -> None:
        from ray import tune

        from qlora_jax.sweep.cluster import prepare_worker

        if os.path.isdir(folder):  # Tune starts trials in folders of their own, but configs name files from here
            os.chdir(folder)
        if not warm:
            prepare_worker(cache, on_gpu)
            warm["run"] = make_runner()
        point = _point(config, search, encoded)
        rows: list[dict[str, Any]] = []

        def on_row(member: int, row: dict[str, Any]) -> None:
            rows.append(row)
            if search.metric in row and row["step"]:
                tune.report({search.metric: row[search.metric], "step": row["step"], "rows": list(rows)})
                rows.clear()

        try:
            trained = warm["run"]([point.config], Path(packs) / point.hash[:12], on_row)[0]
        except Exception as error:  # the trial is failed, not the process
            trained = Trained(None, describe(error))
        last = (trained.result or {}).get(_FINAL[search.metric])
        if trained.error is not None or last is None or not math.isfinite(last):
            last = math.inf  # no better than any other
        report = {search.metric: last, "step": config.train.steps + 1, "rows": rows}
        tune.report(report | {"result": trained.result, "error": trained.error})

    return train


def _keeper(config: ConfigDict, search: Search, ledger: Ledger) -> Any:
    """What writes the ledger: a callback of Tune's, in the driver."""
    from ray.tune import Callback

    class Keeper(Callback):
        def __init__(self, ledger: Ledger):
            self.ledger = ledger

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of all it was given on disk; an open file is none

        def hash(self, trial: Any) -> str:
            return _point(config, search, trial.config).hash

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            point = _point(config, search, trial.config)
            self.ledger.extend([point])
            self.ledger.start(trial.trial_id, [point.hash], trial.node_ip or "")

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            digest = self.hash(trial)
            self.ledger.log([row for found in result["rows"] for row in row_metrics(digest, found)])
            if "result" in result:
                final = None if result["result"] is None else result["result"] | {search.metric: result[search.metric]}
                self.ledger.end([Outcome(digest, final, result["error"])])

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if "result" not in trial.last_result:
                last = {key: trial.last_result[key] for key in ("step", search.metric)}
                self.ledger.end([Outcome(self.hash(trial), {"stopped_early": True} | last)])

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            lines = Path(trial.error_file).read_text().strip().splitlines() if trial.error_file else []
            self.ledger.end([Outcome(self.hash(trial), None, lines[-1] if lines else "no reason given")])

    return Keeper(ledger)
