"""Checkpoints of the whole run: train state, data position and loop counters, written by Orbax while training goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from cotgrpo.types import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names it and says what to do."""


class Checkpoints:
    """The checkpoints of one run folder, `directory/<step>/`.

    A checkpoint appears under its step only when it is complete, so a process that dies while saving leaves the earlier ones as they were.

    Args:
        directory: made if need be.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        import orbax.checkpoint as ocp

        self.directory, self.keep = directory.absolute(), keep
        self.ocp = ocp
        with explaining_disk_errors(self.directory):
            self.manager = self.open()

    def open(self) -> Any:
        options = self.ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        return self.ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Starts to write the checkpoint of `step`; the arrays are copied first, so the state may be donated at once.

        Args:
            step: the name of the checkpoint.
            state: any pytree of arrays.
            position: JSON-able: where the data iterator stands, and the loop's counters.
        """
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(state), position=self.ocp.args.JsonSave(position)
        )
        with explaining_disk_errors(self.directory):
            self.manager.save(step, args=items, force=True)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """The newest checkpoint that can be read whole.

        One that cannot is set aside (`<run>/unreadable_checkpoints/<step>`), and the next older one is tried.

        Args:
            like: a state, or its `jax.eval_shape`, of the same tree, shapes and dtypes.

        Returns:
            `(state, position, notes)`, the notes saying what was set aside and why; None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        abstract = jax.eval_shape(lambda: like)
        notes: list[str] = []
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            items = self.ocp.args.Composite(
                state=self.ocp.args.StandardRestore(abstract), position=self.ocp.args.JsonRestore()
            )
            try:
                restored = self.manager.restore(step, args=items)
                return restored["state"], restored["position"], notes
            except Exception as error:  # Orbax and TensorStore raise whatever the broken file makes them
                notes.append(f"checkpoint {step} cannot be read ({first_line(error)}); it is set aside")
                self.set_aside(step)
        if steps:
            raise CheckpointError(f"No checkpoint in {self.directory} can be read: {'; '.join(notes)}.")
        return None

    def set_aside(self, step: int) -> None:
        """Moves an unreadable checkpoint away, so that its step can be written again."""
        self.manager.close()
        aside = self.directory.parent / "unreadable_checkpoints" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self.directory / str(step), aside)
        self.manager = self.open()

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises what the writing raised."""
        with explaining_disk_errors(self.directory):
            self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def restore_params(directory: Path, like: Any) -> tuple[Any, int]:
    """The parameters of the newest readable checkpoint in `directory` and its step, for evaluation or as another run's start.

    Args:
        directory: a `checkpoints` folder.
        like: the parameter tree, or its `jax.eval_shape`.

    Raises:
        CheckpointError: no folder, no checkpoint, or one of a model of another shape.
    """
    import orbax.checkpoint as ocp

    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such folder. Train first, or name the folder of a run that has checkpoints."
        )
    # A partial restore: the state's other parts (optimizer moments) are not read.
    abstract = {"params": jax.eval_shape(lambda: like)}
    with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            restore = ocp.args.PyTreeRestore(
                item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
            )
            try:
                return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"], step
            except Exception as error:
                problems.append(f"{step}: {first_line(error)}")
    raise CheckpointError(
        f"No checkpoint in {directory} fits this model. {'; '.join(problems) or 'The folder holds none.'}"
    )


class explaining_disk_errors:
    """A context in which a full disk becomes a message that says where, how full, and what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and is_disk_full(error):
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
