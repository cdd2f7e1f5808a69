"""A server on loopback that answers with a function of the test."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        method, path: as in HTTP.
        data: the body.
        token: that of the Authorization header, or None.
    """

    method: str
    path: str
    data: bytes
    token: str | None = None

    def json(self) -> Any:
        return json.loads(self.data)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        body: an object becomes JSON.
        status, kind: the HTTP status and the Content-Type.
        cut: whether the connection closes before the length that was announced.
    """

    body: object
    status: int = 200
    kind: str = "application/json"
    cut: bool = False


class LoopbackServer:
    """Answers each request with `answer(request)`. Use as a context manager; `url` is the endpoint.

    Attributes:
        asked: all requests, in order.
    """

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.answer, self.asked, self.lock = answer, list[Asked](), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                request = Asked(self.command, self.path, self.body(), self.token())
                with outer.lock:  # one at a time: tests count
                    outer.asked.append(request)
                    answer = outer.answer(request)
                body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(body) + (10 if answer.cut else 0)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                self.close_connection = answer.cut

            do_GET = do_POST = do_PUT = do_HEAD = handle_request

            def token(self) -> str | None:
                kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
                return token if kind == "Bearer" else None

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # of clients that are killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> LoopbackServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
