"""A connection from every process to process 0, so that none of them waits for one that has ended.

A collective over several machines never returns when one of them is missing. The operating system closes the
connections of a process however it ends, kill -9 included. It notices a lost machine by keep-alives without an answer.
Then every other process prints which one ended, and ends too.

JAX's own heartbeats take longer and do not name the host. They remain for a process that hangs, and for machines with a
firewall between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cotgrpo.disk_errors import first_line
from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.terminal import complain

OTHER_ENDED = 4
"""The exit code of a process that ended because another one did."""

HELLO_SECONDS = 10.0
"""A process introduces itself within this time."""
LONGEST_MESSAGE = 4096
"""Bytes."""
MOST_GUESTS = 256
"""Connections that have not introduced themselves. The oldest is closed for one more."""

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before the first probe, seconds between probes, and probes without an answer.

Together a lost machine is noticed after 30 s.
"""


@dataclasses.dataclass
class Guest:
    """A connection that has not introduced itself: how long it may take, and what it has said."""

    until: float
    said: bytes = b""


class PeerMonitor:
    """Watches the processes of this run in a thread of its own, until `leave`.

    Every process makes one at the same point.
    """

    def __init__(self) -> None:
        self.id, self.count = jax.process_index(), jax.process_count()
        self.names = {self.id: f"{socket.gethostname()}, pid {os.getpid()}"}
        self.peers: dict[int, socket.socket] = {}  # process 0: to every other one; the others: to process 0
        self.gone: set[int] = set()
        self.leaving = False
        at = meeting_addresses(on_one_machine())
        listener = listen(at, self.count) if is_process_0() else None
        port = listener.getsockname()[1] if listener is not None else 0
        here = {"at": at, "port": port, "token": secrets.token_hex(8)}
        meeting: dict[str, Any] = on_process_0(lambda: here | self.about())
        if listener is not None:
            self.start(self.watch_others, listener, meeting["token"])
            return
        self.names[0] = meeting["name"]
        connection = connect(meeting["at"], meeting["port"])
        if connection is None:
            complain(
                f"process {self.id} does not reach process 0 ({self.names[0]}) at port {meeting['port']}. "
                "The run continues, but if a process ends, the others end later and without its name: open the ports "
                "between the machines."
            )
            return
        self.peers[0] = connection
        send(connection, {"token": meeting["token"], "id": self.id} | self.about())
        self.start(self.watch_process_0, connection)

    def start(self, work: Callable[..., None], *arguments: object) -> None:
        """Run `work` in a thread."""
        threading.Thread(target=work, args=arguments, name="watch", daemon=True).start()

    def about(self) -> dict[str, Any]:
        """Return what a process sends about itself."""
        return {"name": self.names[self.id]}

    def watch_others(self, listener: socket.socket, token: str) -> None:
        """Accept the others' connections on process 0, and read them until one closes without a goodbye."""
        guests: dict[socket.socket, Guest] = {}  # the oldest first
        listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=1):
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is listener:
                        self.admit(listener, guests, selector)
                    elif connection in guests:
                        self.welcome(connection, guests, token, selector)
                    else:
                        self.hear(connection, key.data, selector)
                now = time.monotonic()
                late = [connection for connection, guest in guests.items() if guest.until < now]
                for connection in [*late, *list(guests)[: max(len(guests) - MOST_GUESTS, 0)]]:
                    if guests.pop(connection, None) is not None:
                        selector.unregister(connection)
                        connection.close()

    def admit(
        self, listener: socket.socket, guests: dict[socket.socket, Guest], selector: selectors.BaseSelector
    ) -> None:
        """Accept one connection. Anybody may connect, so nothing here waits for what it sends."""
        try:
            connection, _ = listener.accept()
        except OSError:  # it was closed again at once
            time.sleep(0.01)
            return
        connection.setblocking(False)
        guests[connection] = Guest(time.monotonic() + HELLO_SECONDS)
        selector.register(connection, selectors.EVENT_READ)

    def welcome(
        self,
        connection: socket.socket,
        guests: dict[socket.socket, Guest],
        token: str,
        selector: selectors.BaseSelector,
    ) -> None:
        """Read on what a connection says first, and keep it if it is that of a process of this run."""
        guest = guests[connection]
        try:
            data = connection.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        guest.said += data
        if data and b"\n" not in guest.said and len(guest.said) <= LONGEST_MESSAGE:
            return
        del guests[connection]
        selector.unregister(connection)
        hello = parse_message(guest.said)
        who, name = hello.get("id"), hello.get("name")
        if not isinstance(who, int) or not isinstance(name, str) or hello.get("token") != token:
            connection.close()
            return
        if not 0 < who < self.count or who in self.peers:
            connection.close()
            return
        keep_alive(connection)
        self.peers[who], self.names[who] = connection, name
        selector.register(connection, selectors.EVENT_READ, who)

    def hear(self, connection: socket.socket, who: int, selector: selectors.BaseSelector) -> None:
        """Read the last words of another process, and end if it has ended without a goodbye."""
        selector.unregister(connection)
        self.gone.add(who)
        with connection:
            goodbye = receive(connection)
        if not goodbye.get("done"):
            self.end(who, goodbye.get("because"))

    def watch_process_0(self, connection: socket.socket) -> None:
        """Wait for a message from process 0, or for its end."""
        with connection:
            keep_alive(connection)
            message = receive(connection)
        if not message.get("done"):
            self.names[message.get("id", 0)] = message.get("name", self.names[0])
            self.end(message.get("id", 0), message.get("because"))

    def end(self, who: int, because: str | None) -> None:
        """End this process because process `who` has ended."""
        if self.leaving:  # for a reason of its own
            return
        if self.id == 0:
            self.tell({"id": who, "name": self.names[who], "because": because})
        reason = because or "it was killed, or its machine is gone"
        complain(
            f"process {who} of {self.count} ({self.names[who]}) has ended: {reason}. "
            "The others end with it. Start all of them again to resume from the last checkpoint."
        )
        sys.stderr.flush()
        os._exit(OTHER_ENDED)

    def leave(self, because: str | None = None) -> None:
        """Say goodbye. With a reason, the other processes end too."""
        self.leaving = True
        if because is not None:
            time.sleep(1)  # processes with the same error report it themselves
        self.tell({"done": because is None, "id": self.id, "because": because} | self.about())

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all. Process 0 gives the others time to read it, since JAX ends them with it."""
        for connection in self.peers.values():
            send(connection, message)
        until = time.monotonic() + 5
        while self.id == 0 and not message.get("done") and self.peers.keys() - self.gone and time.monotonic() < until:
            time.sleep(0.05)
            self.gone |= {who for who in self.peers.keys() - self.gone if closed(self.peers[who])}


@contextlib.contextmanager
def watch_peers(together: tuple[type[Exception], ...], alone: tuple[type[Exception], ...]) -> Iterator[None]:
    """Watch the processes while the block runs. With one process it does nothing.

    Args:
        together: exceptions that all processes raise at the same point. They end as if nothing had been raised.
        alone: exceptions that one process raises for a reason of its own. The others end because of it. Any other
            exception ends them too. But it may come from a collective that failed because another process has ended, so
            the monitor is given time to name that process first.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    monitor = PeerMonitor()
    try:
        yield
    except together:
        monitor.leave()
        raise
    except Exception as error:
        if not isinstance(error, alone):
            time.sleep(3)
        monitor.leave(first_line(error))
        raise
    monitor.leave()


def on_one_machine() -> bool:
    """Return whether all processes share the network of one machine. Every process calls it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/net")]
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32("\n".join(parts).encode())))
    return len(np.unique(np.asarray(found))) == 1


def meeting_addresses(one_machine: bool) -> list[str]:
    """Return where the others find process 0, and it listens at the first: loopback, or the way to other machines."""
    return ["127.0.0.1"] if one_machine else own_addresses()


def listen(addresses: list[str], backlog: int) -> socket.socket:
    """Return a listener at the first address alone, or at all of this machine if that is not one of its own."""
    try:
        return socket.create_server((addresses[0], 0), backlog=backlog)
    except OSError:
        return socket.create_server(("", 0), backlog=backlog)


def own_addresses() -> list[str]:
    """Return addresses where other machines may find this one, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: this only chooses the interface
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    return [*found, socket.gethostname(), "localhost"]


def connect(addresses: list[str], port: int) -> socket.socket | None:
    """Return a connection to the first address that answers, or None."""
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=5)
        except OSError:
            continue
        connection.settimeout(None)
        return connection
    return None


def keep_alive(connection: socket.socket) -> None:
    """Let reads wait without a limit, while the system probes whether the other side is still there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message. A closed connection is ignored here: its reader notices it."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket, until: float = math.inf) -> dict[str, Any]:
    """Return the next message; empty if the other side has ended, or sends anything but a message.

    Args:
        connection: to the other side.
        until: the time, by `time.monotonic`, after which nothing more is read.
    """
    data = b""
    try:
        while not data.endswith(b"\n"):
            if len(data) > LONGEST_MESSAGE or time.monotonic() > until or not (byte := connection.recv(1)):
                return {}
            data += byte
    except OSError:
        return {}
    return parse_message(data)


def parse_message(data: bytes) -> dict[str, Any]:
    """Return the message in a line; empty if it is anything else."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def closed(connection: socket.socket) -> bool:
    """Return whether the other side has closed its end."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
