"""Makes a page on a run or a sweep, finished or still running. The example is for train's.

    python -m experiments.report --workdir=runs/first --follow

DIR is a folder of `sweep` (ledger.sqlite) or of `train` (config.json), finished or still running; it is only read.
--out (by default DIR itself) gets report.html, which needs no network and no other file, figures/ as PNG and SVG, and
tables/ as CSV, LaTeX and Markdown. --watch=SECONDS writes it again and again until all runs have ended. --follow
serves it to a browser on this machine, where it changes as metrics arrive, until Ctrl-C.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.support import cli

if TYPE_CHECKING:
    from qlora_jax.report.build import Report

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a sweep or of a run.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder for the report; by default the workdir.")
METRIC = flags.DEFINE_string("metric", "final_eval_loss", "What is compared: a number in the runs' results.")
BETTER = flags.DEFINE_enum(
    "better", "auto", ["auto", "lower", "higher"], "Which values of --metric are better; auto goes by its name."
)
WATCH = flags.DEFINE_integer("watch", 0, "Seconds after which the report is written again; 0 writes it once.")
FOLLOW = flags.DEFINE_bool(
    "follow", False, "Serve the page on a local port; it changes as metrics arrive. Ctrl-C ends it."
)
PORT = flags.DEFINE_integer("port", 0, "Port of --follow; 0 takes a free one.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address of --follow; another lets other machines read the page.")
_IDLE_SHARE = 4  # seconds left to the sweep for each second of building


def main() -> int:
    from qlora_jax.errors import InputError
    from qlora_jax.report.build import PAGE, Report

    if WATCH.value < 0:
        raise InputError(f"--watch={WATCH.value}; expected seconds, or 0")
    if FOLLOW.value and WATCH.value:
        raise InputError("--follow and --watch exclude each other; give one of them")
    if not FOLLOW.value and (PORT.value or HOST.value != HOST.default):
        raise InputError("--port and --host are for --follow; add it, or leave them out")
    workdir = Path(WORKDIR.value).expanduser()
    out = Path(OUT.value).expanduser() if OUT.value else workdir
    report = Report(workdir, out, METRIC.value, BETTER.value)
    if FOLLOW.value:
        return follow(report)
    while True:
        begun = time.monotonic()
        source = report.build(WATCH.value)
        took = time.monotonic() - begun
        counts = ", ".join(f"{count:,} {status}" for status, count in source.counts().items() if count)
        print(f"written: {out / PAGE} ({counts or 'no runs'}; {took:.1f} s)", flush=True)
        if not WATCH.value or source.is_finished:
            return 0
        time.sleep(max(WATCH.value, _IDLE_SHARE * took))


def follow(report: "Report") -> int:
    from qlora_jax.report.serve import Follower

    follower = Follower(report, HOST.value, PORT.value)
    print(f"serving {follower.address} (Ctrl-C ends it); also written to {report.out}", flush=True)
    try:
        follower.follow(lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"\nended; the page is {report.out}/report.html")
    finally:
        follower.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
