"""Atomic file writes: write a temporary file, then rename it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotgrpo.disk_errors import CheckpointError, explain_disk_errors


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends. After an error `path` is unchanged.

    The file and its new name are on disk when the block has ended.

    Raises:
        CheckpointError: the disk is full, the file cannot be written for another reason of the disk, or the path is a
            device or a pipe.
    """
    if is_special(path):
        raise CheckpointError(f"{path} is a device, pipe or socket: expected a file, or a name that is free.")
    temporary = path.with_name(f"{path.name}.tmp")
    with explain_disk_errors(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`, which must be missing or empty, when the block ends.

    After an error `folder` is unchanged, and the temporary folder is gone. The files are on disk when the block has
    ended.

    Raises:
        CheckpointError: as `whole_file` does.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with explain_disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. File systems that cannot tell are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8. Raises OSError for a device or a pipe too: reading one may never end."""
    if is_special(path) and not path.is_relative_to("/dev/fd"):  # of a shell: --config <(command)
        raise OSError(errno.EINVAL, "a device, pipe or socket, not a file", str(path))
    return path.read_text(encoding="utf-8")


def is_special(path: Path) -> bool:
    """Return whether a path is a device, a pipe or a socket."""
    return path.exists() and not (path.is_file() or path.is_dir())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(read_text(path))


def find_json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file that can be made again; None if it is missing, cut off or anything else."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
