"""The page of a running run, asked for as a browser does."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.report.build import Report
from qlora_jax.report.serve import Follower

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = {"train": {"steps": 3, "batch_size": 2}, "model": {"path": "m"}}


def begin_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    log(folder, 1)


def log(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, "seconds": 1.0, "tokens": 8}) + "\n")


def get(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def follower(tmp_path):
    begin_run(tmp_path / "run")
    (tmp_path / "run" / "secret.txt").write_text("secret")
    follower = Follower(Report(tmp_path / "run", tmp_path / "out", "final_eval_loss"))
    yield follower
    follower.close()


def test_the_page_changes_as_metrics_arrive(follower, tmp_path):
    status, page = get(follower.address)
    assert status == 200 and b'data-follow="yes"' in page and b"connect-src 'self'" in page
    assert get(follower.address + "report.html?x=1") == (200, page)
    _, version = get(follower.address + "version")
    assert not follower.refresh()  # nothing happened
    assert get(follower.address + "version") == (200, version)
    log(tmp_path / "run", 2)
    assert follower.refresh() and not follower.finished
    assert get(follower.address + "version")[1] != version and get(follower.address)[1] != page
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 3, "final_eval_loss": 0.3}))
    assert follower.refresh() and follower.finished
    assert b"data-follow" not in get(follower.address)[1]


@pytest.mark.parametrize(
    "path",
    ["secret.txt", "config.json", "../secret.txt", "%2e%2e/out/report.html", "/etc/passwd", "figures/", "report"],
)
def test_nothing_but_the_page_can_be_fetched(follower, path):
    connection = HTTPConnection(follower.host, follower.port, timeout=20)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    assert answer.status == 404 and b"secret" not in answer.read()
    connection.close()


def test_other_sites_cannot_read_it_under_their_name(follower):
    assert get(follower.address, Host="evil.example")[0] == 403
    assert get(follower.address, Host=f"localhost:{follower.port}")[0] == 200


def test_a_port_that_is_taken_is_one_line(follower):
    with pytest.raises(InputError, match=rf"--port={follower.port}: 127.0.0.1 cannot be listened on .*free port"):
        Follower(Report(follower._report.workdir, follower._report.out, "final_eval_loss"), port=follower.port)


def test_the_command_serves_until_ctrl_c(tmp_path):
    begin_run(tmp_path / "run")
    command = [sys.executable, "-m", "experiments.report", f"--workdir={tmp_path / 'run'}", "--follow"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"serving (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)", said)
        assert address is not None, said
        assert get(address[1])[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "ended; the page is" in out and err == ""
    finally:
        process.kill()


def test_flags_that_do_not_go_together(run_commands, assert_one_line_error, tmp_path):
    begin_run(tmp_path / "run")
    base = ["experiments.report", f"--workdir={tmp_path / 'run'}"]
    both, alone = run_commands([[*base, "--follow", "--watch=3"], [*base, "--port=8000"]])
    assert_one_line_error(both, ["--follow", "--watch"])
    assert_one_line_error(alone, ["--port", "--follow"])
