"""Explain files that cannot be written or read, and shorten the errors of storage libraries to one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath

FULL = "make room"
ELSEWHERE = "or choose another folder,"
REASONS = {
    errno.ENOSPC: ("The disk is full", FULL),
    errno.EDQUOT: ("The disk quota is used up", FULL),
    errno.EFBIG: ("A file would pass the limit on its size (ulimit -f)", "raise the limit"),
    errno.EROFS: ("The file system is read-only", f"mount it for writing, {ELSEWHERE}"),
    errno.EACCES: ("Permission denied", f"allow this user to read and write there, {ELSEWHERE}"),
    errno.EPERM: ("Operation not permitted", f"allow this user to write there, {ELSEWHERE}"),
    errno.EIO: ("The disk reports an input/output error", f"check the disk, {ELSEWHERE}"),
    errno.ESTALE: ("The network file system has lost a file", f"mount it again, {ELSEWHERE}"),
    errno.ENOENT: ("A file or folder is missing", "put it back"),
    errno.EISDIR: ("A folder is in the place of a file", "move it away"),
    errno.ENOTDIR: ("A file is in the place of a folder", "move it away"),
    errno.EEXIST: ("A file is in the place of a folder", "move it away"),
    errno.ENOTEMPTY: ("A folder is not empty", "move it away"),
    errno.ENAMETOOLONG: ("A name is too long", "choose a shorter one"),
    errno.ELOOP: ("A symbolic link leads back to itself", "remove it"),
    errno.EMFILE: ("Too many files are open (ulimit -n)", "raise the limit"),
    errno.ENFILE: ("Too many files are open on this machine", "close some"),
}
"""errno -> what has happened, and what to do."""
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)
"""Errors that are about one path, which may be another than the file that is written."""


class CheckpointError(RuntimeError):
    """Raised when a run's files cannot be written or read. The message names the file and the fix."""


@contextlib.contextmanager
def explain_disk_errors(path: PurePath | None = None) -> Iterator[None]:
    """Turn an error of the disk into a CheckpointError that names the file and says what to do.

    Args:
        path: what is written. Paths in a bucket are left alone: their client explains its own errors. None: the error
            names the file, which is read or written.
    """
    try:
        yield
    except Exception as error:
        is_own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
        found = None if is_own or (path is not None and not isinstance(path, Path)) else find_disk_error(error)
        if found is None:
            raise
        raise CheckpointError(describe(*found, path if isinstance(path, Path) else None)) from error


def find_disk_error(error: BaseException | None) -> tuple[int, OSError | None] | None:
    """Return the errno of a disk's error, and the error that has it; None if an error has nothing to do with a disk.

    Libraries wrap the error and keep only its text, so the text counts too.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in REASONS:
            return error.errno, error
        for number in REASONS:
            if not isinstance(error, OSError) and os.strerror(number).lower() in str(error).lower():
                return number, None
        error = error.__cause__ or error.__context__
    return None


def describe(number: int, error: OSError | None, path: Path | None) -> str:
    """Return what has happened, to which file, and what to do."""
    reason, fix = REASONS[number]
    # Of a rename, the second name is the one that a user knows.
    names = [] if error is None else [Path(os.fsdecode(n)) for n in (error.filename2, error.filename) if is_path(n)]
    in_the_way = names if number in IN_THE_WAY else []
    named = next((name for name in in_the_way if name.exists() and name != path), path) or next(iter(names), None)
    failed = "could not be written" if path is not None else "could not be read or written"
    free = f" ({free_bytes(named) / 1e6:.1f} MB free)" if fix == FULL and named is not None else ""
    return (
        f"{reason}: {named or 'a file'} {failed}{free}. Earlier files are intact: {fix} and run the same command again."
    )


def is_path(name: object) -> bool:
    """Return whether an error's file is named, and not a descriptor."""
    return isinstance(name, (str, bytes, os.PathLike))


def free_bytes(path: Path) -> int:
    """Return the free space of the disk that a path, which may not exist, is on; 0 if nobody can tell."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def first_line(error: BaseException, width: int = 160) -> str:
    """Return the error's type and the first line of its message, cut to `width`."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:width]}"
