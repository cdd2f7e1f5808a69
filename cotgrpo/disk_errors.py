"""Explain a full disk, and shorten the errors of storage libraries to one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath


class CheckpointError(RuntimeError):
    """Raised when a run's files cannot be written or read. The message names the file and the fix."""


@contextlib.contextmanager
def explain_disk_errors(path: PurePath) -> Iterator[None]:
    """Turn a full disk into a CheckpointError that names `path` and the free space.

    Paths in a bucket are left alone: their client explains its own errors.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(path, Path) or not is_disk_full(error):
            raise
        folder = path if path.is_dir() else path.parent
        free = shutil.disk_usage(folder).free / 1e6
        raise CheckpointError(
            f"The disk is full: {path} could not be written ({free:.1f} MB free). Earlier checkpoints are intact: "
            "make room and run the same command again."
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or one that caused it, is ENOSPC or EDQUOT.

    Libraries wrap the error and keep only its text, so the text counts too.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException, width: int = 160) -> str:
    """Return the error's type and the first line of its message, cut to `width`."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:width]}"
