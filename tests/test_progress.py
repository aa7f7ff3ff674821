"""The line of progress, where it goes and how often."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from qlora_jax.progress import Progress, for_terminal, place


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(steps: int, seconds: float, **settings) -> None:
    clock = Clock()
    with Progress("training", steps, clock=clock, **settings) as progress:
        for step in range(steps):
            clock.now += seconds
            progress.step(f"loss {step}.5")


def test_a_log_has_few_whole_lines(capsys):
    work(36_000, 1.0, brief=False)  # ten hours
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err
    assert lines[0] == "training: step 1 of 36,000 (0%), loss 0.5, 9:59:59 left"
    assert lines[1].startswith("training: step 11 of") and lines[2].startswith("training: step 31 of")
    assert lines[-1] == "training: step 36,000 of 36,000 (100%), loss 35999.5"
    assert 590 <= len(lines) <= 610


def test_brief_work_says_nothing_in_a_log_until_it_lasts(capsys):
    work(8, 1.0)
    assert capsys.readouterr().err == ""
    work(30, 1.0)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "training: step 10 of 30 (33%)",
        "training: step 20 of 30 (67%)",
        "training: step 30 of 30 (100%)",
    ]


def test_a_terminal_has_one_line_in_place(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()
    with Progress("training", 4, done=1, brief=False, clock=clock) as progress:
        for _ in range(3):
            clock.now += 60
            progress.step("loss 1.0, 5.00 GiB device")
            progress._bar.refresh()
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") >= 3
    assert "3/4, loss 1.0, 5.00 GiB device, 01:00 left" in text


def test_lines_beside_the_bar_go_to_stdout(monkeypatch, capsys):
    with Progress("training", 4) as progress:
        progress.write("step 2: held-out loss 0.5")
    assert capsys.readouterr() == ("step 2: held-out loss 0.5\n", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("training", 4, brief=False) as progress:
        progress.write("step 2: held-out loss 0.5")
    assert "step 2: held-out loss 0.5\n" in capsys.readouterr().out


def test_time_left_goes_by_steps_that_compiled_nothing():
    clock = Clock()
    progress = Progress("training", 11, clock=clock)
    clock.now += 500
    progress.step(typical=False)
    assert progress.seconds_left() is None
    for seconds in (2, 4):
        clock.now += seconds
        progress.step()
    assert progress.seconds_left() == pytest.approx(8 * 3)


def test_loaders_tell_how_many_are_done(capsys):
    clock = Clock()
    with Progress("loading", unit="tensor", clock=clock) as loading:
        loading.to(1, 4)
        clock.now += 20
        loading.to(2, 4)
        loading.to(2, 4)
        clock.now += 5
        loading.to(4, 4)
    assert re.findall(r"loading: tensor (\d) of 4", capsys.readouterr().err) == ["2", "4"]


def test_a_notebook_draws_it_in_one_place(monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, drawn) -> None:
            shown[-1].append(drawn)

    def display(drawn, display_id):
        assert display_id is True
        shown.append([drawn])
        return Handle()

    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    assert place() == "notebook"
    clock = Clock()
    with Progress("training <b>", 2, brief=False, clock=clock) as progress:
        clock.now += 1
        progress.step("loss 1.0")
        progress.write("step 1: held-out loss 0.5")
        progress.step("loss 0.9")
    assert capsys.readouterr() == ("step 1: held-out loss 0.5\n", "")
    assert len(shown) == 1
    last = shown[0][-1]
    assert repr(last).startswith("training <b>: 100%|") and repr(last).endswith("| 2/2, loss 0.9")
    assert last._repr_html_() == (
        '<div>training &lt;b&gt;: 100% <progress value="2" max="2"></progress>  2/2, loss 0.9</div>'
    )
    with Progress("loading", 2, clock=clock) as brief:  # over before it shows
        brief.step()
    assert len(shown) == 1
    monkeypatch.setattr("qlora_jax.progress._DELAY", 0)
    with Progress("loading", 2, clock=clock) as brief:
        brief.step()
    assert repr(shown[1][0]).startswith("loading:") and repr(shown[1][-1]) == shown[1][-1]._repr_html_() == ""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert place() == "log"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_models_text_does_not_steer_a_terminal(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    text = "a\tb\n\x1b]0;title\x07\x1b[2J\r\u202eé😀\x9b31m"
    shown = "a\tb\n\ufffd]0;title\ufffd\ufffd[2J\ufffd\ufffdé😀\ufffd31m"
    assert for_terminal(text) == (shown if is_terminal else text)
