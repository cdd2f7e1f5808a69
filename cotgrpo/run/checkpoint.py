"""Checkpoints of the whole run: train state, data position and loop counters, written by Orbax while training goes on.

Orbax does not notice changed bytes in an array's data, so each checkpoint carries the size and CRC-32 of its files, and the shapes of its arrays. Both are
compared before any array is read: a damaged checkpoint is told from one of another model, and neither sends Orbax into pages of tracebacks.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax

from cotgrpo.types import TrainState

CHECKSUMS = "checksums.json"


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

        self.ocp = ocp
        self.directory = directory.absolute()
        self.saving = 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self.seal),
        )
        with explaining_disk_errors(self.directory):
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Starts to write the checkpoint of `step`; everything is copied first, so state and position may change at once.

        Args:
            step: the name of the checkpoint.
            state: any pytree of arrays.
            position: JSON-able: where the data iterator stands, and the loop's counters.

        Raises:
            CheckpointError: the disk is full, now or when the checkpoint before this one was written.
        """
        # Orbax copies the arrays at once, but turns the rest into JSON later, in its own thread, while the loop adds to its sums.
        position = copy.deepcopy(position)
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(state),
            position=self.ocp.args.JsonSave({"arrays": arrays_of(state), "position": position}),
        )
        self.wait()
        self.saving = step
        with explaining_disk_errors(self.directory):
            self.manager.save(step, args=items, force=True)

    def seal(self) -> None:
        """Orbax calls this, in its own thread, when all is written and before the folder gets its final name."""
        (folder,) = self.directory.glob(f"{self.saving}.*")
        write_checksums(folder)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """The newest checkpoint that is undamaged.

        Newer ones that are damaged are set aside, in `<run>/unreadable_checkpoints/<step>`, so that their steps can be written again.

        Args:
            like: a state of the same tree, shapes and dtypes; arrays arrive in its shardings, whatever they were saved in.

        Returns:
            `(state, position, notes)`, the notes saying what was set aside and why; None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged (then none is moved), or the newest undamaged one is of another model or optimizer.
        """
        damaged: dict[int, str] = {}
        for step in steps_in(self.directory):
            problem = find_damage(self.directory / str(step))
            if problem is not None:
                damaged[step] = problem
                continue
            saved = self.restore(step, position=self.ocp.args.JsonRestore())
            check_arrays(self.directory / str(step), saved["arrays"], arrays_of(like))
            state = self.restore(step, state=self.ocp.args.StandardRestore(jax.tree.map(abstract, like)))
            return state, saved["position"], self.set_aside(damaged)
        if damaged:
            raise CheckpointError(
                f"No checkpoint in {self.directory} can be read: {listed(damaged)}. To start anew, delete that folder."
            )
        return None

    def restore(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self.manager.restore(step, args=self.ocp.args.Composite(**item))[name]

    def set_aside(self, damaged: dict[int, str]) -> list[str]:
        """Moves damaged checkpoints away; what to tell the user."""
        notes = []
        for step, problem in damaged.items():
            aside = self.directory.parent / "unreadable_checkpoints" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(step), aside)
            notes.append(f"Checkpoint {step} cannot be read ({problem}). It was moved to {aside}.")
        self.manager.reload()
        return notes

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises what the writing raised."""
        with explaining_disk_errors(self.directory):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, ends Orbax's threads, and raises what the writing raised."""
        errors: list[Exception] = []
        for _ in range(3):  # Orbax raises one stored error a call, and closes only when none is left
            try:
                self.manager.close()
                break
            except Exception as error:
                errors.append(error)
        with explaining_disk_errors(self.directory):
            if errors:
                raise errors[0]


def restore_params(directory: Path, like: Any) -> tuple[Any, int]:
    """The parameters of the newest undamaged checkpoint in `directory` and its step, for evaluation or as another run's start.

    Args:
        directory: a `checkpoints` folder.
        like: the parameter tree, or its `jax.eval_shape`.

    Raises:
        CheckpointError: no folder, no checkpoint, none undamaged, or one of a model of another shape.
    """
    import orbax.checkpoint as ocp

    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such folder. Train first, or name the folder of a run that has checkpoints."
        )
    damaged: dict[int, str] = {}
    for step in steps_in(directory):
        folder = directory.absolute() / str(step)
        problem = find_damage(folder)
        if problem is not None:
            damaged[step] = problem
            continue
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            saved = params_only(checkpointer.restore(folder / "position")["arrays"])
        check_arrays(folder, saved, params_only(arrays_of({"params": like})))
        # A partial restore: the state's other parts (optimizer moments) are not read.
        item = {"params": jax.tree.map(abstract, like)}
        restore = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder / "state", args=restore)["params"], step
    raise CheckpointError(f"No checkpoint in {directory} can be read: {listed(damaged) or 'the folder holds none'}.")


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array; what has no sharding is wanted on the default device."""
    sharding = getattr(array, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def arrays_of(state: Any) -> dict[str, str]:
    """`{path: "float32[2, 3]"}` of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def params_only(arrays: dict[str, str]) -> dict[str, str]:
    """The shapes of the parameters, without their types: a restore converts them."""
    return {name: form[form.index("[") :] for name, form in arrays.items() if name.startswith("params/")}


def check_arrays(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises `CheckpointError`, naming the first difference, unless both trees have the same arrays."""
    for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith("params/"), name)):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} is of another model or optimizer: {name} is {saved.get(name, 'absent')} there, and here "
                f"{wanted.get(name, 'absent')}. Give the settings it was trained with, or another folder."
            )


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first; half-written ones have other names."""
    return sorted((int(path.name) for path in directory.iterdir() if path.name.isdigit()), reverse=True)


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: `{path: [size, CRC-32]}` of every file in the folders of `folder`."""
    sums = {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.glob("*/**/*")) if path.is_file()}
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """Compares a checkpoint's files with its `checksums.json`: the first that is missing or has changed, or None."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if checksum(folder / name) != expected:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, AttributeError, OSError) as error:
        return first_line(error)
    return None


def checksum(path: Path) -> list[int]:
    """[size, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def listed(damaged: dict[int, str]) -> str:
    """Steps and what is wrong with each, for a message."""
    return "; ".join(f"{step}: {problem}" for step, problem in damaged.items())


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
