"""The port that the processes of a run meet at: any bytes from anybody change nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cotgrpo.distributed import peer_monitor
from cotgrpo.distributed.peer_monitor import PeerMonitor, receive, send

TOKEN = "0123456789abcdef"
HOSTILE = [
    b"[1]\n",
    b"null\n",
    b"1\n",
    b'"x"\n',
    b"{}\n",
    b"\n",
    b"",
    b"\xff\xfe\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 4000 + b"\n",
    b"x" * 10_000,
    json.dumps({"token": TOKEN, "id": "1", "name": "x"}).encode() + b"\n",
    json.dumps({"token": TOKEN, "id": 99, "name": "x"}).encode() + b"\n",
    json.dumps({"token": TOKEN, "id": 0, "name": "x"}).encode() + b"\n",
    json.dumps({"token": TOKEN, "id": 1}).encode() + b"\n",
    json.dumps({"token": [TOKEN], "id": 1, "name": "x"}).encode() + b"\n",
]


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PeerMonitor, int]]:
    """Process 0 of three, watching in a thread, and its port."""
    monkeypatch.setattr(peer_monitor, "HELLO_SECONDS", 0.5)
    made = PeerMonitor.__new__(PeerMonitor)
    made.id, made.count, made.names, made.peers, made.gone, made.leaving = 0, 3, {0: "here"}, {}, set(), False
    monkeypatch.setattr(made, "end", lambda who, because: None)
    with socket.create_server(("localhost", 0)) as listener:
        threading.Thread(target=made.watch_others, args=(listener, TOKEN), daemon=True).start()
        yield made, int(listener.getsockname()[1])
        made.leaving = True  # what the thread reads from here on ends nothing
        for connection in made.peers.values():
            connection.close()


def wait_for(count: int, monitor: PeerMonitor) -> None:
    until = time.monotonic() + 60
    while len(monitor.peers) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(monitor.peers) == count


def test_any_bytes_are_survived(monitor: tuple[PeerMonitor, int]) -> None:
    watching, port = monitor
    for sent in HOSTILE:
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(sent)
    silent = socket.create_connection(("localhost", port))
    with silent, socket.create_connection(("localhost", port)) as peer:
        send(peer, {"token": TOKEN, "id": 1, "name": "one"})
        wait_for(1, watching)
        assert watching.names[1] == "one"
        with socket.create_connection(("localhost", port)) as second:  # the place is taken
            send(second, {"token": TOKEN, "id": 1, "name": "other"})
            assert receive(second) == {}
        assert watching.names[1] == "one"


def test_a_flood_keeps_nobody_out(monitor: tuple[PeerMonitor, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent connections, and more than are kept, while a process joins in pieces, and another at once."""
    watching, port = monitor
    monkeypatch.setattr(peer_monitor, "MOST_GUESTS", 20)
    monkeypatch.setattr(peer_monitor, "HELLO_SECONDS", 60)
    hello = json.dumps({"token": TOKEN, "id": 1, "name": "slow"}).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        connect = lambda: stack.enter_context(socket.create_connection(("localhost", port)))
        for number in range(50):
            connect().sendall(b"x" * number)
        slow = connect()
        for byte in hello[:-1]:
            slow.sendall(bytes([byte]))
        send(connect(), {"token": TOKEN, "id": 2, "name": "quick"})
        wait_for(1, watching)
        slow.sendall(hello[-1:])
        wait_for(2, watching)
        assert watching.names == {0: "here", 1: "slow", 2: "quick"}


def test_it_listens_where_it_must() -> None:
    """At loopback alone for one machine; else at the address of one interface."""
    assert peer_monitor.meeting_addresses(one_machine=True) == ["127.0.0.1"]
    assert peer_monitor.meeting_addresses(one_machine=False) == peer_monitor.own_addresses()
    for addresses, bound in ((["127.0.0.1"], "127.0.0.1"), (["192.0.2.77", "localhost"], "0.0.0.0")):
        with peer_monitor.listen(addresses, 2) as listener:
            assert listener.getsockname()[0] == bound


@pytest.mark.parametrize("sent", HOSTILE[:11])
def test_what_is_no_message_is_empty(sent: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(sent)
        left.shutdown(socket.SHUT_WR)
        assert receive(right) == {}


def test_a_slow_stranger_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b'{"a"')
        right.settimeout(0.05)
        assert receive(right, time.monotonic() + 0.1) == {}
