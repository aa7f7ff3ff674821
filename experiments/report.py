"""A page on a run or a sweep: python -m experiments.report --workdir=DIR [--out=DIR]

DIR is a folder of `sweep` (ledger.sqlite) or of `train` (config.json), finished or still running; it is only read.
--out (by default DIR itself) gets report.html, which needs no network and no other file, figures/ as PNG and SVG, and
tables/ as CSV, LaTeX and Markdown. --watch=SECONDS writes it again and again until all runs have ended.
"""

import time
from pathlib import Path

from absl import flags

from experiments.support import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a sweep or of a run.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder for the report; by default the workdir.")
METRIC = flags.DEFINE_string("metric", "final_eval_loss", "What is compared: a number in the runs' results.")
BETTER = flags.DEFINE_enum(
    "better", "auto", ["auto", "lower", "higher"], "Which values of --metric are better; auto goes by its name."
)
WATCH = flags.DEFINE_integer("watch", 0, "Seconds after which the report is written again; 0 writes it once.")
_IDLE_SHARE = 4  # seconds left to the sweep for each second of building


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.report.build import PAGE, Report

    if WATCH.value < 0:
        raise InputError(f"--watch={WATCH.value}; expected seconds, or 0")
    workdir = Path(WORKDIR.value).expanduser()
    out = Path(OUT.value).expanduser() if OUT.value else workdir
    report = Report(workdir, out, METRIC.value, BETTER.value)
    while True:
        begun = time.monotonic()
        source = report.build(WATCH.value)
        took = time.monotonic() - begun
        counts = ", ".join(f"{count:,} {status}" for status, count in source.counts().items() if count)
        print(f"written: {out / PAGE} ({counts or 'no runs'}; {took:.1f} s)", flush=True)
        if not WATCH.value or source.is_finished:
            return 0
        time.sleep(max(WATCH.value, _IDLE_SHARE * took))


if __name__ == "__main__":
    cli.run(main)
