"""Checkpoints: whole or not there, damage noticed, the last good one found, parameters alone, a full disk explained."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.checkpoint_states import ORBAX_LEAVES_ERRORS, assert_same, latest, make_state, small_file_system

from cotgrpo.checkpoints.location import CheckpointLocation
from cotgrpo.checkpoints.manager import CheckpointError, Checkpoints, restore_params


def save_all(directory: Path, *steps: int, keep: int = 3) -> None:
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"place": step})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_all(directory, 3, 7, 11, 20)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of three checkpoints, of steps 7, 11 and 20."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def test_the_newest_comes_back_and_old_ones_go(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["11", "20", "7"]
    found = latest(directory)
    assert found is not None
    assert_same(found[0], make_state(20))
    assert found[1:] == ({"place": 20}, [])


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    """Also across a restart, and where a later checkpoint was not measured or its loss is not finite."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0, 6: float("nan"), 7: 1.5, 8: None}
    for steps in ((1, 2, 3), (4, 5, 6, 7, 8)):
        checkpoints = Checkpoints(tmp_path, keep=2, keep_best=2)
        for step in steps:
            checkpoints.save(step, make_state(step), {}, losses[step])
        checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 7, 8]
    found = latest(tmp_path)
    assert found is not None
    assert_same(found[0], make_state(8))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "s3://bucket/run",
            r"s3://bucket/run: Orbax writes checkpoints to disks and gs:// buckets, and not to s3://",
        ),
        ("ftp://host/run", "and not to ftp://"),
        (
            "gs://a-bucket-that-is-not-there/run",
            "gs://a-bucket-that-is-not-there/run: .*(pip install |cannot be kept there)",
        ),
        (
            "/proc/run",
            r"/proc/run: checkpoints cannot be kept there \((FileNotFound|Permission|OS)Error: .*may read and write it",
        ),
    ],
)
def test_a_place_that_cannot_keep_checkpoints(name: str, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        Checkpoints(name)


def test_a_save_copies_the_position_too(tmp_path: Path) -> None:
    """The loop adds to the sums of its window while Orbax, in its own thread, is still to write them."""
    checkpoints = Checkpoints(tmp_path)
    position: dict[str, Any] = {"window": {"sums": {"loss": [1.0, 2.0]}}}
    checkpoints.save(1, make_state(1), position)
    position["window"]["sums"]["loss"][0] = 5.0
    checkpoints.close()
    found = latest(tmp_path)
    assert found is not None and found[1] == {"window": {"sums": {"loss": [1.0, 2.0]}}}


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "new" / "checkpoints") is None


def test_a_save_copies_before_the_state_is_donated(tmp_path: Path) -> None:
    """The loop donates the state while it is being written."""
    change = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 0 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    checkpoints = Checkpoints(tmp_path)
    state = make_state(1, width=4096)
    checkpoints.save(1, state, {})
    change(state)
    checkpoints.close()
    found = latest(tmp_path, make_state(0, width=4096))
    assert found is not None
    assert_same(found[0], make_state(1, width=4096))


def cut(folder: Path, biggest: Path) -> None:
    os.truncate(biggest, biggest.stat().st_size // 2)


def delete(folder: Path, biggest: Path) -> None:
    biggest.unlink()


def flip(folder: Path, biggest: Path) -> None:
    """One bit in the middle of the array data: Orbax alone restores a wrong number in silence."""
    data = bytearray(biggest.read_bytes())
    data[len(data) // 2] ^= 8
    biggest.write_bytes(data)


def flip_position(folder: Path, biggest: Path) -> None:
    path = folder / "position" / "metadata"
    path.write_text(path.read_text().replace('"place": 20', '"place": 21'))


def empty(folder: Path, biggest: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unlist(folder: Path, biggest: Path) -> None:
    (folder / "checksums.json").unlink()


def garble_list(folder: Path, biggest: Path) -> None:
    (folder / "checksums.json").write_text("{}"[:1])


DAMAGES = [cut, delete, flip, flip_position, empty, unlist, garble_list]


def damage(how: Callable[[Path, Path], None], folder: Path) -> None:
    how(folder, max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    directory: Path, how: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(how, directory / "20")
    with caplog.at_level(logging.WARNING):
        found = latest(directory)
    assert found is not None
    state, position, notes = found
    assert_same(state, make_state(11))
    assert position == {"place": 11}
    aside = directory.parent / "unreadable_checkpoints" / "20"
    (note,) = notes
    assert note.startswith("Checkpoint 20 cannot be read (") and note.endswith(f"). It was moved to {aside}.")
    assert aside.is_dir() and not (directory / "20").exists()
    if how is not empty:  # Orbax is kept from what is damaged, and so says nothing
        assert not caplog.records and "Traceback" not in capfd.readouterr().err
    save_all(directory, 20)  # the step can be written again
    found = latest(directory)
    assert found is not None
    assert_same(found[0], make_state(20))


def test_two_damaged_checkpoints(directory: Path) -> None:
    damage(flip, directory / "20")
    damage(cut, directory / "11")
    found = latest(directory)
    assert found is not None
    assert_same(found[0], make_state(7))
    assert [note.split(" cannot")[0] for note in found[2]] == ["Checkpoint 20", "Checkpoint 11"]


def test_all_damaged_is_an_error_and_nothing_is_moved(directory: Path) -> None:
    for step, how in ((20, flip), (11, empty), (7, delete)):
        damage(how, directory / str(step))
    for _ in range(2):  # nor does a second try start from nothing in silence
        with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read: 20: .*; 11: .*; 7: .*delete that"):
            latest(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["11", "20", "7"]
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read: 20: .*; 11: .*; 7: "):
        restore_params(directory, make_state(0).params)


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"width": 4}, r"params/embedding is float32\[61, 8\] there, and here float32\[61, 4\]"),
        ({"dtype": jnp.float16}, r"params/embedding is float32\[61, 8\] there, and here float16\[61, 8\]"),
        ({"tx": optax.sgd(0.1)}, r"opt_state/0/count is int32\[\] there, and here absent"),
    ],
)
def test_another_model_or_optimizer_is_an_error_and_nothing_is_moved(
    directory: Path, like: Any, difference: str
) -> None:
    with pytest.raises(CheckpointError, match=f"/20 is of another model or optimizer: {difference}"):
        latest(directory, make_state(0, **like))
    assert sorted(path.name for path in directory.iterdir()) == ["11", "20", "7"]


def test_the_parameters_alone(directory: Path) -> None:
    shapes = jax.eval_shape(lambda: make_state(0).params)
    params, step = restore_params(directory, shapes)
    assert step == 20
    assert_same(params, make_state(20).params)
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    params, _ = restore_params(directory, halves)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(20).params))


def test_the_parameters_of_an_undamaged_checkpoint(directory: Path) -> None:
    """Reading for evaluation moves nothing: a run may be going on in that folder."""
    damage(flip, directory / "20")
    params, step = restore_params(directory, make_state(0).params)
    assert step == 11
    assert_same(params, make_state(11).params)
    assert (directory / "20").is_dir()


def test_parameters_that_are_not_there(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"/20 is of another model .*: params/embedding is \[61, 8\] there, and here \[61, 9\]"
    ):
        restore_params(directory, make_state(0, width=9).params)
    with pytest.raises(CheckpointError, match="params/head is absent there"):
        restore_params(directory, make_state(0).params | {"head": jnp.zeros((2, 2))})
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder\. Train first"):
        restore_params(tmp_path / "nowhere", make_state(0).params)
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="bare can be read: the folder holds none"):
        restore_params(tmp_path / "bare", make_state(0).params)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    yield from small_file_system(tmp_path / "disk")


@ORBAX_LEAVES_ERRORS
def test_a_full_disk_is_explained_by_whoever_meets_it_first(small_disk: Callable[[str], Path]) -> None:
    """Writing goes on after `save` returns: its error comes from the next save, from `wait`, or from `close`, once."""
    before = set(threading.enumerate())
    folder = small_disk("400k")
    runs = {name: Checkpoints(folder / name) for name in ("save", "wait", "close")}
    for checkpoints in runs.values():
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
    for checkpoints in runs.values():
        checkpoints.save(2, make_state(2), {})
    for name, checkpoints in runs.items():
        explained = (
            rf"The disk is full: {checkpoints.directory} could not be written \(.* MB free\)\. Earlier .* make room"
        )
        with pytest.raises(CheckpointError, match=explained):
            if name == "save":
                checkpoints.save(3, make_state(3), {})
            elif name == "wait":
                checkpoints.wait()
            else:
                checkpoints.close()
    for name in ("save", "wait"):  # Orbax may have a second error to tell: the same
        with contextlib.suppress(CheckpointError):
            runs[name].close()
    for thread in set(threading.enumerate()) - before:
        threading.Thread.join(thread, 30)  # not thread.join: Orbax raises the error again there
        assert not thread.is_alive(), thread
    gc.collect()
    (folder / "filler").unlink()
    for name in runs:
        found = latest(folder / name)
        assert found is not None
        assert_same(found[0], make_state(1))


def test_a_place_that_cannot_be_reached_is_not_an_empty_one(tmp_path: Path) -> None:
    class Unreachable(type(tmp_path)):  # type: ignore[misc]
        def iterdir(self) -> Any:
            raise ConnectionError("no route to the bucket")

    assert not CheckpointLocation.resolve(tmp_path / "sft").exists()
    with pytest.raises(CheckpointError, match=r"sft cannot be read \(ConnectionError: no route to the bucket\)"):
        CheckpointLocation(Unreachable(tmp_path / "sft")).exists()
