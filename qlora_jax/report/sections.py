"""All sections of a report: they follow from the axes and groups that are there."""

from qlora_jax.report.compare import block, shares
from qlora_jax.report.factors import design, is_comparable
from qlora_jax.report.group import group_section
from qlora_jax.report.parts import Canvas, Metric, Section, slug
from qlora_jax.report.source import Source
from qlora_jax.report.summary import best_section, cost_section, failures_section, run_section, sensitivity_section

_GROUPLESS = "All runs"


def sections(source: Source, metric: Metric, canvas: Canvas) -> list[Section]:
    """All of a grid, or of a run."""
    if not source.is_grid:
        return [run_section(source, canvas)]
    names = source.groups or (_GROUPLESS,)
    members = {name: [run for run in source.runs if not source.groups or name in run.groups] for name in names}
    loose = [run for run in source.runs if source.groups and not run.groups]
    if loose:
        members["Without a group"] = loose
    found, measured = [], []
    taken = {"sensitivity", "best", "failures", "attempts", "cost", "nodes", "runs", "config", "summary", "curves"}
    for name, runs in members.items():
        prefix = slug(name)
        while prefix in taken:  # groups whose names differ in signs alone
            prefix += "_"
        taken.add(prefix)
        of = design(runs)
        results = block(of, runs, metric.name)
        found.append(group_section(name, prefix, runs, of, results, metric, canvas))
        if results is not None:
            incomparable = [
                place for place, factor in enumerate(of.factors) if not is_comparable(factor, runs, metric.name)
            ]
            of_group = shares(results, incomparable)
            if any(share.name != "seed" for share in of_group):
                measured += [(name, share) for share in of_group]
    return [
        *found,
        *([sensitivity_section(measured, metric, canvas)] if measured else []),
        best_section(source.runs, metric),
        failures_section(source),
        cost_section(source),
    ]
