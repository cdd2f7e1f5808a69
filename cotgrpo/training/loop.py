"""The host loop: feed batches to a compiled step, run the hooks, and resume from the newest checkpoint.

The step is compiled once, before the loop. A second compilation is impossible, since the compiled step rejects other
shapes. Metrics are fetched one step after the window they belong to, so the device never waits for the log.

Several processes run the same loop. Each reads its rows of every batch, all save and evaluate, and process 0 writes the
log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np
from rich.console import Console

from cotgrpo.accelerators.memory import check_step, memory_in_use
from cotgrpo.accelerators.mfu import StepFlops
from cotgrpo.checkpoints.location import CheckpointLocation
from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.checkpoints.stops import clear_stop, last_good_step, record_stop
from cotgrpo.config import CheckpointConfig
from cotgrpo.distributed.interrupts import StopRequested
from cotgrpo.distributed.processes import (
    Signals,
    gather_rows,
    global_arrays,
    is_process_0,
    on_process_0,
    process_console,
    process_rows,
    put_on_mesh,
)
from cotgrpo.logs.metrics_log import MetricsLog
from cotgrpo.logs.progress import ProgressLine
from cotgrpo.sharding import batch_sharding, state_sharding
from cotgrpo.terminal import say
from cotgrpo.training.hooks import (
    CheckpointHook,
    EvaluationHook,
    Hook,
    LogHook,
    Pause,
    ProgressHook,
    Row,
    Schedule,
    UpdatesSkipped,
)
from cotgrpo.training.hooks import Interrupted as Interrupted
from cotgrpo.training.hooks import TrainingStopped as TrainingStopped
from cotgrpo.types import GhostBatch, Metrics, Params, SftBatch, TrainState

if TYPE_CHECKING:
    from cotgrpo.types import PyTree

Batch = SftBatch | GhostBatch

TIME_KEYS = (
    "train/step_time",
    "train/tokens_per_sec",
    "train/padded_tokens_per_sec",
    "train/rollout_tokens_per_sec",
    "train/mfu",
    "train/memory_gb",
    "train/peak_memory_gb",
    "train/host_memory_gb",
)
"""The keys of a row that differ between a run and its repetition. All others are equal to the bit."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How a loop runs. Nothing here changes what is learned.

    Attributes:
        title: shown in the progress line.
        total_steps: the run is complete after this many.
        log_every: steps per row of `metrics.jsonl`.
        eval_every: steps between evaluations; 0: only after the last.
        checkpoint: when and where checkpoints are saved, and which of them stay.
        max_skipped: this many skipped updates in a row stop the run.
        flops: needed for the metric `mfu`; None leaves it out.
        announce: print what is compiled, and how long the training will take.
    """

    title: str
    total_steps: int
    log_every: int = 10
    eval_every: int = 0
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    max_skipped: int = 10
    flops: StepFlops | None = None
    announce: bool = False


@runtime_checkable
class BatchSource(Protocol):
    """An endless iterator of batches whose position can be saved.

    Batches are NumPy arrays of the global shape, and each process fills its own rows. Or they are arrays on the
    devices, whole on each of them.

    A source may have two more methods. `set_params(params)` is called before each batch is taken, for batches that
    depend on the parameters. `observed()` returns metrics that the host finds in the batch of the newest step.
    """

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Window:
    """The steps since the last row of the log: running sums on the host, and the newest metrics still on the device.

    Sums are kept in float64 in the order of the steps. Checkpoints hold them, so a run that was cut inside a window
    writes the same row.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {"sums": {}, "crc": 0}
        self.sums: dict[str, list[float]] = saved["sums"]
        self.crc: int = saved["crc"]
        self.on_device: list[Metrics] = []
        self.row_crcs: list[np.ndarray] = []
        self.steps_here, self.seconds = 0, 0.0  # of this process

    def add(self, metrics: Metrics, batch: Batch, rows: np.ndarray) -> None:
        """Add one step: its metrics, and its batch, and the rows of it that this process has."""
        self.on_device.append(metrics)
        self.steps_here += 1
        tokens, segments = (np.ascontiguousarray(array) for array in (batch.tokens, batch.segment_ids))
        crcs = [zlib.crc32(segments[row], zlib.crc32(tokens[row])) for row in rows]
        self.row_crcs.append(np.asarray(crcs, np.uint32))

    def settle(self, rows: np.ndarray, batch_size: int) -> list[Metrics]:
        """Wait for the steps, add their metrics to the sums, and return them one by one."""
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

    def row(self, flops: StepFlops | None = None) -> Row:
        """Return the row of the log. If a resume cut the window in two, the times are those of the steps after it."""
        row: Row = {f"train/{name}": total / weight if weight else None for name, (total, weight) in self.sums.items()}
        row["train/skipped"] = int(self.sums["skipped"][0])
        row["train/batch_crc"] = self.crc
        row["train/step_time"] = self.seconds / self.steps_here
        row["train/tokens_per_sec"] = row["train/tokens"] / row["train/step_time"]
        row["train/padded_tokens_per_sec"] = row["train/padded_tokens"] / row["train/step_time"]
        row |= {f"train/{name}": value for name, value in memory_in_use().items()}
        if "rollout_tokens" in self.sums:
            row["train/rollout_tokens_per_sec"] = row["train/rollout_tokens"] / row["train/step_time"]
        if flops is not None:
            supervised = self.sums["loss"][1] / self.sums["tokens"][1]  # the weight of a loss is its number of tokens
            row["train/mfu"] = flops.mfu(row["train/tokens"], supervised, row["train/step_time"])
        return row


def train(
    step: Any,
    state: TrainState,
    batches: BatchSource,
    folder: Path,
    settings: LoopSettings,
    *,
    extra: tuple[Params, ...] = (),
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    hooks: Sequence[Hook] = (),
    console: Console | None = None,
) -> TrainState:
    """Train to `settings.total_steps`, from the newest checkpoint of `folder` if there is one.

    After a kill at any moment, the same call resumes from the last checkpoint. The rows of `metrics.jsonl` are then
    those of a run that was never killed, except for times. `train/batch_crc` in them shows that the data was the same.

    Args:
        step: from `jit_step`: `step(state, batch, *extra) -> (state, metrics)`. If it has a mesh, state and `extra` are
            put on it, even if the checkpoint was written on another. Several processes need a mesh.
        state: the state before the first step. It is donated: use the returned one.
        batches: where the batches come from.
        folder: the run folder.
        settings: how the loop runs. Several processes on several machines must all see the folder of the checkpoints.
        extra: further arguments of the step (a reference's parameters).
        evaluate: `evaluate(params)` -> numbers to log as `eval/...`.
        hooks: further hooks. They see each row after the log has it.
        console: where the progress goes; None: the terminal of process 0.

    Returns:
        The state after the last step.

    Raises:
        TrainingStopped: too many skipped updates in a row, or a hook stopped the run. What was saved since the student
            was last known to be good is moved to `ruined_checkpoints`, and `stopped.json` says why.
        Interrupted: SIGINT or SIGTERM arrived, and the run was saved.
        CheckpointError: the disk is full, or no checkpoint can be read.
    """
    console = console or process_console()
    if jax.process_count() > 1 and getattr(step, "mesh", None) is None:
        raise ValueError("Several processes share one mesh: expected a step from jit_step(step, mesh=make_mesh(...)).")
    state, extra = on_mesh_of(step, state), on_mesh_of(step, extra)
    keep, location = settings.checkpoint, CheckpointLocation.of(folder, settings.checkpoint.folder)
    schedule = Schedule(
        total_steps=settings.total_steps,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        save_every=keep.every,
        save_evaluations=evaluate is not None and keep.keep_best > 0,
    )
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(location.folder, keep.keep, keep.keep_best, copy=location.copy)
        stack.callback(checkpoints.close)
        state, position = resume(checkpoints, state, batches, console)
        done = int(state.step)
        if done >= settings.total_steps:
            say(console, f"{settings.title}: all {settings.total_steps} steps are done already.")
            return state
        every_hook = list(hooks)
        if is_process_0():
            log = MetricsLog(folder, done)
            stack.callback(log.close)
            every_hook.insert(0, LogHook(log))
        signals = stack.enter_context(Signals())
        line = stack.enter_context(ProgressLine(settings.title, settings.total_steps, done, console))
        every_hook.append(ProgressHook(line, settings.total_steps, estimated=not settings.announce))
        if evaluate is not None:
            every_hook.append(EvaluationHook(evaluate, schedule))
        every_hook.append(CheckpointHook(checkpoints, schedule, signals, line.say, lambda: clear_stop(folder)))
        for hook in every_hook:
            stack.callback(hook.on_end)
            hook.on_start(done)
        good = on_process_0(lambda: last_good_step(folder)) == done
        good_step = done if good else done - 1
        announce = line.say if settings.announce else lambda text: None
        loop = Loop(step, batches, settings, schedule, extra, every_hook, announce, good_step=good_step)
        try:
            state = loop.run(state, position)
        except TrainingStopped as stop:
            skipped = isinstance(stop, UpdatesSkipped)
            until = min(loop.good_step, loop.number if stop.good_until is None else stop.good_until)
            if skipped and loop.probe_succeeds():
                until = loop.number
            last_good, notes = checkpoints.keep_good(until, certain=skipped and loop.probe is not None)
            rest = record_stop(folder, str(stop), loop.number, last_good)
            raise TrainingStopped(" ".join((str(stop), rest, *notes)), stop.good_until) from None
        checkpoints.wait()
        return state


def on_mesh_of(step: Any, tree: PyTree) -> PyTree:
    """Put the arrays on the mesh of a step from `jit_step(step, mesh=mesh)`, so that no call has to move them.

    Without a mesh, return them unchanged.
    """
    mesh = getattr(step, "mesh", None)
    return tree if mesh is None else put_on_mesh(tree, state_sharding(tree, mesh))


def host_copy(tree: PyTree) -> Callable[[], PyTree]:
    """Copy what this process's devices hold to the host. Return a function that puts it back on them."""

    def copy(array: jax.Array) -> Callable[[], jax.Array]:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            impl, back = jax.random.key_impl(array), copy(jax.random.key_data(array))
            return lambda: jax.random.wrap_key_data(back(), impl=impl)
        shape, sharding = array.shape, array.sharding
        parts = [(np.array(shard.data), shard.device) for shard in array.addressable_shards]
        return lambda: jax.make_array_from_single_device_arrays(
            shape, sharding, [jax.device_put(part, device) for part, device in parts]
        )

    copies = jax.tree.map(copy, tree)
    return lambda: jax.tree.map(lambda back: back(), copies)


def resume(
    checkpoints: Checkpoints, state: TrainState, batches: BatchSource, console: Console
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state to start from and the loop's counters, and restore the position of the data."""
    found = checkpoints.restore_latest(state)
    if found is None:
        return state, {"skipped_in_a_row": 0, "window": None}
    state, position, notes = found
    for note in notes:
        say(console, note, style="yellow")
    batches.set_state(position["batches"])
    say(console, f"Resuming after step {int(state.step)}.")
    return state, position


@dataclasses.dataclass
class Loop:
    """One call of `train`: what its steps share."""

    step: Any
    batches: BatchSource
    settings: LoopSettings
    schedule: Schedule
    extra: tuple[Params, ...]
    hooks: Sequence[Hook]
    say: Callable[[str], None]
    skipped_in_a_row: int = 0
    number: int = 0  # the newest step
    settled_step: int = 0
    trained_step: int = 0  # the newest of the settled steps that was not skipped
    good_step: int = 0  # the newest whose parameters are known to give a finite loss
    probe: tuple[int, Any] | None = None  # the step that the newest unconfirmed checkpoint is of, and its batch
    state: TrainState = dataclasses.field(init=False)  # the newest
    compiled: Any = dataclasses.field(init=False)
    clock: float = 0.0
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(0))  # the rows that this process reads
    batch_size: int = 0
    window: Window = dataclasses.field(default_factory=Window)
    closed: tuple[int, Window] | None = None  # a full window whose row has not been written

    def run(self, state: TrainState, position: dict[str, Any]) -> TrainState:
        """Run every step after the one in `state`."""
        self.skipped_in_a_row, self.window = position["skipped_in_a_row"], Window(position["window"])
        try:
            batch = self.next_batch(state)
        except StopRequested as stop:
            raise Interrupted(
                stop.signal_number,
                f"Stopped by a signal after step {int(state.step)}, with nothing new to save: run the same command to "
                "resume.",
            ) from None
        on_devices = self.to_devices(batch)
        self.rows, self.batch_size = self.own_rows(batch), len(batch.tokens)
        self.settled_step = self.trained_step = int(state.step)
        self.compile(state, on_devices)
        self.clock = time.perf_counter()
        for number in range(int(state.step) + 1, self.settings.total_steps + 1):
            taken, used = self.batches.get_state(), on_devices
            state, metrics = self.compiled(state, on_devices, *self.extra)
            self.state, self.number = state, number
            self.window.add(metrics | self.observed(), batch, self.rows)
            if not self.schedule.is_last(number):
                with contextlib.suppress(StopRequested):  # `pause` then saves, and ends the run
                    batch = self.next_batch(state)  # made, and copied to the device, while the step runs
                    on_devices = self.to_devices(batch)
            self.write_closed()
            if self.schedule.logs(number):
                self.closed, self.window = (number, self.window), Window()
            self.pause(number, taken, used)
            state = self.state
            for hook in self.hooks:
                hook.on_step(number)
        return state

    def compile(self, state: TrainState, batch: Batch) -> None:
        """Compile the step, and print what is compiled, how long it took and the memory that it needs."""
        title, (rows, length) = self.settings.title, batch.tokens.shape
        self.say(f"{title}: compiling the step on {rows} x {length} tokens")
        started = time.perf_counter()
        self.compiled = self.step.lower(state, batch, *self.extra).compile()
        needed = check_step(self.compiled)
        seconds = time.perf_counter() - started
        memory = "" if needed is None else f"; needs {needed / 1e9:.2f} GB of memory on a device"
        self.say(f"{title}: compiled in {seconds:.1f} s{memory}")

    def own_rows(self, batch: Batch) -> np.ndarray:
        """Return the rows of every batch that this process reads."""
        if jax.process_count() == 1:
            return np.arange(len(batch.tokens))
        return process_rows(batch_sharding(self.step.mesh), batch.tokens.shape)

    def to_devices(self, batch: Batch) -> Batch:
        """Start to copy the batch to the devices, in the sharding that the step expects."""
        mesh = getattr(self.step, "mesh", None)
        return jax.device_put(batch) if mesh is None else global_arrays(batch_sharding(mesh), batch)

    def next_batch(self, state: TrainState) -> Batch:
        """Return the next batch. A source that samples from the student gets the newest parameters first."""
        if hasattr(self.batches, "set_params"):
            self.batches.set_params(state.params)
        if hasattr(self.batches, "set_opt_state"):
            self.batches.set_opt_state(state.opt_state)
        return next(self.batches)

    def observed(self) -> Metrics:
        """Return the metrics that the host finds in the newest batch. Text has none."""
        return self.batches.observed() if hasattr(self.batches, "observed") else {}

    def write_row(self, number: int, row: Row) -> None:
        """Pass a row to every hook, on process 0. If a hook stops the run there, the other processes end too."""
        if is_process_0():
            for hook in self.hooks:
                hook.on_row(number, row)

    def pause(self, number: int, taken: dict[str, Any], used: Batch) -> None:
        """Wait for the device and run the hooks that are due after this step, which used the batch `used`."""
        due = [hook for hook in self.hooks if hook.is_due(number)]
        if not due:
            return
        self.write_closed()
        self.count_skipped(self.settle(self.window))
        counters = {"skipped_in_a_row": self.skipped_in_a_row, "window": self.window.saved()}
        pause = Pause(
            number,
            self.state,
            {"batches": taken} | counters,
            self.write_row,
            self.trained_step,
            self.good_until,
            lambda: self.try_again(used, pause),
        )
        for hook in due:
            hook.on_pause(pause)
        if pause.saved_unconfirmed:
            self.probe = (number, used)
        if pause.saved:
            for hook in self.hooks:
                hook.on_checkpoint(number)
        self.clock = time.perf_counter()

    def good_until(self) -> int:
        """Return the last step whose parameters gave a finite loss, and before the first sign that a hook has seen."""
        signs = on_process_0(lambda: [hook.good_until() for hook in self.hooks])
        return min([self.good_step, *(step for step in signs if step is not None)])

    def try_again(self, used: Batch, pause: Pause) -> bool:
        """Return whether the newest parameters can be trained: on the batch of the last step, or on a later one.

        The step takes its state away, so a copy waits on the host.
        """
        for attempt in range(self.settings.max_skipped + 1):
            put_back = host_copy(self.state)
            batch = used if attempt == 0 else self.to_devices(self.next_batch(self.state))
            succeeds = self.is_trained(batch)
            self.state = pause.state = put_back()
            if succeeds:
                return True
        return False

    def probe_succeeds(self) -> bool:
        """Return whether the newest parameters can be trained on the batch before the last unconfirmed checkpoint.

        That batch gave a finite loss once. If it does so now, the data of later steps is at fault and the checkpoint is
        good. The state is gone after this.
        """
        return self.probe is not None and self.is_trained(self.probe[1])

    def is_trained(self, batch: Batch) -> bool:
        """Make a step from the newest state, and return whether it is not skipped."""
        _, metrics = self.compiled(self.state, batch, *self.extra)
        return not jax.device_get(metrics["skipped"]).total

    def write_closed(self) -> None:
        """Write the row of the last full window if it has not been written. Waits for its steps."""
        if self.closed is None:
            return
        number, window = self.closed
        self.closed = None
        steps = self.settle(window)
        self.write_row(number, window.row(self.settings.flops))
        self.count_skipped(steps)

    def settle(self, window: Window) -> list[Metrics]:
        """Settle the window, and add the time since the last call to it."""
        steps = window.settle(self.rows, self.batch_size)
        now = time.perf_counter()
        window.seconds += now - self.clock
        self.clock = now
        return steps

    def count_skipped(self, steps: list[Metrics]) -> None:
        """Count the updates that were skipped in a row. Raise TrainingStopped if there are too many."""
        for metrics in steps:
            self.settled_step += 1
            if metrics["skipped"].total:
                self.skipped_in_a_row += 1
            else:
                self.skipped_in_a_row, self.trained_step = 0, self.settled_step
                self.good_step = max(self.good_step, self.settled_step - 1)
            if self.probe is not None and self.trained_step > self.probe[0]:
                self.probe = None
            if self.skipped_in_a_row >= self.settings.max_skipped:
                raise UpdatesSkipped(
                    f"{self.skipped_in_a_row} updates in a row were skipped up to step {self.settled_step} because the "
                    "loss, the gradient or the update was not finite. Lower the learning rate or clip harder, and "
                    "check the data."
                )
