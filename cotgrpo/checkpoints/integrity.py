"""Checksums of a checkpoint's files, written when it is saved and compared before it is read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cotgrpo.checkpoints.object_stores import is_remote
from cotgrpo.disk_errors import first_line

if TYPE_CHECKING:
    from cotgrpo.checkpoints.object_stores import Folder

CHECKSUMS = "checksums.json"
COMMITTED = "commit_success.txt"
"""Orbax's success marker. A checkpoint in a bucket counts only with it; on a disk the folder's name is enough."""


def files_below(folder: Folder) -> Iterator[Folder]:
    """Yield every file in the subfolders of `folder`, recursively, sorted by name."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from (below for below in sorted(path.iterdir()) if below.is_file())
            yield from files_below(path)


def write_checksums(folder: Folder) -> None:
    """Write `checksums.json`: `{path: [size, CRC-32]}` of every file in the subfolders of `folder`."""
    text = json.dumps({str(path.relative_to(folder)): checksum(path) for path in files_below(folder)}, indent=1)
    if is_remote(folder):
        (folder / CHECKSUMS).write_text(text)
        return
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Folder) -> str | None:
    """Compare a checkpoint's files with its `checksums.json`. Return the first problem, or None."""
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


def checksum(path: Folder) -> list[int | None]:
    """Return [size, CRC-32] of a file.

    In a bucket only the size is compared: the bucket has checksums of its own, and reading every file takes long.
    """
    if is_remote(path):
        return [path.stat().length, None]  # type: ignore[union-attr]  # an epath.Path
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
