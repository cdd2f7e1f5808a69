"""Runs that ruin their student: what is saved, what stays, and what is used afterwards."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_run import SHARED_STEP, Batches, as_arrays, new_state, run
from rich.console import Console

from cotgrpo import TrainState
from cotgrpo.checkpoints.manager import CheckpointError, Checkpoints, restore_params, steps_in
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.checkpoints.stops import STOPPED, say_stops
from cotgrpo.config import CheckpointConfig
from cotgrpo.training.collapse import CollapseDetector
from cotgrpo.training.hooks import Hook, Row
from cotgrpo.training.loop import LoopSettings, TrainingStopped


class FaultyStep:
    """The shared step, with a fault in the states that some steps return."""

    def __init__(self, change: Callable[[int, TrainState], TrainState]) -> None:
        self.change = change

    def lower(self, *arguments: Any) -> FaultyStep:
        SHARED_STEP.lower(*arguments)
        return self

    def compile(self) -> FaultyStep:
        return self

    def memory_analysis(self) -> Any:
        return SHARED_STEP.compiled.memory_analysis()

    def __call__(self, state: TrainState, batch: Any) -> Any:
        number = int(state.step) + 1
        state, metrics = SHARED_STEP.compiled(state, batch)
        return self.change(number, state), metrics


def absurd_at(*steps: int) -> FaultyStep:
    """Steps whose updates leave finite parameters that give no finite loss."""
    huge = lambda params: jax.tree.map(lambda leaf: jnp.where(leaf > 0, 1e30, -1e30).astype(leaf.dtype), params)
    return FaultyStep(lambda n, state: state.replace(params=huge(state.params)) if n in steps else state)


def spoiled(bad: Callable[[int], bool], value: float = float("nan")) -> Batches:
    """Batches that give no finite loss where `bad(number)`."""
    spoil = lambda batch: batch.replace(loss_mask=np.full_like(batch.loss_mask, value))
    return Batches(lambda number, batch: spoil(batch) if bad(number) else batch)


def settings(every: int, total: int = 20, **more: Any) -> LoopSettings:
    return LoopSettings("grpo", total, log_every=5, checkpoint=CheckpointConfig(every, **more), max_skipped=4)


def kept(folder: Path) -> list[int]:
    return sorted(steps_in(folder / "checkpoints"))


# Step, batches, settings; what the error says, the checkpoints that stay, the step that `stopped.json` names.
RUINED: dict[str, tuple[Any, Any, LoopSettings, str, list[int], int | None]] = {
    "absurd after the first step": (absurd_at(1), None, settings(1, keep=1), "No checkpoint was saved", [], None),
    "absurd at a save": (absurd_at(8), None, settings(4, keep=1), "checkpoint of step 4 is the last", [4], 4),
    "absurd before a save": (absurd_at(7), None, settings(4, keep=1), "checkpoint of step 4 is the last", [4], 4),
    "absurd with saves after it": (absurd_at(7), None, settings(1, keep=2), "of step 6 is the last", [5, 6], 6),
    "absurd at the last step": (absurd_at(20), None, settings(6, keep=1), "of step 18 is the last", [12, 18], 18),
    "absurd at the last but one": (absurd_at(19), None, settings(6, keep=1), "of step 18 is the last", [12, 18], 18),
    "NaN data from a save on": (
        None,
        spoiled(lambda n: n > 8),
        settings(4, keep=1),
        "of step 8 is the last",
        [4, 8],
        8,
    ),
    "NaN data at a save": (None, spoiled(lambda n: n >= 8), settings(4, keep=1), "of step 4 is the last", [4], 4),
    "infinite data": (
        None,
        spoiled(lambda n: n > 9, np.inf),
        settings(2, keep=2),
        "of step 8 is the last",
        [4, 6, 8],
        8,
    ),
    "NaN data from the first on": (None, spoiled(lambda n: True), settings(1), "No checkpoint was saved", [], None),
}


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("case", RUINED)
def test_the_last_good_checkpoint_stays(tmp_path: Path, case: str, measured: bool) -> None:
    step, batches, given, message, stay, last_good = RUINED[case]

    def evaluate(params: Any) -> dict[str, float]:
        with np.errstate(over="ignore"):
            return {"loss": float(np.sum(np.square(np.asarray(params["head"]))))}  # infinite if the numbers are absurd

    folder = tmp_path / "grpo"
    options = {"step": step or SHARED_STEP, "evaluate": evaluate if measured else None}
    for _ in range(2):  # the same command once more ends in the same way
        source = Batches() if batches is None else Batches(batches.hook)
        with pytest.raises(TrainingStopped, match=message):
            run(folder, source, given, **options)
        assert kept(folder) == stay
        assert json.loads((folder / STOPPED).read_text())["last_good"] == last_good
    text = io.StringIO()
    say_stops([folder], Console(file=text, width=400))
    if last_good is None:
        assert "it has no good checkpoint" in text.getvalue()
        return
    assert f"its last good checkpoint is that of step {last_good}" in text.getvalue()
    params, found = restore_params(folder / "checkpoints", new_state().params)
    assert found == last_good and all(np.abs(leaf).max() < 10 for leaf in jax.tree.leaves(params))


def test_a_skipped_step_postpones_the_save_and_does_not_change_the_run(tmp_path: Path) -> None:
    """Steps 4 and 5 are skipped, and the last one: saved are 6, 8 and 10. A resume from each gives the same state."""
    text, bad = io.StringIO(), lambda n: n in (4, 5, 10)
    given = settings(4, total=10, keep=3)
    options = {"evaluate": None, "console": Console(file=text, width=200)}
    state = run(tmp_path / "whole", spoiled(bad), given, **options)
    assert kept(tmp_path / "whole") == [6, 8, 10]
    assert "The update of step 4 was skipped: the next that succeeds is saved." in text.getvalue()
    assert not (tmp_path / "whole" / STOPPED).exists()
    run(tmp_path / "cut", spoiled(bad), settings(4, total=7, keep=3), **options)
    again = run(tmp_path / "cut", spoiled(bad), given, **options)
    for got, want in zip(as_arrays(again), as_arrays(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_looking_at_the_last_parameters_leaves_them_as_they_are(tmp_path: Path) -> None:
    """Without a held-out loss one more step is made and thrown away."""
    with_loss = run(tmp_path / "a", settings=settings(4, total=5))
    without = run(tmp_path / "b", settings=settings(4, total=5), evaluate=None)
    for got, want in zip(as_arrays(without), as_arrays(with_loss), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_checkpoint_that_is_not_confirmed_pushes_none_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep=2, keep_best=1)
    losses = {1: 1.0, 2: 3.0, 3: 3.0}
    for step in (1, 2, 3):
        checkpoints.save(step, new_state(), {}, losses[step])
    checkpoints.save(4, new_state(), {}, confirmed=False)
    checkpoints.save(5, new_state(), {}, 0.5, confirmed=False)
    checkpoints.wait()
    assert sorted(steps_in(tmp_path / "run")) == [1, 2, 3, 5]
    checkpoints.confirm(5)
    checkpoints.save(6, new_state(), {}, confirmed=False)
    checkpoints.wait()
    assert sorted(steps_in(tmp_path / "run")) == [3, 5, 6]
    assert checkpoints.keep_good(5, certain=True)[0] == 5
    checkpoints.close()
    assert sorted(steps_in(tmp_path / "run")) == [3, 5]
    assert (tmp_path / "ruined_checkpoints" / "6").is_dir()


def spoil_state(state: TrainState, what: str) -> TrainState:
    if what == "parameters":
        return state.replace(params=jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.nan), state.params))
    bad = lambda leaf: leaf.at[0, 0].set(jnp.inf) if getattr(leaf, "ndim", 0) == 2 else leaf
    return state.replace(opt_state=jax.tree.map(bad, state.opt_state))


@pytest.mark.parametrize("what", ["parameters", "optimizer state"])
def test_checkpoints_that_are_not_finite(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier versions saved them. They are left out with a line, and no finite one at all is an error."""
    folder, like = tmp_path / "checkpoints", new_state()
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, like, {"place": 1})
    for step in (2, 3):
        checkpoints.save(step, spoil_state(like, what), {"place": step})
    checkpoints.close()
    _, found = restore_params(folder, like.params)
    assert found == (1 if what == "parameters" else 3)  # parameters alone are read, and those are good
    said = capsys.readouterr().err
    assert ("checkpoint 1 is taken. Newer ones are not used: 3: it holds numbers" in said) is (what == "parameters")
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore_latest(like)
    checkpoints.close()
    assert restored is not None and restored[1] == {"place": 1}
    assert [note.partition(" (")[0] for note in restored[2]] == [f"Checkpoint {step} is not used" for step in (3, 2)]
    assert sorted(steps_in(folder)) == [1]

    checkpoints = Checkpoints(tmp_path / "bad")
    checkpoints.save(7, spoil_state(like, "parameters"), {})
    checkpoints.wait()
    with pytest.raises(
        CheckpointError, match=r"No checkpoint in .* can be read: 7: it holds numbers that are not finite"
    ):
        restore_params(tmp_path / "bad", like.params)
    with pytest.raises(CheckpointError, match=r"7: it holds numbers that are not finite.*To start from the beginning"):
        checkpoints.restore_latest(like)
    checkpoints.close()
    assert steps_in(tmp_path / "bad") == [7]


def test_a_copy_in_an_object_store_keeps_what_the_disk_keeps(tmp_path: Path) -> None:
    given = settings(1, keep=1, keep_best=1, folder="memory://ruined")
    try:
        with pytest.raises(TrainingStopped, match="of step 8 is the last good one"):
            run(tmp_path / "grpo", settings=given, step=absurd_at(9))
        copies = ObjectStoreCopy(tmp_path / "grpo" / "checkpoints", "memory://ruined/grpo").steps()
        assert sorted(copies) == kept(tmp_path / "grpo") and copies[0] == 8
    finally:
        fsspec.filesystem("memory").rm("/ruined", recursive=True)


class Entropy(CollapseDetector):
    """Reads an entropy that doubles after step 10."""

    def on_row(self, step: int, row: Row) -> None:
        super().on_row(step, row | {"train/entropy": 1.0 if step <= 10 else 3.0})


def test_after_a_collapse_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    hooks: list[Hook] = [Entropy(tmp_path, 2.0)]
    with pytest.raises(TrainingStopped, match=r"entropy is 3\.000 nats at step 20.*of step 10 is the last good one"):
        run(tmp_path, settings=settings(5, total=40, keep=1), hooks=hooks)
    assert kept(tmp_path) == [10]
    assert json.loads((tmp_path / STOPPED).read_text())["last_good"] == 10
