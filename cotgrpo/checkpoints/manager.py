"""Save and restore the whole run: train state, data position and loop counters, written by Orbax in the background.

Orbax does not notice changed bytes in an array's data. Each checkpoint therefore carries the size and CRC-32 of its
files, and the shapes of its arrays. Both are compared before any array is read, so a damaged checkpoint and one of
another model give different errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.checkpoints.integrity import COMMITTED, find_damage, write_checksums
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.checkpoints.object_stores import check_folder_works, for_orbax, is_remote, open_folder
from cotgrpo.disk_errors import CheckpointError as CheckpointError
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.distributed.processes import is_process_0, on_process_0
from cotgrpo.terminal import complain
from cotgrpo.types import Params, TrainState

if TYPE_CHECKING:
    from cotgrpo.checkpoints.object_stores import Folder
    from cotgrpo.types import PyTree


NOT_FINITE = "it holds numbers that are not finite"
UNKNOWN = "no later step showed that it is good"


class Checkpoints:
    """The checkpoints of one run, `directory/<step>/`.

    A checkpoint counts only when it is complete. A process that dies while saving leaves the earlier ones as they were.
    With several processes, all call every method at the same point. Each writes and reads the part of the arrays that
    is on its own devices, so all of them must see the folder.

    A checkpoint may be saved before it is known what its parameters are worth. Until it is confirmed, it pushes none of
    the earlier ones out.

    Args:
        directory: a folder of this machine or a gs:// bucket. It is created if needed.
        keep: how many of the newest checkpoints stay. One that is not confirmed stays in addition.
        keep_best: how many with the lowest loss stay in addition.
        copy: a copy of this directory in an object store. Checkpoints that the disk lacks are fetched first. A new
            checkpoint counts when its copy is complete.

    Raises:
        CheckpointError: the folder cannot be used.
    """

    def __init__(
        self, directory: str | PurePath, keep: int = 3, keep_best: int = 0, *, copy: ObjectStoreCopy | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        self.ocp = ocp
        self.directory = open_folder(directory)
        self.keep, self.keep_best, self.copy = keep, keep_best, copy
        self.saving, self.kept, self.unconfirmed = 0, set[int](), set[int]()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # Orbax asks `should_preserve` after each save
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self.seal),
        )
        with explain_disk_errors(self.directory):
            on_process_0(lambda: check_folder_works(self.directory))
            if copy is not None:
                on_process_0(lambda: copy.pull(newest_only=False))
            self.losses = dict(on_process_0(lambda: losses_in(self.directory)))
            self.manager = ocp.CheckpointManager(for_orbax(self.directory), options=options)

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        loss: float | None = None,
        *,
        confirmed: bool = True,
    ) -> None:
        """Start to write the checkpoint of `step`. State and position are copied first, so they may change at once.

        Args:
            step: the name of the checkpoint.
            state: any pytree of arrays.
            position: the state of the data iterator and the loop's counters. Its values are JSON-able, or objects whose
                property `text` is.
            loss: on held-out rows. It decides which checkpoints are the best ones, unless it is None or not finite.
            confirmed: the parameters are known to be good, and so are those of all earlier checkpoints. If not, a later
                call of `confirm` decides.

        Raises:
            CheckpointError: the disk is full, now or when the checkpoint before this one was written.
        """
        # Orbax copies the arrays at once. It converts the rest to JSON later, in its own thread, while the loop adds to
        # its sums.
        position = json.loads(json.dumps(position, default=lambda value: value.text))
        if loss is not None and math.isfinite(loss):
            self.losses[step] = loss
        metadata = {"arrays": arrays_of(state), "position": position, "loss": self.losses.get(step)}
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(state),
            position=self.ocp.args.JsonSave(metadata),
        )
        self.wait()
        self.unconfirmed = set() if confirmed else {*self.unconfirmed, step}
        self.saving = step
        with explain_disk_errors(self.directory):
            for_orbax(self.directory)
            self.manager.save(step, args=items, force=True)

    def should_preserve(self, checkpoints: Sequence[Any], **context: Any) -> list[bool]:
        """Return which checkpoints stay: the newest, and those with the lowest loss. A tie keeps the newer one.

        Of those that are not confirmed, the newest and the best stay in addition.
        """
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        good, rest = ([s for s in steps if (s in self.unconfirmed) is unsure] for unsure in (False, True))
        self.kept = {*good[-self.keep :], *self.best_of(good), *rest[-1:], *self.best_of(rest)}
        return [checkpoint.step in self.kept for checkpoint in checkpoints]

    def best_of(self, steps: Sequence[int]) -> list[int]:
        """Return the `keep_best` steps with the lowest loss."""
        measured = [step for step in steps if step in self.losses]
        return sorted(measured, key=lambda step: (self.losses[step], -step))[: self.keep_best]

    def confirm(self, until: int) -> None:
        """Take note that the checkpoints up to step `until` are good, and that this is not known of the others."""
        self.unconfirmed = {step for step in self.manager.all_steps() if step > until}

    def keep_good(self, until: int, *, certain: bool) -> tuple[int | None, list[str]]:
        """Set the checkpoints after step `until` aside: they are not known to be good. Nothing can be saved after this.

        Args:
            until: the last step that is known to be good.
            certain: whether later ones are known to be bad. If not, the oldest of all stays.

        Returns:
            The step of the newest checkpoint that stays, or None, and notes that name what was set aside.
        """
        self.wait()

        def separate() -> tuple[int | None, list[str]]:
            steps = steps_in(self.directory)
            bad = [step for step in steps if step > until]
            if len(bad) == len(steps) and not certain:
                bad = bad[:-1]
            notes = self.set_aside(dict.fromkeys(bad, UNKNOWN), "ruined_checkpoints")
            if self.copy is not None:
                for step in bad:
                    self.copy.delete(step)
            return max(set(steps) - set(bad), default=None), notes

        step, notes = on_process_0(separate)
        return step, notes

    def seal(self) -> None:
        """Write checksums and the copy. Orbax calls this in its own thread, before the checkpoint counts."""
        (folder,) = (path for path in self.directory.iterdir() if path.name.split(".")[0] == str(self.saving))
        write_checksums(folder)
        if self.copy is not None:
            self.copy.push(folder, self.saving, self.kept)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """Restore the newest undamaged checkpoint.

        Newer ones that are damaged are moved to `<run>/unreadable_checkpoints/<step>`, so that their steps can be
        written again.

        Args:
            like: a state of the same tree, shapes and dtypes. Arrays arrive in its shardings, whatever they were saved
                in.

        Returns:
            `(state, position, notes)`, or None if there is no checkpoint. The notes name what was moved, and why.

        Raises:
            CheckpointError: all checkpoints are damaged (then none is moved), or the newest undamaged one is of another
                model or optimizer.
        """
        unusable: dict[int, str] = {}
        while True:
            find = functools.partial(self.find_latest, arrays_of(like), tuple(unusable))
            found = on_process_0(find)
            if found is None:
                return None
            step, position, damaged = found
            unusable |= {int(number): problem for number, problem in damaged}
            if step is None:
                raise CheckpointError(
                    f"No checkpoint in {self.directory} can be read: {listed(unusable)}. "
                    "To start from the beginning, delete that folder."
                )
            self.manager.reload()
            wanted = self.ocp.args.StandardRestore(jax.tree.map(abstract, like))
            state = self.manager.restore(step, args=self.ocp.args.Composite(state=wanted))["state"]
            if is_finite(state):
                break
            unusable[step] = NOT_FINITE
        notes = on_process_0(lambda: self.set_aside(unusable, "unreadable_checkpoints"))
        self.manager.reload()
        self.unconfirmed = {step}
        return state, position, notes

    def find_latest(
        self, arrays: dict[str, str], besides: Sequence[int]
    ) -> tuple[int | None, dict[str, Any], list[tuple[int, str]]] | None:
        """Return the step of the newest undamaged checkpoint, its position, and what is damaged among newer ones.

        The step is None if all are damaged or in `besides`. The whole is None if there are no checkpoints.
        """
        step, damaged = newest_undamaged(self.directory, besides)
        if step is None:
            return (None, {}, list(damaged.items())) if damaged or besides else None
        saved = read_position(self.directory / str(step))
        check_arrays(self.directory / str(step), saved["arrays"], arrays)
        return step, saved["position"], list(damaged.items())

    def set_aside(self, unusable: dict[int, str], name: str) -> list[str]:
        """Move checkpoints to the folder `name` next to this one, and return notes for the user.

        In a bucket a move would be a copy, so only the success marker is deleted.
        """
        notes = []
        for step, problem in sorted(unusable.items(), reverse=True):
            folder = self.directory / str(step)
            state = f"Checkpoint {step} is not used ({problem})."
            if problem not in (UNKNOWN, NOT_FINITE):
                state = f"Checkpoint {step} cannot be read ({problem})."
            if is_remote(folder):
                (folder / COMMITTED).unlink()
                notes.append(f"{state} It no longer counts.")
                continue
            aside = self.directory.parent / name / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(folder, aside)
            notes.append(f"{state} It was moved to {aside}.")
        return notes

    def wait(self) -> None:
        """Block until everything that was saved is on disk. Raise what the writing raised."""
        with explain_disk_errors(self.directory):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, end Orbax's threads, and raise what the writing raised."""
        errors: list[Exception] = []
        for _ in range(3):  # Orbax raises one stored error per call, and closes only when none is left
            try:
                self.manager.close()
                break
            except Exception as error:
                errors.append(error)
        with explain_disk_errors(self.directory):
            if errors:
                raise errors[0]


def restore_params(directory: str | PurePath, like: Params) -> tuple[Params, int]:
    """Restore the parameters of the newest good checkpoint, for evaluation or as the start of another run.

    Args:
        directory: a folder of checkpoints, as in `Checkpoints`.
        like: the parameter tree, or its `jax.eval_shape`. If its leaves have shardings, the parameters arrive in them.

    Returns:
        The parameters and their step. If newer checkpoints hold parameters that are not finite, a warning names them.

    Raises:
        CheckpointError: no folder, no undamaged checkpoint with finite parameters, or one of a model of another shape.
    """
    import orbax.checkpoint as ocp

    folder = open_folder(directory)
    arrays = params_only(arrays_of({"params": like}))
    # A partial restore: the state's other parts (optimizer moments) are not read.
    item = {"params": jax.tree.map(abstract, like)}
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    unusable: dict[int, str] = {}
    while True:
        step = on_process_0(lambda: find_step(folder, arrays, params_only, unusable))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(for_orbax(folder) / str(step) / "state", args=restore)["params"]
        if is_finite(params):
            break
        unusable[step] = NOT_FINITE
    if unusable and is_process_0():
        complain(f"warning: {folder}: checkpoint {step} is taken. Newer ones are not used: {listed(unusable)}.")
    return params, step


def check_state(directory: str | PurePath, like: TrainState) -> None:
    """Check that the newest undamaged checkpoint holds such a train state. No array is read.

    Arguments and errors are those of `restore_params`.
    """
    on_process_0(lambda: find_step(open_folder(directory), arrays_of(like)))


def find_step(
    folder: Folder,
    arrays: dict[str, str],
    part: Callable[[dict[str, str]], dict[str, str]] = lambda arrays: arrays,
    unusable: Mapping[int, str] = MappingProxyType({}),
) -> int:
    """Return the step of the newest undamaged checkpoint, and check that `part` of its arrays is `arrays`.

    Those in `unusable`, {step: problem}, are left out.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. Train first, or name the folder of a run that has checkpoints."
        )
    step, damaged = newest_undamaged(folder, unusable)
    if step is None:
        problems = listed({**unusable, **damaged}) or "the folder holds none"
        raise CheckpointError(
            f"No checkpoint in {folder} can be read: {problems}. "
            "Put a copy back, or move the folder away and train again."
        )
    check_arrays(folder / str(step), part(read_position(folder / str(step))["arrays"]), arrays)
    return step


def newest_undamaged(directory: Folder, besides: Collection[int] = ()) -> tuple[int | None, dict[int, str]]:
    """Return the step of the newest undamaged checkpoint, or None, and the problem of each newer one.

    Steps in `besides` are not looked at.
    """
    damaged: dict[int, str] = {}
    for step in steps_in(directory):
        if step in besides:
            continue
        problem = find_damage(directory / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = problem
    return None, damaged


def losses_in(directory: Folder) -> list[tuple[int, float]]:
    """Return steps and losses of the checkpoints that were saved with a loss and can be read."""
    found = []
    for step in steps_in(directory):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((step, read_position(directory / str(step))["loss"]))
    return [(step, loss) for step, loss in found if loss is not None]


def read_position(folder: Folder) -> dict[str, Any]:
    """Read what `Checkpoints.save` kept besides the arrays: their shapes, the position and the loss.

    One process calls this alone, so it does not use Orbax.
    """
    return dict(json.loads((folder / "position" / "metadata").read_text()))


def abstract(array: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of an array. Without a sharding it is placed on the default device."""
    sharding = getattr(array, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def is_finite(tree: PyTree) -> bool:
    """Return whether all arrays of a tree are finite. Scalars may be infinite: optimizers start some of them so."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return bool(jax.jit(lambda arrays: jnp.all(jnp.asarray([jnp.all(jnp.isfinite(a)) for a in arrays])))(arrays))


def arrays_of(state: PyTree) -> dict[str, str]:
    """Return `{path: "float32[2, 3]"}` of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def params_only(arrays: dict[str, str]) -> dict[str, str]:
    """Return the shapes of the parameters. Their types are left out, since a restore converts them."""
    return {name: form[form.index("[") :] for name, form in arrays.items() if name.startswith("params/")}


def check_arrays(folder: Folder, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise CheckpointError, naming the first difference, unless both trees have the same arrays."""
    for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith("params/"), name)):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{folder} is of another model or optimizer: {name} is {saved.get(name, 'absent')} there, and here "
                f"{wanted.get(name, 'absent')}. Give the settings it was trained with, or another folder."
            )


def steps_in(directory: Folder) -> list[int]:
    """Return the steps of the checkpoints in a folder, newest first.

    Half-written ones have other names on a disk, and no success marker in a bucket.
    """
    try:
        paths = [path for path in directory.iterdir() if path.name.isdigit()]
    except (FileNotFoundError, NotADirectoryError):  # a bucket has no empty folders
        return []
    if is_remote(directory):
        paths = [path for path in paths if (path / COMMITTED).exists()]
    return sorted((int(path.name) for path in paths), reverse=True)


def listed(damaged: dict[int, str]) -> str:
    """Return steps and their problems as text."""
    return "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
