"""The rollouts that an engine wrote since the oldest checkpoint that is kept, so that a resumed run trains on the same.

An engine does not write the same replies twice. After a kill the run goes back to its newest checkpoint, and takes the
replies of the steps after it from here.
"""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np

from cotgrpo.atomic_files import whole_file

Arrays = dict[str, np.ndarray]


class RolloutJournal:
    """One file for each rollout, by its number. Only process 0 has one.

    Args:
        folder: of the files.
        keep: number of newest rollouts to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, number: int) -> Path:
        """Return the file of a rollout."""
        return self.folder / f"{number:08d}.npz"

    def find(self, number: int) -> Arrays | None:
        """Return the arrays of a rollout, or None if they are missing or damaged: the rollout is made again then."""
        try:
            with self.path(number).open("rb") as file, np.load(file) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile):
            return None

    def write(self, number: int, arrays: Arrays) -> None:
        """Write the arrays of a rollout atomically, and remove the oldest file that is not needed any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path(number)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            self.path(number - self.keep).unlink(missing_ok=True)
