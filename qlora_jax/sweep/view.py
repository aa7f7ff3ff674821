"""What a sweep looks like while it runs: one table that stays in place on a terminal, a line now and then in a log."""

import sys
import time
from typing import TextIO

from qlora_jax.sweep.engine import State

_LOG_SECONDS = 30.0  # between two lines of a log
_SILENT_SECONDS = 60.0  # without an answer, after which a worker is called silent
_SHOWN_FAILURES = 3
_WIDTH = 110  # characters of a line; what wraps could not be drawn over


class View:
    """Shows states on `out`. Call it as often as you like."""

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stderr
        self._on_terminal = self._out.isatty()
        self._drawn = 0  # lines that the next table replaces
        self._logged = time.monotonic()
        self._failures = 0
        self._ended = False

    def __call__(self, state: State) -> None:
        finished = not state.running and not state.waiting
        if self._on_terminal:
            lines = [line[:_WIDTH] for line in table(state)]
            up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
            self._out.write(up + "\n".join(lines) + "\n")
            self._out.flush()
            self._drawn = len(lines)
            return
        for failure in state.failures[self._failures :]:
            print(failure, file=self._out, flush=True)
        self._failures = len(state.failures)
        if (finished and not self._ended) or time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            self._ended = finished
            print(summary(state), file=self._out, flush=True)


def summary(state: State) -> str:
    """One line."""
    left = state.total - state.done - state.failed
    rate = state.models_per_minute
    line = f"sweep: {state.done:,} of {state.total:,} done"
    if state.failed:
        line += f", {state.failed:,} failed"
    if rate:
        line += f", {rate:.3g} models a minute"
        if left:
            line += f", {_span(60 * left / rate)} to go"
    return line


def table(state: State) -> list[str]:
    """The summary, a line for every running pack, and the newest failures."""
    now = time.monotonic()
    lines = [summary(state)]
    for worker, running in state.running.items():
        pack = running.task.pack
        steps = max(point.config["train"]["steps"] for point in pack.points)
        line = f"  {worker:<12} pack {pack.name}: {len(pack.points)} x, step {running.step:,} of {steps:,}"
        if running.tokens_per_second:
            line += f", {running.tokens_per_second:,.0f} tokens/s"
        if running.step:
            line += f", {_span((now - running.started) * (steps - running.step) / running.step)} to go"
        else:
            line += f", begun {_span(now - running.started)} ago"
        if now - running.heard > _SILENT_SECONDS:
            line += f"; silent for {_span(now - running.heard)}"
        lines.append(line)
    lines += [f"  {failure}" for failure in state.failures[-_SHOWN_FAILURES:]]
    return lines


def _span(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
