"""The report of what is still running, served on a local port: made again when metrics arrive, and fetched again then.

Only the page is served, and only to names of this machine: a site that a browser on this machine shows cannot read it
under a name of its own. The page asks every few seconds whether it changed and loads itself again if it did.
"""

import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qlora_jax.checksums import of
from qlora_jax.errors import InputError
from qlora_jax.report.build import PAGE, Report
from qlora_jax.report.source import watched_files

_PATHS = ("/", f"/{PAGE}")
_VERSION = "/version"  # of the page, as text: page.js asks for it
_LOOK_SECONDS = 1.0  # between looks at the run's files
_IDLE_SHARE = 4  # seconds left to the run for each second of building


class Follower:
    """Serves the page of a workdir until `close`; `refresh` brings it up to date.

    Args:
      host, port: where it listens; port 0 takes a free one.
    Raises:
      InputError: the port is taken or not allowed; or as Report.
    """

    def __init__(self, report: Report, host: str = "127.0.0.1", port: int = 0):
        self._report, self._page, self._version = report, b"", ""
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self.finished = False
        self.refresh()
        try:
            self._server = ThreadingHTTPServer((host, port), self._handler())
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"--port={port}: {host} cannot be listened on ({reason}); leave it out for a free port"
            ) from error
        self._server.daemon_threads = True
        self.host, self.port = host, int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}/"

    def refresh(self) -> bool:
        """Makes the page again if the run's files changed; whether it did."""
        seen = tuple((str(file), *_stamp(file)) for file in watched_files(self._report.workdir))
        if seen == self._seen:
            return False
        source = self._report.build(is_served=True)
        self._seen, self.finished = seen, source.is_finished
        page = (self._report.out / PAGE).read_bytes()
        self._page, self._version = page, of(page)
        return True

    def follow(self, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
        """Keeps the page up to date, for ever; says once that all runs have ended."""
        said = False
        while True:
            begun = time.monotonic()
            self.refresh()
            took = time.monotonic() - begun
            if self.finished and not said:
                say(f"all has ended; the page stays at {self.address} until Ctrl-C")
            said = self.finished
            sleep(max(_LOOK_SECONDS, _IDLE_SHARE * took))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        follower = self

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = "qlora_jax", ""

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def _answer(self, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                if not follower._is_for_us(self.headers.get("Host", "")):
                    return self._send(HTTPStatus.FORBIDDEN, b"another host\n", "text/plain", with_body)
                if path in _PATHS:
                    return self._send(HTTPStatus.OK, follower._page, "text/html; charset=utf-8", with_body)
                if path == _VERSION:
                    return self._send(HTTPStatus.OK, follower._version.encode(), "text/plain", with_body)
                return self._send(HTTPStatus.NOT_FOUND, b"only the report is here\n", "text/plain", with_body)

            def _send(self, status: HTTPStatus, body: bytes, kind: str, with_body: bool) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Requests are not worth a line."""

        return Handler

    def _is_for_us(self, host: str) -> bool:
        """Whether a request's Host is this machine, or the address that was asked to listen."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return name in ("127.0.0.1", "localhost", "[::1]", self.host) or self.host in ("0.0.0.0", "::")


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
