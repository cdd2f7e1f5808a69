"""The disks and buckets that a run is kept on: which can be used, whether they can be reached, whether they are full, and whether what they hold is what was written."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"

COMMITTED = "commit_success.txt"
"""Orbax's mark of a whole checkpoint, which is what counts in a bucket; a disk has the name of the folder."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names it and says what to do."""


def open_folder(name: str | Path) -> Any:
    """The folder of that name: a `pathlib.Path`, or for gs:// a path with the same methods. Nothing is read or made.

    Raises:
        CheckpointError: a kind of storage that checkpoints cannot be kept on, or a library for it that is not installed.
    """
    scheme, found, _ = str(name).partition("://")
    if not found:
        return Path(name).absolute()
    if scheme != "gs":
        raise CheckpointError(
            f"{name}: Orbax reads and writes checkpoints on disks and in gs:// buckets, and not in {scheme}://. Name it as checkpoint.folder of a run, "
            "which has a copy on its disk, and here that folder."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise CheckpointError(f"{name}: reading and writing gs:// needs a library: pip install 'cotgrpo[gcs]'.")
    from etils import epath

    return epath.Path(name)


def check_folder_works(folder: Any) -> None:
    """Makes the folder if need be, and writes and deletes a file in it, so that a run does not learn at its first checkpoint that it cannot.

    Raises:
        CheckpointError: it cannot be reached, read or written.
    """
    probe = folder / ".cotgrpo_probe"
    try:
        if not is_remote(folder):  # a bucket has no folders, and a client may make a bucket that is not there
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("a run looks whether it can write here")
        probe.unlink()
    except Exception as error:  # the client of a cloud raises its own kinds
        raise CheckpointError(
            f"{folder}: checkpoints cannot be kept there ({first_line(error)}). Check the name, and that this machine may read and write it."
        ) from error


def is_remote(path: Any) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


def files_below(folder: Any) -> Iterator[Any]:
    """Every file in the folders of `folder` and theirs, in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from (below for below in sorted(path.iterdir()) if below.is_file())
            yield from files_below(path)


def write_checksums(folder: Any) -> None:
    """Writes `checksums.json`: `{path: [size, CRC-32]}` of every file in the folders of `folder`."""
    text = json.dumps({str(path.relative_to(folder)): checksum(path) for path in files_below(folder)}, indent=1)
    if is_remote(folder):
        (folder / CHECKSUMS).write_text(text)
        return
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Any) -> str | None:
    """Compares a checkpoint's files with its `checksums.json`: the first that is missing or has changed, or None."""
    try:
        if not (folder / CHECKSUMS).exists():
            return f"{CHECKSUMS} is missing"
        for name, expected in json.loads((folder / CHECKSUMS).read_text()).items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if checksum(folder / name) != expected:
                return f"{name} has changed since it was written"
    except (ValueError, AttributeError, OSError) as error:
        return first_line(error)
    return None


def checksum(path: Any) -> list[int | None]:
    """[size, CRC-32] of a file. Of one in a bucket the size alone: the bucket keeps checksums of its own, and to read it all would take long."""
    if is_remote(path):
        return [path.stat().length, None]
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def is_mirrored(name: str | Path) -> bool:
    """Whether a place for checkpoints is one that Orbax does not write to (`cotgrpo.checkpoints.object_store_copy`)."""
    return is_remote(name) and not str(name).startswith("gs://")


class without_tracebacks:
    """A context in which libraries log the errors that they raise too in a line each: the error itself arrives, and is told once."""

    LOGGERS = ("absl", "gcsfs", "s3fs")  # Orbax logs by the first

    def __enter__(self) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).addFilter(self.shorten)

    def __exit__(self, *exception: Any) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).removeFilter(self.shorten)

    @staticmethod
    def shorten(record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True


class explaining_disk_errors:
    """A context in which a full disk becomes a message that says where, how full, and what to do."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and is_disk_full(error) and not is_remote(self.path):
            folder = self.path if self.path.is_dir() else self.path.parent
            free = shutil.disk_usage(folder).free / 1e6
            raise CheckpointError(
                f"The disk is full: {self.path} could not be written ({free:.1f} MB free). Earlier checkpoints are intact: "
                "make room and run the same command again."
            ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """True if the error, or one that caused it, is ENOSPC or EDQUOT; libraries wrap it and keep only its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException, width: int = 160) -> str:
    """The error's type and the first line of its message, cut to `width`."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:width]}"
