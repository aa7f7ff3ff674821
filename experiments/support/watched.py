"""Who watches the process that trains, where several train one model.

JAX ends a process at once, with a page of C++, when the first process of a run is lost or a machine falls silent: in
that process nobody can catch it. So the command is two: its child trains, and the parent hands signals on to it, passes
on what it says but for that page, and says in one line what such an end means.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable

_LOGGED = re.compile(rb"[EF]\d{4} \d\d:\d\d:\d\d[^\]]*\]")  # how C++ libraries begin a line
_OF_THE_RUN = re.compile(rb"coordination_service|distributed service|distributed runtime", re.IGNORECASE)
_PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)
_FAILED = 1


def watched(main: Callable[[], int], lost: Callable[[str], str]) -> int:
    """Calls `main` in a child and returns its status, 1 where another process of the run was lost.

    `lost`: the line of that, from what is known. Before JAX begins, since it forks.
    """
    reading, writing = os.openpty() if os.isatty(2) else os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # one that comes before anybody can hand it on waits
    parent, child = os.getpid(), os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.close(reading)
        os.dup2(writing, 2)
        os.close(writing)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(_FAILED)
        return main()
    os.close(writing)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal gives it to both
    page = Page()
    while data := _read(reading):
        _write(page.passed(data))
    _write(page.rest())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status >= 0:
        return status
    number = signal.Signals(-status)
    if number == signal.SIGTERM:
        return 128 + number
    if page.fatal is not None and page.said_error:
        return _FAILED
    if page.fatal is not None:
        print(lost("JAX's coordination service says so"), file=sys.stderr, flush=True)
        return _FAILED
    print(f"error: this process of the run was ended by {number.name}", file=sys.stderr, flush=True)
    return 128 + number


class Page:
    """What a process writes, without the lines of JAX's coordination service.

    fatal: the line by which that ends a process, once it came. said_error: whether a line of ours said why.
    """

    def __init__(self) -> None:
        self.fatal: bytes | None = None
        self.said_error = False
        self._line, self._passed = b"", 0  # the last one, and how much of it was passed on

    def passed(self, data: bytes) -> bytes:
        """What of it is passed on now: all, but for the beginning of a line that may be such a one."""
        out = b""
        for part in data.splitlines(keepends=True):
            self._line += part
            is_whole = part.endswith(b"\n")
            if is_whole or self._line[:1] not in b"EF":
                out += self._shown(is_whole)
        return out

    def rest(self) -> bytes:
        return self._shown(True)

    def _shown(self, is_whole: bool) -> bytes:
        line, begun = self._line, self._passed
        self._line, self._passed = (b"", 0) if is_whole else (line, len(line))
        if self.fatal is not None:
            return b""
        self.said_error |= line.startswith(b"error: ")
        if not begun and _LOGGED.match(line) and _OF_THE_RUN.search(line):
            self.fatal = line if line.startswith(b"F") else None
            return b""
        return line[begun:]


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 2**16)
    except OSError:  # how a terminal's other end ends
        return b""


def _write(data: bytes) -> None:
    while data:
        try:
            data = data[os.write(2, data) :]
        except OSError:  # nobody reads it any more
            return
