"""Copy checkpoints to and from object stores that Orbax cannot write to, such as S3.

Orbax writes to disks and to gs:// buckets only. For every other store that fsspec has a client for, checkpoints are
written to the run's disk first. Then they are copied file by file. A copy counts when it holds the success marker,
which is written last.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotgrpo.checkpoints.integrity import COMMITTED, find_damage
from cotgrpo.disk_errors import CheckpointError, first_line


class ObjectStoreCopy:
    """The copy of a folder of checkpoints in an object store. Only process 0 calls its methods.

    Args:
        folder: the checkpoints on a disk, `folder/<step>/`.
        url: where the copies go, `url/<step>/`: `s3://bucket/path`, or another store that fsspec knows. The store's
            client finds the credentials, and the endpoint of a store that is not AWS (`AWS_ENDPOINT_URL`).
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url.rstrip("/")

    @functools.cached_property
    def client_and_root(self) -> tuple[Any, str]:
        """The fsspec client, and the path of the copies in its store. Raises CheckpointError without a client."""
        import fsspec

        try:
            store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
            return store, root.rstrip("/")
        except (ImportError, ValueError) as error:
            library = "pip install s3fs" if self.url.startswith("s3://") else "install fsspec's client for it"
            raise CheckpointError(
                f"{self.url}: no library here reads and writes such a store ({first_line(error)}): {library}, or mount "
                "it as a folder of this machine and name that folder."
            ) from error

    @property
    def store(self) -> Any:
        return self.client_and_root[0]

    def path_of(self, step: int) -> str:
        """Return the path of a step's copy."""
        return f"{self.client_and_root[1]}/{step}"

    def steps(self) -> list[int]:
        """Return the steps of the complete copies, newest first."""
        with self.explain("read"):
            try:
                paths = self.store.ls(self.client_and_root[1], detail=False)
            except FileNotFoundError:  # a store has no empty folders
                return []
            names = [path.rstrip("/").rpartition("/")[2] for path in paths]
            return sorted((int(name) for name in names if name.isdigit() and self.is_whole(int(name))), reverse=True)

    def is_whole(self, step: int) -> bool:
        return bool(self.store.exists(f"{self.path_of(step)}/{COMMITTED}"))

    def check_works(self) -> None:
        """Write and delete a file in the store, so that a run fails before it trains. Raises CheckpointError."""
        with self.explain("written"):
            probe = f"{self.client_and_root[1]}/.cotgrpo_probe"
            self.store.pipe_file(probe, b"a run checks that it can write here")
            self.store.rm_file(probe)

    def push(self, source: Path, step: int, kept: set[int]) -> None:
        """Copy the checkpoint in the folder `source`. Then delete the copies of all steps except `kept` and this one.

        Raises:
            CheckpointError: the store cannot be reached, read or written.
        """
        with self.explain(f"written: checkpoint {step} is not there"):
            target = self.path_of(step)
            self.delete(step)  # a process that died may have left half of one
            files = [path for path in sorted(source.rglob("*")) if path.is_file() and path != source / COMMITTED]
            self.store.put([str(path) for path in files], [f"{target}/{path.relative_to(source)}" for path in files])
            self.store.pipe_file(f"{target}/{COMMITTED}", b"whole")
            for old in set(self.steps()) - kept - {step}:
                self.delete(old)

    def pull(self, *, newest_only: bool) -> None:
        """Copy to the disk what it lacks.

        A copy that arrives damaged is left out, and no longer counts.

        Args:
            newest_only: copy the newest undamaged checkpoint only, and nothing if the disk has it or a newer one.

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
        """Copy one checkpoint to a temporary folder, then rename it. Return whether it arrived undamaged."""
        arriving = self.folder.parent / "fetching"
        shutil.rmtree(arriving, ignore_errors=True)
        with self.explain(f"read: checkpoint {step} did not arrive"):
            source = self.path_of(step)
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
        """Delete the copy of a step, its success marker first. A missing copy is not an error."""
        with contextlib.suppress(FileNotFoundError):
            self.store.rm_file(f"{self.path_of(step)}/{COMMITTED}")
        with contextlib.suppress(FileNotFoundError):
            self.store.rm(self.path_of(step), recursive=True)

    @contextlib.contextmanager
    def explain(self, what: str) -> Iterator[None]:
        """Turn the exceptions of the store's client into a CheckpointError of one line."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.url} cannot be {what} ({first_line(error)}). "
                "Check the name, and that this machine may read and write it."
            ) from error
