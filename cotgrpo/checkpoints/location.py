"""Find the checkpoints of a stage: next to its logs, in a folder or bucket elsewhere, or in an object store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.checkpoints.manager import steps_in
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.checkpoints.object_stores import check_folder_works, needs_copy, open_folder
from cotgrpo.config import Config, load_config
from cotgrpo.disk_errors import CheckpointError, first_line
from cotgrpo.distributed.processes import on_process_0

if TYPE_CHECKING:
    from cotgrpo.checkpoints.object_stores import Folder


@dataclasses.dataclass(frozen=True)
class CheckpointLocation:
    """Where the checkpoints of one stage are.

    Attributes:
        folder: what Orbax reads and writes: a folder on a disk, or in a gs:// bucket.
        copy: the copy of `folder` in another kind of object store, or None.
    """

    folder: Folder
    copy: ObjectStoreCopy | None = None

    @classmethod
    def of(cls, stage_folder: Path, checkpoint_folder: str | None) -> CheckpointLocation:
        """Return the location for a stage's folder and the setting `checkpoint.folder`."""
        on_disk = stage_folder / "checkpoints"
        if checkpoint_folder is None:
            return cls(on_disk)
        if needs_copy(checkpoint_folder):
            return cls(on_disk, ObjectStoreCopy(on_disk, f"{checkpoint_folder.rstrip('/')}/{stage_folder.name}"))
        return cls(open_folder(checkpoint_folder) / stage_folder.name)

    @classmethod
    def resolve(cls, stage_folder: Path, config: Config | None = None) -> CheckpointLocation:
        """Return the location of a stage's checkpoints.

        Args:
            stage_folder: `RUN_DIR/sft` or `RUN_DIR/grpo`.
            config: of the current run. It applies only to stages in its `run_dir`. Other stages use the config that
                is saved in their own folder.
        """
        if config is None or stage_folder.parent != Path(config.run_dir):
            config = saved_config(stage_folder)
        return cls.of(stage_folder, None if config is None else config.checkpoint.folder)

    def check_works(self) -> None:
        """Raise CheckpointError unless checkpoints can be written here."""
        if self.copy is not None:
            self.copy.check_works()
        else:
            check_folder_works(self.folder)

    def readable(self) -> Folder:
        """Return the folder, after fetching the newest checkpoint from the copy if the disk lacks it."""
        copy = self.copy
        if copy is not None:
            on_process_0(lambda: copy.pull(newest_only=True))
        return self.folder

    def exists(self) -> bool:
        """Return whether there is a checkpoint, damaged or not.

        Raises:
            CheckpointError: the location cannot be read.
        """
        folder = self.readable()

        def look() -> bool:
            try:
                return bool(steps_in(folder))
            except Exception as error:  # cloud clients raise exceptions of their own
                raise CheckpointError(
                    f"{folder} cannot be read ({first_line(error)}). Check the name, and that this machine may read it."
                ) from error

        return on_process_0(look)


def saved_config(stage_folder: Path) -> Config | None:
    """Return the config that a stage has saved in its folder, or None."""
    path = stage_folder / "config.yaml"
    return load_config(path, may_be_newer=True) if path.is_file() else None
