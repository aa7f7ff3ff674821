"""Ranks systems by a judge's verdicts.

    python -m experiments.tournament --verdicts=assets/judging/judge.csv --out=runs/elo

threeclass: Elo over random orderings of the games, and a Bradley-Terry fit beside it. --out gets elo.json {system:
{"elo", "low", "high", "games"}}, bradley_terry.json {system: rating or null}, wins.csv, table.md, .csv and .tex, and
the figures elo and wins as .png and .svg.
relative: a system's points over ChatGPT's. --out gets relative.json {system: {"percent", "low", "high"}}, table.md,
.csv and .tex, and the figure relative as .png and .svg.
Where verdicts have a category, or --questions gives it, categories.* has the scores by category.

Verdicts are a CSV with columns benchmark, first, second, item_id, score (1 first wins, 2 second wins, 3 tie, -1
unparsed), JSONL files with these fields, the rating files released with the QLoRA paper, or a folder of them.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    import numpy as np

    from qlora_jax.evaluate.tournament.verdicts import Verdict

VERDICTS = flags.DEFINE_string("verdicts", None, "file of verdicts, or a folder of them", required=True)
BENCHMARK = flags.DEFINE_string("benchmark", None, "whose verdicts count; needed where there are several")
PROTOCOL = flags.DEFINE_string("protocol", "threeclass", "threeclass or relative")
K = flags.DEFINE_float("k", 32, "points at stake in a game of Elo")
ORDERINGS = flags.DEFINE_integer("orderings", 10_000, "random orders in which the games are played")
SEED = flags.DEFINE_integer("seed", 0, "of the orders, and of the bootstrap", lower_bound=0)
START = flags.DEFINE_float("start", 1000, "Elo that every system begins with")
TIES = flags.DEFINE_string("ties", "half", "half: a tie is half a win of each; drop: ties are left out")
REFERENCE = flags.DEFINE_string("reference", None, "system that others are relative to; ChatGPT by default")
ANSWERS = flags.DEFINE_multi_string("answers", [], "JSONL of answers (or a folder) that tells whose an answer id is")
QUESTIONS = flags.DEFINE_string("questions", None, "JSONL with question_id and category, for scores by category")
OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)

ABOUT_K = (
    "K is an option, for ratings depend on it: the paper states K = 32, and its OA column comes out with it; "
    "its Vicuna column comes out with K = 4."
)


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.tournament.categories import with_categories
    from qlora_jax.evaluate.tournament.verdicts import read_verdicts, select

    out = Path(OUT.value).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; expected a folder")
    read = read_verdicts(Path(VERDICTS.value).expanduser(), [Path(path).expanduser() for path in ANSWERS.value])
    verdicts = select(read.verdicts, PROTOCOL.value, BENCHMARK.value)
    if QUESTIONS.value is not None:
        verdicts = with_categories(verdicts, Path(QUESTIONS.value).expanduser())
    judges = sorted({verdict.judge for verdict in verdicts})
    if len(judges) > 1:
        print(f"note: verdicts of {len(judges)} judges are pooled: {', '.join(name or '(no name)' for name in judges)}")
    for note in read.notes:
        print(f"note: {note}")
    if PROTOCOL.value == "relative":
        compare(verdicts, out)
    else:
        play(verdicts, out)
    print(f"written: {out}")
    return 0


def play(verdicts: "list[Verdict]", out: Path) -> None:
    """The tournament of three-class verdicts."""
    import numpy as np
    from tqdm import tqdm

    from qlora_jax.evaluate import tables
    from qlora_jax.evaluate.tournament import figures
    from qlora_jax.evaluate.tournament.bradley_terry import bradley_terry
    from qlora_jax.evaluate.tournament.categories import shares_won
    from qlora_jax.evaluate.tournament.elo import check_settings, elo
    from qlora_jax.evaluate.tournament.games import games_of
    from qlora_jax.files import write_json

    check_settings(K.value, ORDERINGS.value, START.value)
    games = games_of(verdicts, TIES.value)
    ties = "ties half a win of each" if TIES.value == "half" else f"{games.dropped:,} ties left out"
    print(
        f"{len(games.outcome):,} games of {len(games.systems)} systems ({games.unparsed:,} verdicts unparsed, {ties}), "
        f"in {ORDERINGS.value:,} orders, K = {K.value:g}"
    )
    started = time.perf_counter()
    with tqdm(total=max(ORDERINGS.value, 0), desc="playing", unit="ordering", delay=2) as bar:
        ratings = elo(games, K.value, ORDERINGS.value, SEED.value, START.value, bar.update)
    seconds = time.perf_counter() - started
    strengths = bradley_terry(games.wins, START.value)
    order = [games.systems.index(name) for name in ratings]
    with np.errstate(invalid="ignore"):
        shares = (games.wins / (games.wins + games.wins.T))[np.ix_(order, order)]  # NaN where two never met
    fitted = {
        name: None if strengths is None else float(strengths[place]) for name, place in zip(ratings, order, strict=True)
    }
    shown = {name: "-" if strength is None else f"{strength:.0f}" for name, strength in fitted.items()}

    header = ["system", "Elo", "2.5%", "97.5%", "Bradley-Terry", "won", "games"]
    won = games.wins.sum(1) / games.played
    rows = [
        [name, f"{r.elo:.0f}", f"{r.low:.0f}", f"{r.high:.0f}", shown[name]]
        + [f"{100 * won[place]:.1f}%", str(r.games)]
        for (name, r), place in zip(ratings.items(), order, strict=True)
    ]
    print(f"\n{tables.as_text(header, rows)}\n")
    print(ABOUT_K)
    if strengths is None:
        print("No Bradley-Terry fit: some systems never lost to the others, or never met them.")
    print(f"{seconds:.1f} s of playing")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "elo.json", {name: dataclasses.asdict(rating) for name, rating in ratings.items()})
    write_json(out / "bradley_terry.json", fitted)
    tables.write_tables(out, "table", header, rows)
    cells = [
        [name, *("" if np.isnan(x) else f"{x:.4f}" for x in line)] for name, line in zip(ratings, shares, strict=True)
    ]
    (out / "wins.csv").write_text(tables.as_csv(["system", *ratings], cells), encoding="utf-8")
    figures.draw_intervals(
        out, "elo", list(ratings), [(r.elo, r.low, r.high) for r in ratings.values()], f"Elo (K = {K.value:g})"
    )
    figures.draw_matrix(
        out, "wins", list(ratings), list(ratings), 100 * shares, "games won by the row's system, ties half, %"
    )
    categories, percents = shares_won(verdicts, list(ratings))
    write_categories(out, list(ratings), categories, percents, "games won, ties half, %", (0, 100))


def compare(verdicts: "list[Verdict]", out: Path) -> None:
    """The table of the relative protocol."""
    from qlora_jax.evaluate import tables
    from qlora_jax.evaluate.tournament import figures
    from qlora_jax.evaluate.tournament.categories import points_over
    from qlora_jax.evaluate.tournament.relative import find_reference, relative
    from qlora_jax.files import write_json

    reference = find_reference(verdicts, REFERENCE.value)
    found = relative(verdicts, reference, SEED.value)
    header = ["system", f"% of {reference}", "2.5%", "97.5%", "verdicts", "unparsed", "orders"]
    rows = [
        [name, f"{r.percent:.1f}", f"{r.low:.1f}", f"{r.high:.1f}", str(r.verdicts), str(r.unparsed), str(r.orders)]
        for name, r in found.items()
    ]
    print(f"\n{tables.as_text(header, rows)}\n")
    single = [name for name, r in found.items() if r.orders == 1]
    if single:
        print(f"judged in one order only, so with the judge's position bias in it: {', '.join(single)}")
    out.mkdir(parents=True, exist_ok=True)
    percents = {name: {"percent": r.percent, "low": r.low, "high": r.high} for name, r in found.items()}
    write_json(out / "relative.json", percents)
    tables.write_tables(out, "table", header, rows)
    values = [(r.percent, r.low, r.high) for r in found.values()]
    figures.draw_intervals(out, "relative", list(found), values, f"points, % of {reference}'s")
    categories, table = points_over(verdicts, list(found), reference)
    write_categories(out, list(found), categories, table, f"points, % of {reference}'s", (0, 200))


def write_categories(
    out: Path,
    systems: list[str],
    categories: list[str],
    percents: "np.ndarray",
    label: str,
    limits: tuple[float, float],
) -> None:
    """The table and the heat map by category, where verdicts have one."""
    from qlora_jax.evaluate import tables
    from qlora_jax.evaluate.tournament import figures

    if not categories:
        return
    header = ["system", *categories]
    rows = [
        [name, *(f"{x:.1f}" if math.isfinite(x) else "-" for x in line)]
        for name, line in zip(systems, percents, strict=True)
    ]
    print(f"\nby category: {label}\n{tables.as_text(header, rows)}\n")
    tables.write_tables(out, "categories", header, rows)
    figures.draw_matrix(out, "categories", systems, categories, percents, label, limits)


if __name__ == "__main__":
    cli.run(main)
