"""What a process says is passed on but for the page by which JAX ends it, and its end is one line."""

import subprocess
import sys

import pytest

from experiments.support.watched import Page

LOGGED = b"E1128 23:34:49.320645    4184 coordination_service_agent.cc:288] Polled an error from another task.\n"
FATAL = b"F1128 23:34:49.320695    4184 client.h:86] Terminating process because the JAX distributed service ended\n"
STACK = b":UNAVAILABLE: Socket closed\n\n*** Check failure stack trace: ***\n    @  0x7fd7e4f3d7d4  absl\n"
OTHER = b"E1128 23:34:49.320645    4184 cuda_executor.cc:1] no card\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_page_is_left_out_however_it_comes(size):
    text = b"training: 1\rtraining: 2\nError, says a library\n" + OTHER + LOGGED + b"Error: " + FATAL + b"end"
    page = Page()
    out = b"".join(page.passed(text[at : at + size]) for at in range(0, len(text), size)) + page.rest()
    assert out == text.replace(LOGGED, b"") and page.fatal is None
    page, text = Page(), b"a line\nerror: a cause\n" + LOGGED + FATAL + STACK
    out = b"".join(page.passed(text[at : at + size]) for at in range(0, len(text), size)) + page.rest()
    assert out == b"a line\nerror: a cause\n" and page.fatal == FATAL and page.said_error


def test_what_stands_on_a_line_without_end_is_passed_on_at_once():
    page = Page()
    assert page.passed(b"loading: 1") == b"loading: 1" and page.passed(b"\rloading: 2") == b"\rloading: 2"


@pytest.mark.parametrize(
    "body, status, said",
    [
        ("return 7", 7, ""),
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), signal.SIGABRT)", 134, "error: this process of the run was ended by SIGABRT"),
        (f"os.write(2, {FATAL + STACK!r}); os.abort()", 1, "LOST"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: this process of the run was ended by SIGKILL"),
    ],
)
def test_an_end_is_a_status_and_at_most_a_line(body, status, said):
    script = f"""
import os, signal, sys, time
from experiments.support.watched import watched
def main():
    {body}
sys.exit(watched(main, lambda what: "LOST"))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.strip()) == (status, said)
