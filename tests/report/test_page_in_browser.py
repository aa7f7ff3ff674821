"""The page in headless Chromium: sorting, filters and open runs, from the address and from clicks; no network, no
errors."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from tests.report import synthetic

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")


class List(HTMLParser):
    """The run list of a dumped page: texts of its header's buttons, of its rows, of the open run, of its count."""

    def __init__(self, text: str):
        super().__init__()
        self.head: list[str] = []
        self.rows: list[list[str]] = []
        self.detail, self.found, self.polylines = "", "", 0
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "tr" and (attributes.get("class") or "").startswith("run"):
            self.rows.append([])
            self._in = "row"
        elif tag == "tr" and attributes.get("class") == "detail":
            self._in = "detail"
        elif tag == "td" and self._in == "row":
            self.rows[-1].append("")
        elif tag == "button" and "data-key" in attributes:
            self.head.append("")
            self._in = "head"
        elif attributes.get("id") == "found":
            self._in = "found"
        elif tag == "polyline":
            self.polylines += 1

    def handle_endtag(self, tag):
        if (
            tag in ("tr", "button", "span")
            and self._in in ("row", "head", "found")
            and not (tag == "span" and self._in == "row")
        ):
            self._in = ""

    def handle_data(self, data):
        if self._in == "row" and self.rows[-1]:
            self.rows[-1][-1] += data
        elif self._in == "head":
            self.head[-1] += data
        elif self._in == "found":
            self.found += data
        elif self._in == "detail":
            self.detail += data

    def column(self, name: str) -> list[str]:
        place = [head.rstrip(" ↑↓") for head in self.head].index(name)
        return [row[place] for row in self.rows]


class Loaded(NamedTuple):
    dom: str  # once the page's script has run
    asked: set[str]  # addresses that the page asked for
    console: list[str]


def load(page: Path, folder: Path, state: dict | None = None) -> Loaded:
    folder.mkdir(exist_ok=True)
    url = page.as_uri() + (f"#{urlencode(state)}" if state else "")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--virtual-time-budget=2000", "--dump-dom", f"--user-data-dir={folder}/profile", "--enable-logging=stderr",
        f"--log-net-log={folder}/net.json", url,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout, result.stderr
    asked = set()
    for event in json.loads((folder / "net.json").read_text())["events"]:
        parameters = event.get("params", {})
        # what the browser asks for of its own accord has no origin
        if parameters.get("initiator", "not an origin") != "not an origin" and "url" in parameters:
            asked.add(parameters["url"])
    return Loaded(result.stdout, asked, [line for line in result.stderr.splitlines() if "CONSOLE" in line])


def quiet(loaded: Loaded) -> List:
    """The run list of a page that asked for nothing and complained of nothing."""
    assert loaded.asked == set() and loaded.console == []
    return List(loaded.dom)


def test_state_of_the_address(running, tmp_path):
    state = {"sort": "-final_eval_loss", "f.quant.format": "NF4", "f.final_eval_loss": "<1.2", "group": "Data types"}
    found = quiet(load(running / "report.html", tmp_path, state))
    losses = [float(value) for value in found.column("eval loss")]
    assert len(losses) > 5 and losses == sorted(losses, reverse=True) and max(losses) < 1.2
    assert set(found.column("data type")) == {"NF4"} and "eval loss ↓" in found.head
    assert found.found == f"{len(losses)} of 93 runs"


def test_an_open_run_with_a_hostile_error(running, tmp_path):
    with (running / "tables" / "runs.csv").open() as file:
        header, *rows = [line.rstrip("\n").split(",") for line in file]
    failed = next(row for row in rows if row[0] == "failed")[header.index("hash")]
    loaded = load(running / "report.html", tmp_path, {"q": "onerror=alert", "open": failed})
    found = quiet(loaded)
    assert set(found.column("status")) == {"failed"}
    assert synthetic.HOSTILE in found.detail and failed in found.detail
    assert "quant.double_quant" in found.detail and "final_eval_loss" in found.detail and found.polylines == 1
    assert '<img src="x"' not in loaded.dom and "onerror=" in loaded.dom


CLICKS = """
const field = (label) => document.querySelector(`[aria-label="${label}"]`);
const type = (element, text) => { element.value = text; element.dispatchEvent(new Event("input")); };
const head = (key) => document.querySelector(`#list button[data-key="${key}"]`);
type(field("Filter status"), "done");
type(document.getElementById("search"), "gate_proj");
head("final_eval_loss").click();
document.querySelector("#list tr.run").click();
document.body.dataset.hash = location.hash;
"""


def test_clicks_and_typing(running, tmp_path):
    page = (running / "report.html").read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # to let the test's own script run
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</body>", f"<script>{CLICKS}</script></body>"))
    loaded = load(driven, tmp_path / "chromium")
    found = quiet(loaded)
    losses = [float(value) for value in found.column("eval loss")]
    assert losses and losses == sorted(losses)
    assert set(found.column("status")) == {"done"} and set(found.column("layers")) == {"gate up down"}
    shown = re.search(r'data-hash="([^"]*)"', loaded.dom)[1]
    assert "sort=final_eval_loss" in shown and "f.status=done" in shown and "q=gate_proj" in shown and "open=" in shown


def test_requests_would_be_noticed(running, tmp_path):
    """And the page's policy keeps the browser from them."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        (tmp_path / "open.html").write_text(f'<html><img src="{address}"></html>')
        text = (running / "report.html").read_text().replace("</main>", f'<img src="{address}"></main>')
        (tmp_path / "guarded.html").write_text(text)
        unguarded = load(tmp_path / "open.html", tmp_path / "a")
        guarded = load(tmp_path / "guarded.html", tmp_path / "b")
        server.shutdown()
    assert unguarded.asked == {address}
    assert guarded.asked == set() and "violates the following Content Security Policy" in guarded.console[0]
