"""An OpenAI-compatible server on loopback that knows sums and has every fault a real one can have, on demand.

A question orders its fault: the connection of `[reset x2] What is 3 + 4?` is reset twice, then it is answered.
Use as a context manager; `url` is the endpoint.
"""

from __future__ import annotations

import collections
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ORDER = re.compile(r"\[(\w+)(?: x(\d+))?\]")
SUM = re.compile(r"What is (\d+) \+ (\d+)\?")
HANG_SECONDS = 30
KEY = "sk-test-0a1b2c3d4e5f-secret"
"""The key of the fixtures `teacher_key` and `server`."""


class FaultyServer:
    """Answers sums, and notes what it was asked.

    Args:
        key: the only one that is let in; None: any.
        delay: seconds before every reply.

    Attributes:
        asked: every question in the order it came, faults included, with the time.
        answered: question -> good replies sent.
        bodies: of every request.
    """

    def __init__(self, key: str | None = None, delay: float = 0.0) -> None:
        self.key, self.delay = key, delay
        self.asked: list[tuple[str, float]] = []
        self.answered: collections.Counter[str] = collections.Counter()
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                try:
                    outer.handle(self)
                except (BrokenPipeError, ConnectionResetError):  # the client has gone, as one that is killed does
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:  # of connections that were reset on purpose
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> FaultyServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def times(self, question: str) -> list[float]:
        """When a question was asked."""
        return [at for asked, at in self.asked if asked == question]

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        """One request."""
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        sent_key = http.headers.get("Authorization", "").removeprefix("Bearer ")
        question = body["messages"][-1]["content"].splitlines()[-1]
        with self.lock:
            self.asked.append((question, time.monotonic()))
            self.bodies.append(body)
            count = len(self.times(question))
        if self.closing.wait(self.delay):
            return
        if http.path != "/v1/chat/completions":
            send(http, 404, {"error": {"message": "no such route"}})
        elif self.key is not None and sent_key != self.key:
            send(
                http, 401, {"error": {"message": f"Incorrect API key provided: {sent_key}.", "code": "invalid_api_key"}}
            )
        else:
            order = ORDER.search(question)
            if order is None or count > int(order[2] or 999) or order[1] in REPLIES:
                reply = REPLIES[order[1] if order and order[1] in REPLIES else "right"](question, sent_key)
                with self.lock:
                    self.answered[question] += 1
                send(http, 200, reply)
            else:
                FAULTS[order[1]](self, http, sent_key)


def send(
    http: BaseHTTPRequestHandler,
    status: int,
    body: dict[str, Any] | bytes,
    kind: str = "application/json",
    **headers: str,
) -> None:
    """A whole answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    http.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
        http.send_header(name.replace("_", "-"), value)
    http.end_headers()
    http.wfile.write(data)


def completion(content: str | None, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion, with the usage of 20 tokens read and 10 written."""
    return {
        "id": "1",
        "object": "chat.completion",
        "model": "adder-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
    }


def total(question: str) -> int:
    found = SUM.search(question)
    assert found is not None, question
    return int(found[1]) + int(found[2])


def worked(question: str) -> str:
    """A right reply."""
    found = SUM.search(question)
    assert found is not None, question
    return f"{found[1]} and {found[2]} make {total(question)}.\n#### {total(question)}"


REPLIES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "right": lambda question, key: completion(worked(question)),
    "wrong": lambda question, key: completion(worked(question).replace(str(total(question)), str(total(question) + 1))),
    "unparsable": lambda question, key: completion("I would have to think about it."),
    "truncated": lambda question, key: completion("First I take the", "length"),
    "refused": lambda question, key: completion("I'm sorry, but I can't help with that."),
    "filtered": lambda question, key: completion("", "content_filter"),
    "declined": lambda question, key: completion(None, refusal="No sums today."),
    "reasoning": lambda question, key: completion(
        f"\\boxed{{{total(question)}}}", reasoning_content=f"Let me add. It is {total(question)}."
    ),
    "thinking": lambda question, key: completion(f"<think>\nLet me add.\n</think>\n\n{total(question)}"),
    "echo": lambda question, key: completion(f"Your key is {key}.\n{worked(question)}", reasoning=f"I read {key}."),
}
"""Good replies, as HTTP goes."""


def reset(server: FaultyServer, http: BaseHTTPRequestHandler, key: str) -> None:
    """The connection ends with a TCP reset, and no answer."""
    http.close_connection = True
    http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.connection.close()


def half_body(server: FaultyServer, http: BaseHTTPRequestHandler, key: str) -> None:
    """The answer ends in the middle, before the length that was announced."""
    data = json.dumps(completion("7")).encode()
    http.close_connection = True
    http.send_response(200)
    http.send_header("Content-Type", "application/json")
    http.send_header("Content-Length", str(len(data)))
    http.end_headers()
    http.wfile.write(data[: len(data) // 2])


FAULTS: dict[str, Callable[[FaultyServer, BaseHTTPRequestHandler, str], None]] = {
    "busy": lambda server, http, key: send(http, 429, {"error": {"message": "slow down"}}),
    "busy_1s": lambda server, http, key: send(http, 429, {"error": {"message": "slow down"}}, Retry_After="1"),
    "busy_1h": lambda server, http, key: send(http, 429, {"error": {"message": "slow down"}}, Retry_After="3600"),
    "no_quota": lambda server, http, key: send(
        http, 429, {"error": {"message": f"no money for {key}", "code": "insufficient_quota"}}
    ),
    "broken": lambda server, http, key: send(http, 500, {"error": {"message": f"I broke over {key}"}}),
    "broken_html": lambda server, http, key: send(http, 502, b"<html>bad gateway</html>", "text/html"),
    "bad_request": lambda server, http, key: send(http, 400, {"error": {"message": f"I do not like {key}"}}),
    "lost": lambda server, http, key: send(http, 404, {"error": {"message": "no such model"}}),
    "reset": reset,
    "hang": lambda server, http, key: (setattr(http, "close_connection", True), server.closing.wait(HANG_SECONDS))[0],
    "half_body": half_body,
    "half_json": lambda server, http, key: send(http, 200, json.dumps(completion("7")).encode()[:60]),
    "no_choice": lambda server, http, key: send(http, 200, completion("7") | {"choices": []}),
    "empty": lambda server, http, key: send(http, 200, completion("")),
    "html": lambda server, http, key: send(http, 200, f"<html>Welcome {key}</html>".encode(), "text/html"),
    "an_error": lambda server, http, key: send(http, 200, {"error": {"message": f"overloaded by {key}"}}),
}
