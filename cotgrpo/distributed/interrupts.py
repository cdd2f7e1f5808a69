"""Ctrl-C and SIGTERM while a command runs: one line and an exit code, whatever the process is doing.

An exception that a handler raises inside the import of a C++ library, or inside a destructor, ends in a crash or is
lost. So the process ends where it is, which is as safe as kill -9. Two kinds of blocks do better: a training loop,
which saves first, and those of `raising`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Literal, TypeVar

from cotgrpo.terminal import complain, show_cursor

GRACE_SECONDS = {"end": 1.0, "raise": 5.0, "save": 1.0}
"""The main thread has this time to end by itself."""
LOOK_SECONDS = 0.1
"""How often a wait looks for a signal."""

T = TypeVar("T")


class StopRequested(RuntimeError):
    """Raised in place of a wait, if a signal has asked the training loop to save and end. Holds the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} while waiting")
        self.signal_number = number


class Stops:
    """The signals of this process that ask for its end.

    Attributes:
        received: the signal that ends it, or None.
        mode: what the first signal does: end the process, raise KeyboardInterrupt, or nothing here, since a loop saves.
        saving_for: the signal that a training loop has noted and will save for, or None.
        ending: held by the thread that ends the process.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.mode: Literal["end", "raise", "save"] = "end"
        self.saving_for: int | None = None
        self.ending = threading.RLock()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""
        if self.mode != "raise" or self.received is not None:
            self.end(number)
        self.received = number
        raise KeyboardInterrupt

    def watch(self, bell: int) -> None:
        """End the process if the main thread does not, which may be compiling. `bell` has a byte for each signal."""
        count = 0
        while number := os.read(bell, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            count += 1
            if count > 1 or self.mode != "save":
                time.sleep(GRACE_SECONDS[self.mode])
                self.end(number[0])

    def end(self, number: int) -> None:
        """End the process without any cleaning up, after one line."""
        self.received = number
        os._exit(self.say(number))

    def say(self, number: int) -> int:
        """Print that a signal has ended the command, and return the exit code. No other thread ends the process."""
        if self.received is not None:
            self.ending.acquire()  # never given back
        show_cursor()
        complain(f"stopped by {signal.Signals(number).name}. The same command goes on from what is saved.")
        return 128 + number

    def end_if_received(self, code: int) -> None:
        """End the process if a signal has stopped its command: what still runs in threads is not waited for."""
        if self.received is not None:
            os._exit(code)

    @contextlib.contextmanager
    def in_mode(self, mode: Literal["raise", "save"]) -> Iterator[None]:
        """Change what the first signal does while the block runs."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


STOPS = Stops()


def catch_signals() -> None:
    """Let SIGINT and SIGTERM end this process with one line. One that it was started to ignore stays ignored."""
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, STOPS.note)
    threading.Thread(target=STOPS.watch, args=(bell,), name="signals", daemon=True).start()


def saving_first() -> contextlib.AbstractContextManager[None]:
    """Leave the first signal to the block, which saves what it has before it ends."""
    return STOPS.in_mode("save")


def raising() -> contextlib.AbstractContextManager[None]:
    """Let the first signal raise KeyboardInterrupt in the block, which ends soon after."""
    return STOPS.in_mode("raise")


def wait_for(future: Future[T]) -> T:
    """Return the result of work in another thread.

    Raises:
        StopRequested: a signal has asked the training loop to end. The work goes on.
    """
    while not future.done():
        if STOPS.saving_for is not None:
            raise StopRequested(STOPS.saving_for)
        with contextlib.suppress(TimeoutError):
            future.exception(LOOK_SECONDS)
    return future.result()
