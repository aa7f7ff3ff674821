"""Compares two sources of verdicts.

    python -m experiments.agreement --first=assets/judging/judge.csv --second=assets/judging/people.csv

A source is a file of three-class verdicts as `tournament` reads them, a folder of such files, or people's annotations
(CSV or JSONL with question, first, second, annotator, verdict: 1, 2, 3, or first, second, tie, or the better system).
Printed: Kendall tau and Spearman r of the systems' Elo, Fleiss kappa of the examples, each source's position bias,
agreement of both orders and test-retest, and with --self=SYSTEM how much more the first file's judge gives its own
answers than the second file does. --out gets all of it as agreement.json.
"""

import dataclasses
from pathlib import Path

from absl import flags

from experiments.support import cli

FIRST = flags.DEFINE_string("first", None, "file of verdicts (a judge's, say), or a folder of them", required=True)
SECOND = flags.DEFINE_string(
    "second", None, "file that it is compared with (people's, say), or a folder", required=True
)
BENCHMARK = flags.DEFINE_string("benchmark", None, "whose verdicts count; needed where there are several")
SELF = flags.DEFINE_string("self", None, "name of the system that the first file's judge is")
ANSWERS = flags.DEFINE_multi_string("answers", [], "JSONL of answers (or a folder) that tells whose an answer id is")
OUT = flags.DEFINE_string("out", None, "folder for agreement.json")


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.evaluate.tournament import agreement
    from qlora_jax.evaluate.tournament.verdicts import ANY, Verdict, read_verdicts, select
    from qlora_jax.files import write_json

    out = None if OUT.value is None else Path(OUT.value).expanduser()
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; expected a folder")
    answers = [Path(path).expanduser() for path in ANSWERS.value]
    sources: list[list[Verdict]] = []
    notes: list[str] = []
    for path in (FIRST.value, SECOND.value):
        read = read_verdicts(Path(path).expanduser(), answers)
        sources.append(select(read.verdicts, "threeclass", BENCHMARK.value))
        notes += read.notes
    first, second = sources
    benchmarks = {verdict.benchmark for verdict in first + second} - {ANY}
    if len(benchmarks) > 1:
        raise InputError(f"the two files are of different benchmarks, {', '.join(sorted(benchmarks))}; expected one")
    result: dict = {
        "example_level": agreement.example_level(first, second),
        "system_level": agreement.system_level(first, second),
        "same_order": dataclasses.asdict(agreement.same_order(first, second)),
    }
    for name, verdicts in (("first", first), ("second", second)):
        result[name] = {
            "verdicts": len(verdicts),
            "position_bias": dataclasses.asdict(agreement.position_bias(verdicts)),
            "both_orders": dataclasses.asdict(agreement.both_orders(verdicts)),
            "test_retest": dataclasses.asdict(agreement.retest(verdicts)),
        }
    if SELF.value is not None:
        result["self_preference"] = agreement.self_preference(first, second, SELF.value)
    for note in notes:
        print(f"note: {note}")
    print_tables(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "agreement.json", result)
        print(f"written: {out / 'agreement.json'}")
    return 0


def print_tables(result: dict) -> None:
    from qlora_jax.evaluate.tables import as_text

    systems, examples = result["system_level"], result["example_level"]
    between = [
        ["Kendall tau, systems", number(systems["kendall_tau"]), "", str(systems["systems"])],
        ["Spearman r, systems", number(systems["spearman_r"]), "", str(systems["systems"])],
        ["Fleiss kappa, examples", number(examples["fleiss_kappa"]), "", str(examples["examples"])],
        ["equal, examples", *percent(examples["equal"])],
        ["equal, same order", *percent(result["same_order"])],
    ]
    print(as_text(["between the two", "figure", "95% interval", "of"], between), end="\n\n")
    rows = [
        [f"{label}, {name}", *percent(result[name][key])]
        for key, label in (
            ("position_bias", "first answer preferred"),
            ("both_orders", "same in both orders"),
            ("test_retest", "test-retest"),
        )
        for name in ("first", "second")
    ]
    rows += [
        [f"Fleiss kappa within, {name}", number(examples[f"within_{name}"]), "", ""] for name in ("first", "second")
    ]
    print(as_text(["of each", "figure", "95% interval", "of"], rows))
    if "self_preference" in result:
        own = result["self_preference"]
        print(
            f"\nself-preference of {own['system']}, {own['examples']} examples: {own['first']:.1%} won in the first, "
            f"{own['second']:.1%} in the second, difference {100 * own['difference']:+.1f} points "
            f"({100 * own['low']:+.1f} to {100 * own['high']:+.1f})"
        )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(found: dict) -> list[str]:
    """Share, interval and count of a `Share`, as cells."""
    if found["share"] is None:
        return ["-", "", "0"]
    return [f"{found['share']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}", str(found["n"])]


if __name__ == "__main__":
    cli.run(main)
