"""A disk that fails: one operation on the files below a folder raises, in the middle of what the package does.

Only files that Python writes are reached. What Orbax, safetensors and tokenizers write themselves needs a real limit
(`resource.RLIMIT_FSIZE`), or a path that is in the way.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
CALLS = ("mkdir", "replace", "rename", "truncate", "fsync", "unlink", "rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


class FaultyDisk:
    """Counts what is written below `root`. The operations that `fails` selects raise. Use as a context manager.

    Args:
        root: the folder.
        fails: `fails(number, what, path)`: the number of the operation from 0; "open", "write" or a function of `os`;
            and the file.
        number: the errno.

    Attributes:
        seen: all operations, as `(what, path)`.
        failed: those that raised.
    """

    def __init__(
        self, root: Path, fails: Callable[[int, str, Path], bool] = lambda *_: False, number: int = errno.ENOSPC
    ) -> None:
        self.root, self.fails, self.number = root.absolute(), fails, number
        self.seen: list[tuple[str, Path]] = []
        self.failed: list[tuple[str, Path]] = []
        self.patch = pytest.MonkeyPatch()
        self.open, self.os_open = builtins.open, os.open

    def __enter__(self) -> FaultyDisk:
        for module in (builtins, io):
            self.patch.setattr(module, "open", self.opened)
        self.patch.setattr(os, "open", self.os_opened)
        for name in CALLS:
            self.patch.setattr(os, name, self.checked(name, getattr(os, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.patch.undo()

    def check(self, what: str, file: Any) -> None:
        """Count an operation, and raise if it is to fail."""
        if isinstance(file, int):
            try:
                file = os.readlink(f"/proc/self/fd/{file}")
            except OSError:
                return
        if not isinstance(file, (str, os.PathLike)) or not (path := Path(file).absolute()).is_relative_to(self.root):
            return
        self.seen.append((what, path))
        if self.fails(len(self.seen) - 1, what, path):
            self.failed.append((what, path))
            raise OSError(self.number, os.strerror(self.number), *(() if what in ("write", "fsync") else (str(path),)))

    def checked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of `os` that checks the path, or the open file, that it changes."""

        def checked_call(file: Any, *rest: Any, **options: Any) -> Any:
            if not options.get("dir_fd") and not (name == "mkdir" and os.path.isdir(file)):
                self.check(name, rest[0] if name in ("replace", "rename") else file)
            return call(file, *rest, **options)

        return checked_call

    def os_opened(self, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & WRITING:
            self.check("open", path)
        return self.os_open(path, flags, *rest, **options)

    def opened(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        """`open`, with a raw file below the buffers whose writes are checked."""
        inside = isinstance(file, (str, os.PathLike)) and Path(file).absolute().is_relative_to(self.root)
        if not inside or not set(mode) & set("wax+"):
            return self.open(file, mode, buffering, *rest, **options)
        self.check("open", file)
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> Any:
                disk.check("write", file)
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                disk.check("truncate", file)
                return super().truncate(size)

        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)
