"""What the page's run list sorts, filters and opens: plain values, as small as they go."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from qlora_jax.report.factors import design, is_seed, varying
from qlora_jax.report.names import NAMED, freeze, is_number, key_name, value_name
from qlora_jax.report.source import CURVES, Curve, Run, Source, number

_MOST_CHOICES = 40  # values that a filter offers to choose from
_MOST_AXES = 24  # columns
_CURVE_POINTS = {2_000: 48, 20_000: 16}  # of a run, for so many runs; more runs get none
_RESULTS = ("final_eval_loss", "final_eval_accuracy", "final_train_loss")  # shown where results have them


def run_list(source: Source, metric: str) -> dict[str, Any]:
    """{"columns": [...], "rows": [[...]], "groups": [...], "base": {key: text}, "steps": [[...]], "details": [...]}.

    A column has key, name, kind ("choice": rows have places in `values`; "number"; "text"). A row's values are in the
    order of the columns. details[i] of row i: config values other than `base`'s, result, error, groups, and curves as
    {metric: [place in steps, values]}.
    """
    runs = source.runs
    base = _commonest(runs)
    axes = _axes(runs)
    results = [name for name in dict.fromkeys((metric, *_RESULTS)) if any(name in run.result for run in runs)]
    columns: list[dict[str, Any]] = [{"key": "status", "name": "status", "kind": "choice", "values": []}]
    filled = [_choices(columns[0], [run.status for run in runs])]
    for name in results:
        columns.append({"key": name, "name": name.removeprefix("final_").replace("_", " "), "kind": "number"})
        filled.append([_rounded(number(run.result.get(name))) for run in runs])
    for key in axes:
        columns.append({"key": key, "name": key_name(key), "kind": "choice", "values": []})
        filled.append(_choices(columns[-1], [run.config.get(key) for run in runs]))
    columns += [
        {"key": "seconds", "name": "seconds", "kind": "number"},
        {"key": "hash", "name": "hash", "kind": "text"},
    ]
    filled += [[_rounded(run.seconds) for run in runs], [run.hash for run in runs]]
    limit = next((points for most, points in _CURVE_POINTS.items() if len(runs) <= most), 0)
    steps: dict[tuple, int] = {}
    groups = {name: place for place, name in enumerate(source.groups)}
    return {
        "columns": columns,
        "rows": [list(row) for row in zip(*filled, strict=True)],
        "groups": list(groups),
        "base": {key: value_name("", value) for key, value in base.items()},
        "details": [_details(run, base, groups, steps, limit) for run in runs],
        "steps": [list(key) for key in steps],
    }


def _axes(runs: Sequence[Run]) -> list[str]:
    """Keys that tell the levels of every factor apart, the better known first, and seeds but those equal to another."""
    of = design(runs)
    shown = {key for factor in of.factors for key in factor.shown} | set(of.searched)
    found = [key for key in varying(runs) if key in shown or is_seed(key)]
    found.sort(key=lambda key: (is_seed(key), NAMED.index(key) if key in NAMED else len(NAMED)))
    columns = {tuple(freeze(run.config.get(key)) for run in runs): key for key in reversed(found)}
    return [key for key in found if key in columns.values()][:_MOST_AXES]


def _choices(column: dict[str, Any], values: list[Any]) -> list[Any]:
    """Places in column["values"], which are sorted; or the values themselves, where there are many of them."""
    distinct = {freeze(value): value for value in values}
    numeric = all(map(is_number, distinct.values()))
    if len(distinct) > _MOST_CHOICES:
        column["kind"] = "number" if numeric else "text"
        del column["values"]
        return values if numeric else [value_name(column["key"], value) for value in values]
    ordered = sorted(distinct) if numeric else list(distinct)  # type: ignore[type-var]
    column["values"] = [value_name(column["key"], distinct[key]) for key in ordered]
    places = {key: place for place, key in enumerate(ordered)}
    return [places[freeze(value)] for value in values]


def _commonest(runs: Sequence[Run]) -> dict[str, Any]:
    base = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        counts = Counter(freeze(run.config.get(key)) for run in runs)
        base[key] = counts.most_common(1)[0][0]
    return base


def _details(run: Run, base: dict, groups: dict[str, int], steps: dict[tuple, int], limit: int) -> dict[str, Any]:
    own = {key: value_name("", value) for key, value in run.config.items() if freeze(value) != base[key]}
    found: dict[str, Any] = {"config": own, "groups": [groups[name] for name in run.groups if name in groups]}
    if run.result:
        found["result"] = {
            key: _rounded(value, 6) if isinstance(value, float) else value for key, value in run.result.items()
        }
    if run.error:
        found["error"] = run.error[:4000]
    if run.attempts > 1:
        found["attempts"] = run.attempts
    if limit and run.curves:
        found["curves"] = {name: _curve(run.curves[name], steps, limit) for name in CURVES if name in run.curves}
    return found


def _curve(curve: Curve, steps: dict[tuple, int], limit: int) -> list[Any]:
    stride = -(-len(curve.steps) // limit)
    x = tuple(round(float(step), 1) for step in curve.steps[::stride])
    return [steps.setdefault(x, len(steps)), [_rounded(float(value), 4) for value in curve.values[::stride]]]


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
