"""The lock of a folder that one run writes: held by the kernel, with a record of who holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotgrpo.disk_errors import CheckpointError, explain_disk_errors

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 10.0
"""The holder renews the time of the record this often."""
STALE_SECONDS = 60.0
"""A record of another host that is older than this counts no more."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks. There the record decides."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while the block runs. The folder is created if needed.

    The lock is `flock` on `folder/.lock`, which ends with its process, however that ends. The file says who holds it:
    host, process id, command and time. Where a file system does not pass locks on between hosts, that record counts as
    long as its holder renews it.

    Raises:
        CheckpointError: another process holds the lock, or the folder cannot be written.
    """
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} is a file: expected a folder, or a name that is free.") from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}). Choose another folder.") from error
    done = threading.Event()
    try:
        take(descriptor, path)
        with explain_disk_errors(path):
            write_record(path)
        keeper = threading.Thread(target=keep_fresh, args=(path, done), name="run lock", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            if is_new and os.listdir(folder) == [LOCK_FILE]:  # nothing was written
                path.unlink()
                folder.rmdir()
    finally:
        os.close(descriptor)


def take(descriptor: int, path: Path) -> None:
    """Lock an open file. Raises CheckpointError, naming the holder, if another process has locked it."""
    import fcntl

    holder = read_record(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = is_fresh_elsewhere(path, holder)
    except OSError as error:
        held = error.errno not in NO_LOCKS or is_alive(holder) or is_fresh_elsewhere(path, holder)
    if held:
        raise CheckpointError(
            f"{path.parent} is in use by {describe(holder)}. Wait for it to end, stop it, or choose another folder. "
            f"If that process is gone, this works again {STALE_SECONDS:.0f} s after its end."
        )


def write_record(path: Path) -> None:
    """Write who holds the lock, in place: another file of this name would have a lock of its own."""
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with open(path, "r+", encoding="utf-8") as file:
        file.truncate()
        file.write(json.dumps(record))


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of the holder; empty if there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def keep_fresh(path: Path, done: threading.Event) -> None:
    """Renew the time of the record until the lock is given back."""
    while not done.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def is_fresh_elsewhere(path: Path, holder: dict[str, Any]) -> bool:
    """Return whether a process of another host has renewed its record just now."""
    if holder.get("host") in (None, socket.gethostname()):
        return False
    try:
        return abs(time.time() - path.stat().st_mtime) < STALE_SECONDS
    except OSError:
        return False


def is_alive(holder: dict[str, Any]) -> bool:
    """Return whether the record's process runs on this host."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def describe(holder: dict[str, Any]) -> str:
    """Return the holder of a lock in words."""
    if not holder:
        return "another process"
    return (
        f"process {holder.get('pid')} on {holder.get('host')} (`{holder.get('command')}`, since {holder.get('since')})"
    )
