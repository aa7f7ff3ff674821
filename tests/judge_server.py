"""An OpenAI-compatible judge on this machine, for tests and for trying `judge` out; it misbehaves as a test tells it.

    python tests/judge_server.py --port=8765 --questions=questions.jsonl
    python -m experiments.judge --base_url=http://localhost:8765/v1 --judge_model=overlap ...

It prefers the answer with more different words; with a file of questions that have an "output" (as oa_questions.jsonl),
the answer that shares more words with that (F1).
"""

import argparse
import contextlib
import dataclasses
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

ANSWERS = (
    re.compile(r"<answer_1>\n(.*)\n</answer_1>.*<answer_2>\n(.*)\n</answer_2>", re.DOTALL),
    re.compile(r"Assistant 1's Answer\]\n(.*)\n\n\[The End.*Assistant 2's Answer\]\n(.*)\n\n\[The End", re.DOTALL),
)


@dataclasses.dataclass(frozen=True)
class Reaction:
    """What is sent back to one request."""

    text: str = ""  # of the judge
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | None = None  # instead of a completion with the text
    seconds: float = 0.0  # before anything is sent
    sent: int | None = None  # bytes of the body before the connection is closed; None sends all
    reset: bool = False  # the connection is reset, nothing is sent
    finish_reason: str = "stop"

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        choices = [{"index": 0, "message": message, "finish_reason": self.finish_reason}]
        return json.dumps({"choices": choices, "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()


def words(text: str) -> set[str]:
    return set(text.lower().split())


def verdict(request: dict, outputs: dict[str, str]) -> str:
    """The verdict on a request's two answers, in the form that its prompt asks for.

    Args:
      outputs: by question, what a good answer says; where one is not there the number of different words counts.
    """
    prompt = request["messages"][-1]["content"]
    found = next(match for form in ANSWERS if (match := form.search(prompt)))
    output = words(next((outputs[text] for text in outputs if f"\n{text}\n" in prompt[: found.start()]), ""))
    one, two = map(words, found.groups())
    if output:
        points = [1 + 9 * 2 * len(answer & output) / (len(answer) + len(output)) for answer in (one, two)]
    else:
        points = [1 + len(answer) / 10 for answer in (one, two)]
    reason = f"By words: {points[0]:.2f} and {points[1]:.2f}."
    asked = prompt[found.end() :]
    if "equivalent" in asked or "3 if" in asked:
        return f"{reason}\n{3 if points[0] == points[1] else 1 if points[0] > points[1] else 2}"
    whole = [min(10, int(each)) for each in points]
    return f"{reason}\n({whole[0]}, {whole[1]})" if "tuple" in asked else f"{whole[0]} {whole[1]}\n{reason}"


def by_words(request: dict) -> str:
    return verdict(request, {})


Behaviour = Callable[[int, dict], Reaction]  # number of the request, counted from 0, and its body


def well_behaved(_: int, request: dict) -> Reaction:
    return Reaction(by_words(request))


class JudgeServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviour: Behaviour = well_behaved, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.behaviour = behaviour
        self.requests: list[dict] = []  # bodies
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []  # time.monotonic() of their arrival
        self.lock = threading.Lock()
        self.most_at_once = self.at_once = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            known = self.path == "/v1/chat/completions"
            self.react(server.behaviour(number, body) if known else Reaction(status=404))
        finally:
            with server.lock:
                server.at_once -= 1

    def react(self, reaction: Reaction) -> None:
        time.sleep(reaction.seconds)
        if reaction.reset:  # with nothing lingering, closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        content = reaction.content()
        self.send_response(reaction.status)
        for name, value in {"Content-Length": str(len(content)), **reaction.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: reaction.sent])
        if reaction.sent is not None:
            self.close_connection = True


@contextlib.contextmanager
def judging(behaviour: Behaviour = well_behaved) -> Iterator[JudgeServer]:
    """Runs a judge of this behaviour beside the test."""
    server = JudgeServer(behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--questions", help="JSONL {text, output}")
    arguments = parser.parse_args()
    outputs: dict[str, str] = {}
    if arguments.questions:
        with open(arguments.questions, encoding="utf-8") as file:
            outputs = {row["text"]: row["output"] for row in map(json.loads, file)}
    with (
        JudgeServer(lambda _, request: Reaction(verdict(request, outputs)), arguments.port) as server,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(f"judging at {server.base_url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
