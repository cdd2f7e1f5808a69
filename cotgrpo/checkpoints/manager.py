"""Checkpoints of the whole run: train state, data position and loop counters, written by Orbax while training goes on.

Orbax does not notice changed bytes in an array's data, so each checkpoint carries the size and CRC-32 of its files, and the shapes of its arrays. Both are
compared before any array is read: a damaged checkpoint is told from one of another model, and neither sends Orbax into pages of tracebacks.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.storage import (
    COMMITTED,
    CheckpointError,
    check_folder_works,
    explaining_disk_errors,
    find_damage,
    is_remote,
    open_folder,
    write_checksums,
)
from cotgrpo.types import TrainState


class Checkpoints:
    """The checkpoints of one run, `directory/<step>/`.

    A checkpoint counts only when it is complete, so a process that dies while saving leaves the earlier ones as they were. Of several processes all
    call every method at the same point; each writes and reads its own devices' part of the arrays, so the folder is one that all of them see.

    Args:
        directory: a folder of this machine or a gs:// bucket; made if need be.
        keep: how many of the newest stay.
        keep_best: how many of the lowest loss stay beside them.
        mirror: of this directory; what is there and not here is copied first, and each checkpoint counts when its copy is whole.

    Raises:
        CheckpointError: the folder cannot be used.
    """

    def __init__(
        self, directory: str | Path, keep: int = 3, keep_best: int = 0, *, mirror: ObjectStoreCopy | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        self.ocp = ocp
        self.directory = open_folder(directory)
        self.keep, self.keep_best, self.mirror = keep, keep_best, mirror
        self.saving, self.kept = 0, set[int]()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # Orbax asks `should_preserve` after each save
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self.seal),
        )
        with explaining_disk_errors(self.directory):
            on_process_0(lambda: check_folder_works(self.directory))
            if mirror is not None:
                on_process_0(lambda: mirror.pull(newest_only=False))
            self.losses = dict(on_process_0(lambda: losses_in(self.directory)))
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, position: dict[str, Any], loss: float | None = None) -> None:
        """Starts to write the checkpoint of `step`; everything is copied first, so state and position may change at once.

        Args:
            step: the name of the checkpoint.
            state: any pytree of arrays.
            position: where the data iterator stands, and the loop's counters: JSON-able, or objects with a `text`, which is asked for here.
            loss: on held-out rows, by which the best are kept; None, or not finite: it is none of them.

        Raises:
            CheckpointError: the disk is full, now or when the checkpoint before this one was written.
        """
        # Orbax copies the arrays at once, but turns the rest into JSON later, in its own thread, while the loop adds to its sums.
        position = json.loads(json.dumps(position, default=lambda value: value.text))
        if loss is not None and math.isfinite(loss):
            self.losses[step] = loss
        beside = {"arrays": arrays_of(state), "position": position, "loss": self.losses.get(step)}
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(state),
            position=self.ocp.args.JsonSave(beside),
        )
        self.wait()
        self.saving = step
        with explaining_disk_errors(self.directory):
            self.manager.save(step, args=items, force=True)

    def should_preserve(self, checkpoints: Any, **context: Any) -> list[bool]:
        """Which of the checkpoints stay: the newest, and of those with a loss the best, the newer of equals."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        measured = sorted((step for step in steps if step in self.losses), key=lambda step: (self.losses[step], -step))
        self.kept = {*steps[-self.keep :], *measured[: self.keep_best]}
        return [checkpoint.step in self.kept for checkpoint in checkpoints]

    def seal(self) -> None:
        """Orbax calls this, in its own thread and on process 0, when all is written and before the checkpoint counts."""
        (folder,) = (path for path in self.directory.iterdir() if path.name.split(".")[0] == str(self.saving))
        write_checksums(folder)
        if self.mirror is not None:
            self.mirror.push(folder, self.saving, self.kept)

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
        found = on_process_0(lambda: self.find_latest(arrays_of(like)))
        if found is None:
            return None
        step, position, notes = found
        self.manager.reload()
        wanted = self.ocp.args.StandardRestore(jax.tree.map(abstract, like))
        state = self.manager.restore(step, args=self.ocp.args.Composite(state=wanted))["state"]
        return state, position, notes

    def find_latest(self, arrays: dict[str, str]) -> tuple[int, dict[str, Any], list[str]] | None:
        """The step of the newest undamaged checkpoint, its position, and notes; see `restore_latest`."""
        step, damaged = newest_undamaged(self.directory)
        if step is None and damaged:
            raise CheckpointError(
                f"No checkpoint in {self.directory} can be read: {listed(damaged)}. To start anew, delete that folder."
            )
        if step is None:
            return None
        saved = read_position(self.directory / str(step))
        check_arrays(self.directory / str(step), saved["arrays"], arrays)
        return step, saved["position"], self.set_aside(damaged)

    def set_aside(self, damaged: dict[int, str]) -> list[str]:
        """Moves damaged checkpoints away, or in a bucket, where that would be a copy, takes their mark of success; what to tell the user."""
        notes = []
        for step, problem in damaged.items():
            folder = self.directory / str(step)
            if is_remote(folder):
                (folder / COMMITTED).unlink()
                notes.append(f"Checkpoint {step} cannot be read ({problem}). It no longer counts.")
                continue
            aside = self.directory.parent / "unreadable_checkpoints" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(folder, aside)
            notes.append(f"Checkpoint {step} cannot be read ({problem}). It was moved to {aside}.")
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


def restore_params(directory: str | Path, like: Any) -> tuple[Any, int]:
    """The parameters of the newest undamaged checkpoint in `directory` and its step, for evaluation or as another run's start.

    Args:
        directory: a folder of checkpoints, as `Checkpoints` has it.
        like: the parameter tree, or its `jax.eval_shape`; where its leaves have shardings, the parameters come in them.

    Raises:
        CheckpointError: no folder, no checkpoint, none undamaged, or one of a model of another shape.
    """
    import orbax.checkpoint as ocp

    folder = open_folder(directory)
    step = on_process_0(lambda: find_step(folder, params_only(arrays_of({"params": like})), params_only))
    # A partial restore: the state's other parts (optimizer moments) are not read.
    item = {"params": jax.tree.map(abstract, like)}
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder / str(step) / "state", args=restore)["params"], step


def check_state(directory: Any, like: Any) -> None:
    """Whether the newest undamaged checkpoint of a folder holds such a train state; arguments and errors as in `restore_params`. No array is read."""
    on_process_0(lambda: find_step(open_folder(directory), arrays_of(like)))


def find_step(
    folder: Any, arrays: dict[str, str], part: Callable[[dict[str, str]], dict[str, str]] = lambda arrays: arrays
) -> int:
    """The step of the newest undamaged checkpoint, where this part of its arrays is what is wanted."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. Train first, or name the folder of a run that has checkpoints."
        )
    step, damaged = newest_undamaged(folder)
    if step is None:
        raise CheckpointError(f"No checkpoint in {folder} can be read: {listed(damaged) or 'the folder holds none'}.")
    check_arrays(folder / str(step), part(read_position(folder / str(step))["arrays"]), arrays)
    return step


def newest_undamaged(directory: Any) -> tuple[int | None, dict[int, str]]:
    """The step of the newest checkpoint that is undamaged, or None, and what is wrong with each newer one."""
    damaged: dict[int, str] = {}
    for step in steps_in(directory):
        problem = find_damage(directory / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = problem
    return None, damaged


def losses_in(directory: Any) -> list[tuple[int, float]]:
    """The steps and losses of the checkpoints that were saved with one and whose position can be read."""
    found = []
    for step in steps_in(directory):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((step, read_position(directory / str(step))["loss"]))
    return [(step, loss) for step, loss in found if loss is not None]


def read_position(folder: Any) -> dict[str, Any]:
    """What `Checkpoints.save` kept of a checkpoint beside the arrays: their shapes, the position and the loss. By one process, so without Orbax."""
    return dict(json.loads((folder / "position" / "metadata").read_text()))


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array; what has no sharding is wanted on the default device."""
    sharding = getattr(array, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
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


def steps_in(directory: Any) -> list[int]:
    """The steps of the checkpoints in a folder, newest first. Half-written ones have other names, or in a bucket no mark of success yet."""
    try:
        paths = [path for path in directory.iterdir() if path.name.isdigit()]
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # a bucket has no empty folders; one that cannot be reached is another error
        return []
    if is_remote(directory):
        paths = [path for path in paths if (path / COMMITTED).exists()]
    return sorted((int(path.name) for path in paths), reverse=True)


def listed(damaged: dict[int, str]) -> str:
    """Steps and what is wrong with each, for a message."""
    return "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
