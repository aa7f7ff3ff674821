"""One line that says how far work is: in place on a terminal, as a notebook draws it there, now and then in a log.

Where stderr is neither, lines are printed whole: after the first step and then at gaps that grow from ten seconds to a
minute. So a log of a day has some 1,400 of them, whatever a step takes.
"""

import dataclasses
import io
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from html import escape
from typing import Any, Literal, Self

from tqdm import tqdm

_FIRST_GAP, _LONGEST_GAP = 10.0, 60.0  # seconds between lines of a log
_RECENT = 50  # steps that the time left is reckoned from
_DELAY = 2.0  # seconds before a bar of short work shows
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


# what steers a terminal; tabs and ends of lines do not
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def for_terminal(text: str) -> str:
    """A stranger's text, or a model's, as stdout may have it: nothing in it steers a terminal; a file gets it all."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text


def place() -> Literal["terminal", "notebook", "log"]:
    """Where the lines go."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and "IPKernelApp" in shell.config:
        return "notebook"
    return "terminal" if sys.stderr.isatty() else "log"


class Progress:
    """Work of `total` parts; used as a context, or closed by `close`.

    Args:
      what: "training".
      total: parts in all; None until `to` says it.
      done: parts that were done before.
      unit: what a part is, for logs.
      brief: work that may be over soon and has nothing to say but how far it is: nothing shows in its first seconds,
        and a terminal's line goes when it ends.
      clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        done: int = 0,
        unit: str = "step",
        brief: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._what, self._unit, self._brief, self._clock = what, unit, brief, clock
        self._total, self._done = total, done
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._last = self._said = clock()
        self._gap = _FIRST_GAP
        self._lines = 0
        self._bar: Any = None
        if place() != "log":
            self._bar = _bar(desc=what, total=total, initial=done, leave=not brief, delay=_DELAY if brief else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def step(self, status: str = "", parts: int = 1, typical: bool = True) -> None:
        """More parts are done. `typical`: whether the next ones will take as long; a step that compiled is not."""
        now = self._clock()
        if typical and parts > 0:
            self._seconds.append((now - self._last) / parts)
        self._last = now
        self._done += parts
        said = ", ".join(part for part in (status, self._left()) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(parts)
        elif self._is_due(now):
            self._print(said, now)

    def to(self, done: int, total: int) -> None:
        """`done` of `total` parts are done: the form in which loaders and others tell it."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
        if done > self._done:
            self.step(parts=done - self._done)

    def write(self, line: str) -> None:
        """A line of its own, on stdout."""
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def seconds_left(self) -> float | None:
        """By the mean of the last typical steps; None before there is one."""
        if not self._seconds or self._total is None:
            return None
        return (self._total - self._done) * sum(self._seconds) / len(self._seconds)

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "" if seconds is None or self._total == self._done else f"{tqdm.format_interval(seconds)} left"

    def _is_due(self, now: float) -> bool:
        if not self._lines and not self._brief:
            return True
        if self._done == self._total and self._lines:
            return True
        return now - self._said >= self._gap

    def _print(self, said: str, now: float) -> None:
        of = f" of {self._total:,} ({self._done / self._total:.0%})" if self._total else ""
        print(f"{self._what}: {self._unit} {self._done:,}{of}{', ' if said else ''}{said}", file=sys.stderr, flush=True)
        if self._lines:
            self._gap = min(2 * self._gap, _LONGEST_GAP)
        self._said = now
        self._lines += 1


def _bar(**settings: Any) -> tqdm:
    settings |= {"bar_format": _FORMAT, "dynamic_ncols": True}
    return _NotebookBar(**settings) if place() == "notebook" else tqdm(file=sys.stderr, **settings)


class _NotebookBar(tqdm):
    """A bar that a notebook shows at one place and changes there; what is saved with it is the last state alone.

    Needs no widgets. tqdm's own writes letters where there are none, and each change stays as a line.
    """

    disable: bool

    def __init__(self, **settings: Any):
        self._shown: Any = None
        super().__init__(file=io.StringIO(), **settings)  # tqdm writes nothing itself: `display` shows it

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        drawn = _Drawn(str(self) if msg is None else msg, self.n, self.total)
        if self._shown is not None:
            self._shown.update(drawn)
        elif drawn.text:
            from IPython.display import display

            self._shown = display(drawn, display_id=True)

    def close(self) -> None:
        if not self.disable:
            self.display(None if self.leave else "")
        self.disable = True  # or tqdm would write once more


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What a notebook shows: a bar and its line; "" is nothing."""

    text: str
    done: float
    total: float | None

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        what, *parts = self.text.split("|", 2)
        share = f' value="{self.done}" max="{self.total}"' if self.total else ""
        return f"<div>{escape(what)} <progress{share}></progress> {escape(parts[-1])}</div>" if parts else ""
