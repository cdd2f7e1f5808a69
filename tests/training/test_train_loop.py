"""The host loop: killed, interrupted or short of disk at any moment, a run resumes as if nothing had happened.

`helpers/training_run.py` is the training run that the tests kill.
"""

from __future__ import annotations

import gc
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import training_run
from helpers.checkpoint_states import ORBAX_LEAVES_ERRORS, small_file_system
from helpers.training_run import (
    STUDENT,
    Batches,
    as_arrays,
    half_written,
    new_params,
    new_state,
    optimizer,
    run,
)
from rich.console import Console

import cotgrpo
from cotgrpo import Pair, ReferenceKl, TrainState
from cotgrpo.accelerators.mfu import StepFlops
from cotgrpo.checkpoints.manager import CheckpointError
from cotgrpo.cli import run as command
from cotgrpo.config import CheckpointConfig
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.training.loop import TIME_KEYS, Interrupted, LoopSettings, TrainingStopped


def lasting(folder: Path) -> list[str]:
    """The rows of a run as text, without the times."""
    return [json.dumps({k: v for k, v in row.items() if k not in TIME_KEYS}) for row in read_metrics(folder)]


def assert_same_run(folder: Path, state: Any, baseline: tuple[Path, list[np.ndarray]]) -> None:
    assert lasting(folder) == lasting(baseline[0])
    for got, want in zip(as_arrays(state) if isinstance(state, TrainState) else state, baseline[1], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """The folder and the final state of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, as_arrays(run(folder))


def start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", training_run.__file__, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path) -> tuple[list[np.ndarray], str]:
    process = start(folder)
    output, _ = process.communicate(timeout=120)  # a thread that never ends would show here
    assert process.returncode == 0, output
    with np.load(folder / "final.npz") as final:
        return list(final.values()), output


def kill_after(folder: Path, batches: int, seconds: float, *, saving: bool = False) -> bool:
    """Kills a run after that many batches and some time, or while it saves next. Returns False if it ended first."""
    process = start(folder)
    assert process.stdout is not None
    numbers: Iterator[str] = (line for line in process.stdout if line.strip().isdigit())
    for _, _number in zip(range(batches), numbers, strict=False):
        pass
    time.sleep(seconds)
    while saving and process.poll() is None and not half_written(folder):
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """The folder and the final state of a whole process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finish(folder)[0]


def test_a_run_that_is_killed_again_and_again_is_the_same_run(tmp_path: Path, undisturbed: Any) -> None:
    """Before the first checkpoint, while one is being written, and at a random moment."""
    folder = tmp_path / "killed"
    rng = random.Random(time.time_ns())
    assert kill_after(folder, 3, 0.0)
    for _ in range(5):  # the folder may have got its name before the signal arrived
        assert kill_after(folder, 6, 0.0, saving=True)
        if half_written(folder):
            break
    assert half_written(folder)
    moment = (rng.randrange(10, 18), rng.random() * 0.05)  # ten batches: the first checkpoint is complete
    assert kill_after(folder, *moment), moment
    final, output = finish(folder)
    assert "Resuming after step" in output
    assert_same_run(folder, final, undisturbed)
    assert len(read_metrics(folder)) == 9 + 7


@pytest.mark.slow
def test_eight_kills_at_random_moments(tmp_path: Path, undisturbed: Any) -> None:
    folder = tmp_path / "killed"
    rng = random.Random(time.time_ns())
    kills = 0
    while kills < 8:
        killed = kill_after(folder, rng.randrange(0, 12), rng.random() * 0.1, saving=rng.random() < 0.3)
        kills += killed
        if not killed:  # the run ended first: again from the start
            assert_same_run(folder, finish(folder)[0], undisturbed)
            folder = tmp_path / f"killed{kills}"
    assert_same_run(folder, finish(folder)[0], undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_resume_is_the_same_run(tmp_path: Path, baseline: Any, number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def interrupt(taken: int, batch: Any) -> Any:
        if taken == 19:  # while step 18 is being worked on
            signal.raise_signal(number)
        return batch

    text = io.StringIO()
    with pytest.raises(Interrupted, match="after step 18, and saved: run the same command") as caught:
        run(tmp_path, Batches(interrupt), console=Console(file=text))
    assert "Stopping: saving first. Once more stops at once." in text.getvalue()
    assert caught.value.signal_number == number
    assert (tmp_path / "checkpoints" / "18").is_dir()
    assert {n: signal.getsignal(n) for n in before} == before
    assert_same_run(tmp_path, run(tmp_path), baseline)


def test_a_second_signal_acts_at_once(tmp_path: Path, baseline: Any) -> None:
    def insist(taken: int, batch: Any) -> Any:
        if taken == 19:
            signal.raise_signal(signal.SIGINT)
            # Python runs its handlers when it comes to it, and two signals before that are one.
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            time.sleep(10)
        return batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Batches(insist))
    assert not (tmp_path / "checkpoints" / "18").exists()
    assert_same_run(tmp_path, run(tmp_path), baseline)


def test_a_run_outside_the_main_thread_ends_with_its_threads(tmp_path: Path, baseline: Any) -> None:
    """Signals belong to the main thread; everything else works. A finished run trains no further."""
    before = set(threading.enumerate())
    states: list[TrainState] = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same_run(tmp_path, states[0], baseline)
    text = io.StringIO()
    assert_same_run(tmp_path, run(tmp_path, console=Console(file=text)), baseline)
    assert "all 60 steps are done already" in text.getvalue()
    # Orbax's event loop keeps the idle workers in which it makes folders and reads metadata.
    left = {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
    assert left <= before


def poisoned(bad: Any, mask_value: float = float("nan")) -> Batches:
    """Batches whose loss is not finite where `bad(number)`."""
    return Batches(
        lambda n, batch: batch.replace(loss_mask=np.full_like(batch.loss_mask, mask_value)) if bad(n) else batch
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_updates_without_a_finite_loss_are_skipped_and_counted(tmp_path: Path, value: float) -> None:
    """Five bad steps, a good one, five bad ones: never six in a row."""
    settings = LoopSettings("grpo", total_steps=14, log_every=1, checkpoint=CheckpointConfig(every=4), max_skipped=6)
    state = run(tmp_path, poisoned(lambda n: 3 <= n <= 13 and n != 8, value), settings)
    rows = [row for row in read_metrics(tmp_path) if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    assert [row["train/loss"] is None for row in rows] == [bool(row["train/skipped"]) for row in rows]
    assert all(np.isfinite(leaf).all() for leaf in as_arrays(state))


def test_too_many_skipped_updates_stop_the_run_and_a_resume_does_so_too(tmp_path: Path) -> None:
    """Steps 3 and later are skipped: none is saved, and the second call starts at step 2."""
    settings = LoopSettings("grpo", total_steps=30, log_every=5, checkpoint=CheckpointConfig(every=2), max_skipped=6)
    for _ in range(2):
        batches = poisoned(lambda n: n >= 3)
        with pytest.raises(TrainingStopped, match=r"6 updates in a row were skipped.* step 2 is the last good one"):
            run(tmp_path, batches, settings)
        assert batches.taken == 9  # eight steps, and the batch made ready for the ninth
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_the_step_is_compiled_once_and_the_state_donated(tmp_path: Path) -> None:
    """Also after a resume: the step is traced once, and compiled ahead of the loop, never by a call."""
    pure = cotgrpo.make_grpo_step(STUDENT, optimizer())
    for total in (6, 12):
        traced: list[int] = []

        def step(*arguments: Any, traced: list[int] = traced) -> Any:
            traced.append(1)
            return pure(*arguments)

        jitted = cotgrpo.jit_step(step)
        state = new_state()
        run(
            tmp_path,
            settings=LoopSettings("grpo", total, log_every=5, checkpoint=CheckpointConfig(every=4)),
            step=jitted,
            state=state,
        )
        assert len(traced) == 1 and jitted._cache_size() == 0
        if total == 6:
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_run_resumes_on_another_mesh(tmp_path: Path) -> None:
    """Saved from 8 devices, restored to 4 x 2 (the same numbers, spread as that mesh wants them), and to one device."""
    first = LoopSettings("grpo", total_steps=4, checkpoint=CheckpointConfig(every=4))
    reference = (new_params(9),)

    def call(settings: LoopSettings, **mesh: int) -> TrainState:
        pure = cotgrpo.make_grpo_step(STUDENT, optimizer(), ReferenceKl(Pair(), 0.1), reference=STUDENT)
        step = cotgrpo.jit_step(pure, mesh=cotgrpo.make_mesh(**mesh) if mesh else None)
        return run(tmp_path, settings=settings, step=step, extra=reference)

    saved = call(first, fsdp=8)
    assert len(saved.params["head"].sharding.device_set) == 8
    for mesh in ({"fsdp": 4, "tensor": 2}, {}):
        restored = call(first, **mesh)  # all steps are done: nothing is compiled
        for got, want in zip(as_arrays(restored), as_arrays(saved), strict=True):
            np.testing.assert_array_equal(got, want)
        assert len(restored.params["head"].sharding.device_set) == (8 if mesh else 1)
    assert int(call(LoopSettings("grpo", total_steps=8), fsdp=4, tensor=2).step) == 8


def test_a_grpo_run_emits_every_promised_metric(tmp_path: Path) -> None:
    step = cotgrpo.make_grpo_step(STUDENT, optimizer(), ReferenceKl(Pair(), 0.1), reference=STUDENT)
    flops = StepFlops(token=3.0, supervised=5.0, rate=7.0)
    settings = LoopSettings("grpo", total_steps=6, log_every=3, flops=flops)
    extra = (new_params(9),)
    run(tmp_path, settings=settings, step=cotgrpo.jit_step(step), extra=extra)
    promised = "loss reward ghost_prob drawn_prob match_rate entropy kl grad_norm learning_rate"
    promised += " tokens_per_sec padded_tokens_per_sec step_time mfu"
    *rows, evaluation = read_metrics(tmp_path)
    for row in rows:
        for name in promised.split():
            assert isinstance(row[f"train/{name}"], float), name
        real = row["train/tokens"] / row["train/step_time"]
        assert row["train/tokens_per_sec"] == pytest.approx(real)
        assert row["train/padded_tokens_per_sec"] == pytest.approx(8 * 24 / row["train/step_time"])
        assert row["train/tokens"] < 8 * 24
        supervised = (row["train/mfu"] * 7 * row["train/step_time"] - 3 * row["train/tokens"]) / 5
        assert 0 < supervised <= row["train/tokens"]
    assert evaluation.keys() == {"step", "eval/loss"}


def test_step_time_counts_every_step_and_no_pause(tmp_path: Path) -> None:
    """Steps of 20 ms or more, with pauses of 300 ms for evaluation inside the windows of the log."""
    batches_at, evaluated_at = [], []

    def slowly(number: int, batch: Any) -> Any:
        batches_at.append(time.perf_counter())
        time.sleep(0.02)
        return batch

    def evaluate(params: Any) -> dict[str, float]:
        evaluated_at.append(time.perf_counter())
        time.sleep(0.3)
        return {"loss": 0.0}

    settings = LoopSettings("grpo", total_steps=24, log_every=8, eval_every=5, checkpoint=CheckpointConfig(every=7))
    run(tmp_path, Batches(slowly), settings, evaluate=evaluate)
    times = [row["train/step_time"] for row in read_metrics(tmp_path) if "train/step_time" in row]
    # The second batch is made while the first step runs, and the last evaluation follows the last step.
    wall = evaluated_at[-1] - batches_at[1]
    pauses = 0.3 * (len(evaluated_at) - 1)
    assert len(times) == 3 and len(evaluated_at) == 5
    assert 24 * 0.019 < 8 * sum(times) < wall - pauses / 2, (times, wall)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    yield from small_file_system(tmp_path / "disk")


@ORBAX_LEAVES_ERRORS
def test_a_full_disk_is_explained_and_after_making_room_the_run_resumes(
    small_disk: Callable[[str], Path], baseline: Any
) -> None:
    folder = small_disk("180k") / "run"
    with pytest.raises(CheckpointError, match=r"The disk is full: .*run.* could not be written .*make room") as caught:
        run(folder)
    assert str(folder) in str(caught.value)
    gc.collect()
    kept = [path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept, "the disk was full before the first checkpoint: the test needs a larger one"
    small_disk("20m")
    text = io.StringIO()
    assert_same_run(folder, run(folder, console=Console(file=text)), baseline)
    assert f"Resuming after step {max(map(int, kept))}" in text.getvalue()


@ORBAX_LEAVES_ERRORS
def test_a_full_disk_is_a_line_of_a_command(
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What Orbax logs on the way is a line too: its tracebacks are those of the error that arrives."""
    folder = small_disk("180k") / "run"
    assert command(lambda rest, console: run(folder), []) == 2
    error = capsys.readouterr().err
    assert error.startswith("cotgrpo: The disk is full: ") and error.count("\n") == 1
    assert "Traceback" not in caplog.text and "Save Finalize thread" in caplog.text
    assert all("\n" not in record.getMessage() and record.exc_info is None for record in caplog.records)
    gc.collect()


def test_progress_in_a_log_and_in_a_terminal(tmp_path: Path) -> None:
    settings = LoopSettings("a [bold] run", total_steps=12, log_every=4)
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, width=60, force_terminal=terminal, color_system=None)
        run(tmp_path / str(terminal), settings=settings, console=console)
        lines = text.getvalue().splitlines()
        if terminal:
            assert any("12/12  loss" in line and "reward" in line and "tok/s" in line for line in lines)
        else:
            assert [line.split("  ")[:2] for line in lines] == [["a [bold] run", f"{step}/12"] for step in (4, 8, 12)]
            assert all("loss" in line and "reward" in line and "tok/s" in line for line in lines)
        assert all(len(line) <= 80 for line in lines if "\r" not in line and "\x1b" not in line)
