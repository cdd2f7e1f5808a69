"""The host loop: feeds batches to a compiled step, logs, evaluates, saves, and resumes where it was.

The step is compiled once, ahead of the loop; a second compilation is impossible, since the compiled step rejects other shapes. Metrics are fetched one step
after the window they belong to, so the device never waits for the log.

Several processes run the same loop side by side: each reads its rows of every batch, all save and evaluate, and process 0 writes the log.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cotgrpo.accelerators.mfu import StepFlops
from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.checkpoints.object_store_copy import ObjectStoreCopy
from cotgrpo.distributed.processes import (
    Signals,
    gather_rows,
    global_arrays,
    is_process_0,
    process_console,
    process_rows,
    put_on_mesh,
)
from cotgrpo.logs.metrics_log import MetricsLog
from cotgrpo.logs.progress import ProgressLine
from cotgrpo.sharding import batch_sharding, state_sharding
from cotgrpo.types import Metrics, TrainState

TIME_KEYS = (
    "train/step_time",
    "train/tokens_per_sec",
    "train/padded_tokens_per_sec",
    "train/rollout_tokens_per_sec",
    "train/mfu",
)
"""The keys of a row that differ between a run and its repetition; all others are the same to the bit."""


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why and what to try."""


class Interrupted(RuntimeError):
    """A signal ended the run after it was saved. `signal_number` is SIGINT or SIGTERM."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How a loop runs; nothing here changes what is learned.

    Attributes:
        title: shown in the progress line.
        total_steps: the run is complete after this many.
        log_every: steps of one row in `metrics.jsonl`.
        eval_every: steps between evaluations; 0: only after the last.
        checkpoint_every: steps between checkpoints; there is always one after the last.
        keep: how many of the newest checkpoints stay.
        keep_best: how many of those with the lowest held-out loss stay beside them; where it is not 0, every evaluation is saved.
        max_skipped: this many updates skipped in a row stop the run.
        flops: what the metric `mfu` is counted by; None: it is not logged.
    """

    title: str
    total_steps: int
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 100
    keep: int = 3
    keep_best: int = 0
    max_skipped: int = 10
    flops: StepFlops | None = None


class Window:
    """The steps since the last row of the log: running sums on the host, and the newest metrics still on the device.

    Sums are kept in float64 in the order of the steps, and travel in the checkpoint, so a run that was cut inside a window writes the same row.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {"sums": {}, "crc": 0}
        self.sums: dict[str, list[float]] = saved["sums"]
        self.crc: int = saved["crc"]
        self.on_device: list[Metrics] = []
        self.row_crcs: list[np.ndarray] = []
        self.steps_here, self.seconds = 0, 0.0  # of this process

    def add(self, metrics: Metrics, batch: Any, rows: np.ndarray) -> None:
        """One step: its metrics, and its batch, of which this process has these rows."""
        self.on_device.append(metrics)
        self.steps_here += 1
        tokens, segments = (np.ascontiguousarray(array) for array in (batch.tokens, batch.segment_ids))
        crcs = [zlib.crc32(segments[row], zlib.crc32(tokens[row])) for row in rows]
        self.row_crcs.append(np.asarray(crcs, np.uint32))

    def settle(self, rows: np.ndarray, batch_size: int) -> list[Metrics]:
        """Waits for the steps, adds their metrics to the sums, and returns them one by one."""
        arrived = jax.device_get(self.on_device)
        if arrived:
            for crcs in gather_rows(rows, np.stack(self.row_crcs), batch_size):
                self.crc = zlib.crc32(crcs.tobytes(), self.crc)
        self.on_device, self.row_crcs = [], []
        for metrics in arrived:
            for name, metric in metrics.items():
                sums = self.sums.setdefault(name, [0.0, 0.0])
                sums[0] += float(metric.total)
                sums[1] += float(metric.weight)
        return arrived

    def saved(self) -> dict[str, Any]:
        return {"sums": self.sums, "crc": self.crc}

    def row(self, flops: StepFlops | None = None) -> dict[str, Any]:
        """The row of the log. Of a window that a resume cut in two, the times are those of the steps after it."""
        row: dict[str, Any] = {
            f"train/{name}": total / weight if weight else None for name, (total, weight) in self.sums.items()
        }
        row["train/skipped"] = int(self.sums["skipped"][0])
        row["train/batch_crc"] = self.crc
        row["train/step_time"] = self.seconds / self.steps_here
        row["train/tokens_per_sec"] = row["train/tokens"] / row["train/step_time"]
        row["train/padded_tokens_per_sec"] = row["train/padded_tokens"] / row["train/step_time"]
        if "rollout_tokens" in self.sums:
            row["train/rollout_tokens_per_sec"] = row["train/rollout_tokens"] / row["train/step_time"]
        if flops is not None:
            supervised = self.sums["loss"][1] / self.sums["tokens"][1]  # the weight of a loss is that of its tokens
            row["train/mfu"] = flops.mfu(row["train/tokens"], supervised, row["train/step_time"])
        return row


def train(
    step: Any,
    state: TrainState,
    batches: Any,
    folder: Path,
    settings: LoopSettings,
    *,
    extra: tuple[Any, ...] = (),
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
    checkpoint_folder: str | Path | None = None,
    mirror: ObjectStoreCopy | None = None,
) -> TrainState:
    """Trains to `settings.total_steps`, from the newest checkpoint in `folder` if there is one.

    After a kill at any moment the same call goes on from the last checkpoint, and the rows of `metrics.jsonl` are, but for times, those of a
    run that was never killed; `train/batch_crc` in them shows that the data was the same.

    Args:
        step: from `jit_step`: `step(state, batch, *extra) -> (state, metrics)`. With a mesh, state and `extra` are put on it, also if the checkpoint
            was written on another. Several processes need one.
        state: the state before the first step. It is donated: use what is returned.
        batches: an endless iterator with `get_state()`, for `Checkpoints.save`, and `set_state()`, of whole batches of NumPy arrays, of which this process's rows are read. One whose
            batches depend on the parameters has `follow(params)` too, called before each batch is taken; its batches may be arrays on the devices, whole on each.
            One may have `observed()`, the metrics that the host finds in the batch of the step just begun.
        folder: the run folder.
        settings: how the loop runs.
        extra: further arguments of the step (a reference's parameters).
        evaluate: `evaluate(params)` -> numbers to log as `eval/...`.
        watch: is told each row of the log, and may raise TrainingStopped.
        console: where the progress goes; None: the terminal of process 0.
        checkpoint_folder: where the checkpoints go, as `Checkpoints` has it; None: `folder/checkpoints`. Of several processes on several machines all see it.
        mirror: where they are copied to.

    Returns:
        The state after the last step.

    Raises:
        TrainingStopped: too many skipped updates in a row.
        Interrupted: SIGINT or SIGTERM came; the run was saved.
        CheckpointError: the disk is full, or no checkpoint can be read.
    """
    console = console or process_console()
    if jax.process_count() > 1 and getattr(step, "mesh", None) is None:
        raise ValueError("Several processes share one mesh: expected a step from jit_step(step, mesh=make_mesh(...)).")
    state, extra = on_mesh_of(step, state), on_mesh_of(step, extra)
    place = checkpoint_folder or folder / "checkpoints"
    checkpoints = Checkpoints(place, settings.keep, settings.keep_best, mirror=mirror)
    try:
        state, position = resume(checkpoints, state, batches, console)
        done = int(state.step)
        if done >= settings.total_steps:
            console.print(f"{settings.title}: all {settings.total_steps} steps are done already.")
            return state
        log = MetricsLog(folder, done) if is_process_0() else None
        try:
            with Signals() as signals, ProgressLine(settings.title, settings.total_steps, done, console) as line:
                loop = Loop(step, batches, settings, extra, evaluate, watch, checkpoints, log, line, signals)
                return loop.run(state, position)
        finally:
            if log is not None:
                log.close()
    finally:
        checkpoints.close()


def on_mesh_of(step: Any, tree: Any) -> Any:
    """The arrays where a step from `jit_step(step, mesh=mesh)` wants them, so that none is moved at every call; without a mesh, as they are."""
    mesh = getattr(step, "mesh", None)
    return tree if mesh is None else put_on_mesh(tree, state_sharding(tree, mesh))


def resume(
    checkpoints: Checkpoints, state: TrainState, batches: Any, console: Console
) -> tuple[TrainState, dict[str, Any]]:
    """The state to start from and the loop's counters; sets the data iterator to its place."""
    found = checkpoints.restore_latest(state)
    if found is None:
        return state, {"skipped_in_a_row": 0, "window": None}
    state, position, notes = found
    for note in notes:
        console.print(f"[yellow]{note}[/yellow]", highlight=False)
    batches.set_state(position["batches"])
    console.print(f"Resuming after step {int(state.step)}.")
    return state, position


@dataclasses.dataclass
class Loop:
    """One call of `train`: what its steps share."""

    step: Any
    batches: Any
    settings: LoopSettings
    extra: tuple[Any, ...]
    evaluate: Callable[[Any], dict[str, float]] | None
    watch: Callable[[dict[str, Any]], None] | None
    checkpoints: Checkpoints
    log: MetricsLog | None  # process 0 has it
    line: ProgressLine
    signals: Signals
    skipped_in_a_row: int = 0
    clock: float = 0.0
    rows: np.ndarray = dataclasses.field(
        default_factory=lambda: np.arange(0)
    )  # of every batch, those that this process reads
    batch_size: int = 0
    closed: tuple[int, Window] | None = None  # a full window whose row is not written yet

    def run(self, state: TrainState, position: dict[str, Any]) -> TrainState:
        self.skipped_in_a_row = position["skipped_in_a_row"]
        window = Window(position["window"])
        batch = self.next_batch(state)
        on_devices = self.on_devices(batch)
        self.rows, self.batch_size = self.own_rows(batch), len(batch.tokens)
        compiled = self.step.lower(state, on_devices, *self.extra).compile()
        self.clock = time.perf_counter()
        total = self.settings.total_steps
        for number in range(int(state.step) + 1, total + 1):
            taken = self.batches.get_state()
            state, metrics = compiled(state, on_devices, *self.extra)
            window.add(metrics | self.observed(), batch, self.rows)
            if number < total:
                batch = self.next_batch(state)  # made, and copied to the device, while it works
                on_devices = self.on_devices(batch)
            self.write_closed()
            if number % self.settings.log_every == 0 or number == total:
                self.closed, window = (number, window), Window()
            self.pause(number, state, taken, window)
            self.line.advance(number)
        self.checkpoints.wait()
        return state

    def own_rows(self, batch: Any) -> np.ndarray:
        """The rows of every batch that this process reads."""
        if jax.process_count() == 1:
            return np.arange(len(batch.tokens))
        return process_rows(batch_sharding(self.step.mesh), batch.tokens.shape)

    def on_devices(self, batch: Any) -> Any:
        """The batch as the step takes it, on its way to where the step wants it."""
        mesh = getattr(self.step, "mesh", None)
        return jax.device_put(batch) if mesh is None else global_arrays(batch_sharding(mesh), batch)

    def next_batch(self, state: TrainState) -> Any:
        """The next batch; a source that draws it with the student is told the newest parameters first."""
        if hasattr(self.batches, "follow"):
            self.batches.follow(state.params)
        return next(self.batches)

    def observed(self) -> Metrics:
        """What the host finds in the newest batch; nothing, for text."""
        return self.batches.observed() if hasattr(self.batches, "observed") else {}

    def write(self, number: int, values: dict[str, Any]) -> None:
        """One row of the log, on process 0, which stops the others where it stops."""
        if self.log is None:
            return
        self.log.write(number, values)
        if self.watch is not None:
            self.watch({"step": number} | values)

    def pause(self, number: int, state: TrainState, taken: dict[str, Any], window: Window) -> None:
        """What has to wait for the device: evaluation and checkpoints, where they are due after this step."""
        settings = self.settings
        last, signalled = number == settings.total_steps, self.signals.stop_after(number)
        evaluating = self.evaluate is not None and (last or (settings.eval_every and number % settings.eval_every == 0))
        saving = last or signalled is not None or number % settings.checkpoint_every == 0
        saving = saving or bool(evaluating and settings.keep_best)
        if not evaluating and not saving:
            return
        self.write_closed()
        self.count_skipped(self.wait_for(window))
        evaluated = self.evaluate(state.params) if evaluating and self.evaluate is not None else {}
        if evaluated:
            self.write(number, {f"eval/{name}": value for name, value in evaluated.items()})
        if saving:
            if signalled is not None:
                again = " Once more stops at once." if jax.process_count() == 1 else ""
                self.line.say(f"Stopping: saving first.{again}")
            # The rows up to here are on disk before the checkpoint is, so none is missing after a resume.
            counters = {"skipped_in_a_row": self.skipped_in_a_row, "window": window.saved()}
            self.checkpoints.save(number, state, {"batches": taken} | counters, evaluated.get("loss"))
        if signalled is not None and not last:
            self.checkpoints.wait()
            raise Interrupted(
                signalled, f"Stopped by a signal after step {number}, and saved: run the same command to go on."
            )
        self.clock = time.perf_counter()

    def write_closed(self) -> None:
        """Writes the row of the last full window, if it is not written yet; waits for its steps."""
        if self.closed is None:
            return
        number, window = self.closed
        self.closed = None
        steps = self.wait_for(window)
        row = window.row(self.settings.flops)
        self.write(number, row)
        self.line.show(number, row)
        self.count_skipped(steps)

    def wait_for(self, window: Window) -> list[Metrics]:
        """Settles the window, and counts the time since the clock was set as spent on it."""
        steps = window.settle(self.rows, self.batch_size)
        now = time.perf_counter()
        window.seconds += now - self.clock
        self.clock = now
        return steps

    def count_skipped(self, steps: list[Metrics]) -> None:
        for metrics in steps:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped"].total else 0
            if self.skipped_in_a_row >= self.settings.max_skipped:
                raise TrainingStopped(
                    f"{self.skipped_in_a_row} updates in a row were skipped because the loss or the gradient was not finite. "
                    "Lower the learning rate or clip harder, and check the data; earlier checkpoints are intact."
                )
