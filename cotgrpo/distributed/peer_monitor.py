"""A line from every process to process 0, so that none of them waits for one that has ended.

A collective over several machines never returns when one of them is missing. The operating system closes the connections of a process however it ends,
kill -9 included, and notices a machine that is gone by the keep-alives that it does not answer. Then every other process says who ended, and ends too.
JAX's own heartbeats take longer and name no host; they stay as the second line, for a process that hangs, and where a firewall is between the machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.storage import first_line

OTHER_ENDED = 4
"""The exit code of a process that ended because another one did."""

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before the first question, seconds between questions, and questions without an answer: a lost machine is noticed after 30 s."""


class PeerMonitor:
    """Watches over the processes of this run from its making to `leave`, in a thread of its own. Every process makes one, at the same point."""

    def __init__(self) -> None:
        self.id, self.count = jax.process_index(), jax.process_count()
        self.names = {self.id: f"{socket.gethostname()}, pid {os.getpid()}"}
        self.lines: dict[int, socket.socket] = {}  # of process 0: to every other; of the others: to process 0
        self.gone: set[int] = set()
        self.leaving = False
        listener = socket.create_server(("", 0), backlog=self.count) if is_process_0() else None
        port = listener.getsockname()[1] if listener is not None else 0
        here = {"at": own_addresses(), "port": port, "token": secrets.token_hex(8)}
        meeting: dict[str, Any] = on_process_0(lambda: here | self.about())
        if listener is not None:
            self.start(self.watch_others, listener, meeting["token"])
            return
        self.names[0] = meeting["name"]
        line = connect(meeting["at"], meeting["port"])
        if line is None:
            print(
                f"cotgrpo: process {self.id} does not reach process 0 ({self.names[0]}) at port {meeting['port']}. The run goes on, but "
                "where a process ends the others end later, and without its name: open the ports between the machines.",
                file=sys.stderr,
            )
            return
        self.lines[0] = line
        send(line, {"token": meeting["token"], "id": self.id} | self.about())
        self.start(self.watch_first, line)

    def start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="watch", daemon=True).start()

    def about(self) -> dict[str, Any]:
        return {"name": self.names[self.id]}

    def watch_others(self, listener: socket.socket, token: str) -> None:
        """Process 0: accepts the others' lines and reads them until one ends without a farewell."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        line, _ = listener.accept()
                        line.settimeout(10)
                        hello = receive(line)
                        if hello.get("token") != token:
                            line.close()
                            continue
                        keep_alive(line)
                        self.lines[hello["id"]], self.names[hello["id"]] = line, hello["name"]
                        selector.register(line, selectors.EVENT_READ, hello["id"])
                        continue
                    selector.unregister(key.fileobj)
                    assert isinstance(key.fileobj, socket.socket)
                    self.gone.add(key.data)
                    with key.fileobj as line:
                        farewell = receive(line)
                    if not farewell.get("done"):
                        self.end(key.data, farewell.get("because"))

    def watch_first(self, line: socket.socket) -> None:
        """The others: wait for what process 0 says, or for its end."""
        with line:
            keep_alive(line)
            news = receive(line)
        if not news.get("done"):
            self.names[news.get("id", 0)] = news.get("name", self.names[0])
            self.end(news.get("id", 0), news.get("because"))

    def end(self, who: int, because: str | None) -> None:
        """Ends this process because process `who` has ended."""
        if self.leaving:  # with a reason of its own
            return
        if self.id == 0:
            self.tell({"id": who, "name": self.names[who], "because": because})
        reason = because or "it was killed, or its machine is gone"
        print(
            f"cotgrpo: process {who} of {self.count} ({self.names[who]}) has ended: {reason}. The others end with it; "
            "start all of them again to go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(OTHER_ENDED)

    def leave(self, because: str | None = None) -> None:
        """Says farewell; with a reason, the other processes end too."""
        self.leaving = True
        if because is not None:
            time.sleep(1)  # those that fail alike find it out themselves
        self.tell({"done": because is None, "id": self.id, "because": because} | self.about())

    def tell(self, news: dict[str, Any]) -> None:
        """Sends it to all; process 0, whose end JAX makes everybody's, gives the others time to read it."""
        for line in self.lines.values():
            send(line, news)
        until = time.monotonic() + 5
        while self.id == 0 and not news.get("done") and self.lines.keys() - self.gone and time.monotonic() < until:
            time.sleep(0.05)
            self.gone |= {who for who in self.lines.keys() - self.gone if closed(self.lines[who])}


@contextlib.contextmanager
def watching(together: tuple[type[Exception], ...], alone: tuple[type[Exception], ...]) -> Iterator[None]:
    """Watches over what the processes do inside. With one process it does nothing.

    Args:
        together: what all processes raise at the same point; they end as if nothing had been raised.
        alone: what one process raises for a reason of its own; the others end because of it. So they do for everything else, but that may be
            a collective that failed because another process has ended: the watch, which knows which, is given time to say so first.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    watch = PeerMonitor()
    try:
        yield
    except together:
        watch.leave()
        raise
    except Exception as error:
        if not isinstance(error, alone):
            time.sleep(3)
        watch.leave(first_line(error))
        raise
    watch.leave()


def own_addresses() -> list[str]:
    """Where the other machines may find this one, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it only chooses the way out
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    return [*found, socket.gethostname(), "localhost"]


def connect(addresses: list[str], port: int) -> socket.socket | None:
    """A connection to the first address that answers, or None."""
    for address in addresses:
        try:
            line = socket.create_connection((address, port), timeout=5)
        except OSError:
            continue
        line.settimeout(None)
        return line
    return None


def keep_alive(line: socket.socket) -> None:
    """Waits without end on this line, while the system asks from time to time whether the other side is still there."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(line: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message. That the other side has ended is for whoever reads from it to notice."""
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(message).encode() + b"\n")


def receive(line: socket.socket) -> dict[str, Any]:
    """The next message; empty when the other side has ended."""
    data = b""
    try:
        while not data.endswith(b"\n"):
            if not (byte := line.recv(1)):
                return {}
            data += byte
        return dict(json.loads(data))
    except (OSError, ValueError):
        return {}


def closed(line: socket.socket) -> bool:
    """Whether the other side has closed its end."""
    try:
        return line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
