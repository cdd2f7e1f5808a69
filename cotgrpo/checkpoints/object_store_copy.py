"""Checkpoints in object stores that Orbax does not write to, S3 and its likes: each is written to a disk first, and from there copied by fsspec.

Orbax writes the arrays to disks and to gs:// alone. Of every other store that fsspec has a client for, the run's own folder of checkpoints is copied there
and back, file by file, whole or not at all: a copy counts when it holds the mark of success, which is written last.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotgrpo.storage import COMMITTED, CheckpointError, find_damage, first_line


class ObjectStoreCopy:
    """The copy of a folder of checkpoints in an object store. Of several processes the first alone calls its methods.

    Args:
        folder: the checkpoints on a disk, `folder/<step>/`.
        url: where their copies go, `url/<step>/`: `s3://bucket/path`, or of another store that fsspec knows. Credentials, and the endpoint of a store that is
            not AWS (`AWS_ENDPOINT_URL`), are found as its client finds them.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url.rstrip("/")

    @functools.cached_property
    def place(self) -> tuple[Any, str]:
        """The client that fsspec has for it, and the path of the copies there. Raises CheckpointError where it has none."""
        import fsspec

        try:
            store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
            return store, root.rstrip("/")
        except (ImportError, ValueError) as error:
            library = "pip install 'cotgrpo[s3]'" if self.url.startswith("s3://") else "install fsspec's client for it"
            raise CheckpointError(
                f"{self.url}: no library here reads and writes such a store ({first_line(error)}): {library}, or mount it as a folder "
                "of this machine and name that folder."
            ) from error

    @property
    def store(self) -> Any:
        return self.place[0]

    def copy_of(self, step: int) -> str:
        """The path of a step's copy."""
        return f"{self.place[1]}/{step}"

    def steps(self) -> list[int]:
        """The steps of the whole copies, newest first."""
        with self.explained("read"):
            try:
                paths = self.store.ls(self.place[1], detail=False)
            except FileNotFoundError:  # a store has no empty folders
                return []
            names = [path.rstrip("/").rpartition("/")[2] for path in paths]
            return sorted((int(name) for name in names if name.isdigit() and self.is_whole(int(name))), reverse=True)

    def is_whole(self, step: int) -> bool:
        return bool(self.store.exists(f"{self.copy_of(step)}/{COMMITTED}"))

    def check_works(self) -> None:
        """Writes and deletes a file there, so that a run does not learn at its first checkpoint that it cannot. Raises CheckpointError."""
        with self.explained("written"):
            probe = f"{self.place[1]}/.cotgrpo_probe"
            self.store.pipe_file(probe, b"a run looks whether it can write here")
            self.store.rm_file(probe)

    def push(self, source: Path, step: int, kept: set[int]) -> None:
        """Copies the checkpoint in the folder `source`, and then deletes the copies of all steps but those `kept` and this one.

        Raises:
            CheckpointError: the store cannot be reached, read or written.
        """
        with self.explained(f"written: checkpoint {step} is not there"):
            target = self.copy_of(step)
            self.delete(step)  # half of one, of a process that died
            files = [path for path in sorted(source.rglob("*")) if path.is_file() and path != source / COMMITTED]
            self.store.put([str(path) for path in files], [f"{target}/{path.relative_to(source)}" for path in files])
            self.store.pipe_file(f"{target}/{COMMITTED}", b"whole")
            for old in set(self.steps()) - kept - {step}:
                self.delete(old)

    def pull(self, *, newest_only: bool) -> None:
        """Copies to the disk what it lacks: all whole copies, or the newest unless the disk has it, or a newer one. What arrives damaged is left out, and no longer counts.

        Raises:
            CheckpointError: the store cannot be reached or read.
        """
        here = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
        for step in self.steps():
            if newest_only and step <= max(here, default=-1):
                return
            if step not in here and self.fetch(step) and newest_only:
                return

    def fetch(self, step: int) -> bool:
        """Copies one checkpoint to the disk, beside its place and then into it; whether it arrived undamaged."""
        arriving = self.folder.parent / "fetching"
        shutil.rmtree(arriving, ignore_errors=True)
        with self.explained(f"read: checkpoint {step} did not arrive"):
            source = self.copy_of(step)
            files = [path for path in self.store.find(source) if path != f"{source}/{COMMITTED}"]
            targets = [arriving / Path(path).relative_to(source) for path in files]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            self.store.get(files, [str(target) for target in targets])
            if find_damage(arriving) is not None:
                self.store.rm_file(f"{source}/{COMMITTED}")
                shutil.rmtree(arriving)
                return False
        self.folder.mkdir(parents=True, exist_ok=True)
        arriving.rename(self.folder / str(step))
        return True

    def delete(self, step: int) -> None:
        """Deletes the copy of a step, its mark of success first; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.store.rm_file(f"{self.copy_of(step)}/{COMMITTED}")
        with contextlib.suppress(FileNotFoundError):
            self.store.rm(self.copy_of(step), recursive=True)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turns what the store's client raises, which has its own kinds, into a line."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.url} cannot be {what} ({first_line(error)}). Check the name, and that this machine may read and write it."
            ) from error
