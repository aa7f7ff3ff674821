"""Like with like: what varies together, full blocks, intervals and shares against scipy and by hand."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from qlora_jax.report.compare import best, block, means, pairs, shares
from qlora_jax.report.factors import design, is_comparable
from qlora_jax.report.findings import measured, paper
from qlora_jax.report.source import Run
from qlora_jax.settings import flatten
from tests.report import synthetic

METRIC = "final_eval_loss"


def runs_of(group: str, repetitions: int = 4) -> list[Run]:
    points = [point for point in synthetic.grid(repetitions).points if group in point.groups]
    return [
        Run(point.hash, "done", flatten(point.config), point.groups, {METRIC: synthetic.losses(point.config, [20])[0]})
        for point in points
    ]


def without(run: Run) -> Run:
    return dataclasses.replace(run, status="failed")


def test_keys_that_change_together_are_one_factor():
    of = design(runs_of("Data types"))
    assert [factor.name for factor in of.factors] == ["data type", "learning rate"]
    assert of.factors[0].labels == ("16-bit", "NF4 + DQ", "NF4", "FP4", "Int4")
    assert of.seeds.keys == ("data.seed", "train.seed") and len(of.seeds.levels) == 4 and of.searched == ()
    of = design(runs_of("r and layers"))
    by_name = {factor.name: factor for factor in of.factors}
    assert set(by_name) == {"r", "layers"} and by_name["r"].followers == ("lora.alpha",)
    assert by_name["r"].labels == ("2", "8", "16", "32")
    amounts = design(runs_of("Amount of data")).factors[0]
    assert amounts.is_numeric and not design(runs_of("Source or target")).factors[0].is_numeric
    assert amounts.labels == ("100", "200", "400", "800", "all")


def test_all_combinations_are_two_factors():
    run = runs_of("Amount of data")[0]
    configs = [{"quant.format": a, "quant.double_quant": b} for a in ("nf4", "fp4") for b in (True, False)]
    runs = [dataclasses.replace(run, config=run.config | config) for config in configs]
    assert [factor.name for factor in design(runs).factors] == ["DQ", "data type"]


def test_what_a_search_chose_is_no_axis():
    run = runs_of("Amount of data")[0]
    rates = np.geomspace(1e-4, 1e-2, 60)
    runs = [dataclasses.replace(run, config=run.config | {"optimizer.learning_rate": float(rate)}) for rate in rates]
    of = design(runs)
    assert of.searched == ("optimizer.learning_rate",) and of.factors == ()


def test_means_and_paired_differences_are_students():
    runs = runs_of("Data types", 6)
    of = design(runs)
    found = block(of, runs, METRIC)
    assert found.values.shape == (5, 3, 6) and found.left_out == () and len(found.runs) == 90
    cells = {
        (run.config["quant.format"], run.config["quant.double_quant"], run.config["optimizer.learning_rate"],
         run.config["train.seed"]): run.result[METRIC]
        for run in runs
    }  # fmt: skip
    of_seed = {
        name: [np.mean([cells[(*name, rate, seed)] for rate in (2e-3, 5e-3, 1e-2)]) for seed in range(6)]
        for name in synthetic.TYPES
    }
    for mean, name in zip(means(found, 0), synthetic.TYPES, strict=True):
        low, high = stats.t.interval(0.95, 5, np.mean(of_seed[name]), stats.sem(of_seed[name]))
        assert (mean.mean, mean.low, mean.high, mean.n) == pytest.approx((np.mean(of_seed[name]), low, high, 6))
    for pair in pairs(found, 0, higher=False):
        a, b = (of_seed[synthetic.TYPES[level]] for level in (pair.a, pair.b))
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval()
        assert (pair.difference.low, pair.difference.high) == pytest.approx((low, high))
        assert pair.difference.is_clear == (test.pvalue < 0.05)
        assert pair.a_better == sum(x < y for x, y in zip(a, b, strict=True))
    said = " ".join(measured(found, 0, higher=False))
    assert "FP4 is better than Int4" in said and "16-bit is better than Int4" in said


def test_a_missing_run_costs_the_level_that_misses_most():
    runs = runs_of("r and layers")
    gone = [run for run in runs if run.config["lora.rank"] == 32][:7]  # of 12
    found = block(design(runs), [without(run) if run in gone else run for run in runs], METRIC)
    assert found.left_out == ("r 32",) and sorted(found.values.shape) == [3, 3, 4]
    assert not any(run.config["lora.rank"] == 32 for run in found.runs)
    one = block(design(runs), [without(runs[0]), *runs[1:]], METRIC)
    assert one.left_out == ("1 of 4 seeds",) and one.seeds == 3
    assert block(design(runs), [without(run) for run in runs], METRIC) is None
    nan = [dataclasses.replace(run, result={METRIC: None}) for run in runs]
    assert block(design(runs), nan, METRIC) is None


def test_shares_of_variance_add_up():
    runs = runs_of("r and layers", 8)
    found = block(design(runs), runs, METRIC)
    by_name = {share.name: share for share in shares(found, [])}
    values = found.values  # r, layers, seed
    axis = [factor.name for factor in found.factors].index("layers")
    row = np.moveaxis(values, axis, 0).reshape(3, -1).mean(1)
    between = values.size / 3 * ((row - values.mean()) ** 2).sum()
    assert by_name["layers"].variance == pytest.approx(between / (values.size * values.var()))
    assert by_name["layers"].variance > 0.5 > 0.05 > by_name["r"].variance
    assert sum(share.variance for share in by_name.values()) <= 1
    assert by_name["r"].by_chance == pytest.approx(3 / 95)


def test_held_out_targets_of_their_own_are_not_compared():
    runs = runs_of("Source or target")
    factor = design(runs).factors[0]
    assert not is_comparable(factor, runs, METRIC) and is_comparable(factor, runs, "final_mmlu_accuracy")
    assert not is_comparable(factor, runs, "final_train_loss") and is_comparable(factor, runs, "tokens_per_second")
    assert len(best(runs, METRIC, higher=False)) == 2  # a table for each
    found = block(design(runs), runs, METRIC)
    assert [share.name for share in shares(found, [0])] == ["seed"]
    amounts = runs_of("Amount of data")
    assert is_comparable(design(amounts).factors[0], amounts, METRIC)  # one file of held-out examples
    split = [dataclasses.replace(run, config=run.config | {"data.eval_path": ""}) for run in amounts]
    assert not is_comparable(design(split).factors[0], split, METRIC)


def test_the_best_need_seeds():
    runs = runs_of("r and layers")
    lucky = dataclasses.replace(runs[0], config=runs[0].config | {"lora.rank": 64}, result={METRIC: 0.0})
    (found,) = best([*runs, lucky], METRIC, higher=False).values()
    assert len(found) == 12 and all(row.score.n == 4 for row in found)
    assert [row.score.mean for row in found] == sorted(row.score.mean for row in found)


def test_the_paper_is_quoted_where_its_axis_is_there():
    for group, words in (("Data types", "NF4 better than FP4"), ("r and layers", "r does not matter")):
        assert any(words in line for factor in design(runs_of(group)).factors for line in paper(factor))
    assert paper(design(runs_of("Source or target")).factors[0]) == []
    rates = next(factor for factor in design(runs_of("Data types")).factors if factor.name == "learning rate")
    assert paper(rates) == []
