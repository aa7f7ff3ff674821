"""A server on this machine that answers what huggingface_hub asks; what it holds is the test's."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_aVerySecretWord"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """`find` gives status, headers and body of a path; `requests` keeps (path, authorization) of every request."""

    requests: list[tuple[str, str]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        path = unquote(self.path.split("?")[0])
        self.requests.append((path, self.headers.get("authorization", "")))
        status, headers, body = self.find(path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@contextlib.contextmanager
def serving(handler: type[HubHandler]) -> Iterator[str]:
    """Runs the server; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
