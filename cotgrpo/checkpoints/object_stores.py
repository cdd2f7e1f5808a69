"""Folders on disks and in buckets: open one, check that it works, keep library tracebacks out of the log."""

from __future__ import annotations

import atexit
import functools
import glob
import hashlib
import importlib.util
import logging
import shutil
import sys
import tempfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from cotgrpo.disk_errors import CheckpointError, first_line

if TYPE_CHECKING:
    from typing import TypeAlias

    from etils import epath

    Folder: TypeAlias = Path | epath.Path

LOGGERS = ("absl", "gcsfs", "s3fs")
"""Loggers of the storage libraries. Orbax logs through absl's."""


def open_folder(name: str | PurePath) -> Folder:
    """Return the folder of that name: a `pathlib.Path`, or an `epath.Path` for gs://. Nothing is read or created.

    Raises:
        CheckpointError: Orbax cannot write to this kind of storage, or the library for it is not installed.
    """
    scheme, found, _ = str(name).partition("://")
    if not found:
        return Path(name).absolute()
    if scheme != "gs":
        raise CheckpointError(
            f"{name}: Orbax writes checkpoints to disks and gs:// buckets, and not to {scheme}://. "
            "Name it as checkpoint.folder of a run, which keeps a copy on its disk, and name that folder here."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise CheckpointError(f"{name}: gs:// needs a library: pip install gcsfs.")
    from etils import epath

    return epath.Path(name)


def for_orbax(folder: Folder) -> Folder:
    """Return a path that Orbax may use for the folder, which must exist.

    Orbax expands its paths as patterns when it saves. A folder with a character of a pattern in its name, such as
    `runs/a[1]`, gets a symbolic link in this process's own temporary folder.
    """
    if is_remote(folder) or glob.escape(str(folder)) == str(folder):
        return folder
    link = link_folder() / hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    if not link.is_symlink():  # a long run's temporary files may be swept away
        link.parent.mkdir(mode=0o700, exist_ok=True)
        link.symlink_to(folder, target_is_directory=True)
    return link


@functools.cache
def link_folder() -> Path:
    """Return this process's folder of symbolic links, which is removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="cotgrpo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_remote(path: str | PurePath) -> bool:
    """Return whether a path is in a bucket."""
    return "://" in str(path)


def needs_copy(name: str | PurePath) -> bool:
    """Return whether Orbax cannot write to this storage, so that `ObjectStoreCopy` has to."""
    return is_remote(name) and not str(name).startswith("gs://")


def check_folder_works(folder: Folder) -> None:
    """Create the folder if needed, then write and delete a file in it, so that a run fails before it trains.

    Raises:
        CheckpointError: the folder cannot be reached, read or written.
    """
    probe = folder / ".cotgrpo_probe"
    try:
        if not is_remote(folder):  # a bucket has no folders, and a client might create a missing bucket
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("a run checks that it can write here")
        probe.unlink()
    except Exception as error:  # cloud clients raise exceptions of their own
        raise CheckpointError(
            f"{folder}: checkpoints cannot be kept there ({first_line(error)}). "
            "Check the name, and that this machine may read and write it."
        ) from error


@functools.cache
def shorten_logs() -> None:
    """Log the errors of storage libraries as one line each, for the rest of the process.

    The error itself is raised and reported once. Threads of the libraries may log after that.
    """

    def shorten(record: logging.LogRecord) -> bool:
        # Orbax writes tracebacks of its threads into messages too.
        record.msg, record.args, record.exc_info = record.getMessage().partition("\n")[0], (), None
        return True

    for name in LOGGERS:
        logging.getLogger(name).addFilter(shorten)
    others = sys.unraisablehook

    def unraisable(raised: sys.UnraisableHookArgs) -> None:
        # After a failed write Orbax closes its event loop, and TensorStore still reports each array of it to that loop.
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
            others(raised)

    sys.unraisablehook = unraisable
