"""Several processes as one run: how they find each other, which of them writes, and what they share.

Every process runs the same program with the same settings. Only process 0 reads and writes the run folder and prints.
It broadcasts what it finds there. All write and read checkpoints. `cotgrpo.distributed.peer_monitor` ends the others
when one of them ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from cotgrpo.config import ConfigError
from cotgrpo.distributed.interrupts import STOPS, saving_first

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, PyTree

SHARED_SECONDS = 10.0
"""How long a network file system may take to show a new file to another machine."""
HEARTBEAT_SECONDS = 30
"""JAX ends the run after this time without a sign of a process, for one that hangs, or whose network does."""

T = TypeVar("T")
Tree = TypeVar("Tree")


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the processes of a run through `jax.distributed`. Call this before any use of a device.

    Without arguments JAX finds them: on Cloud TPU (one process per host, of all slices), under SLURM and Open MPI (one
    process per GPU), on Kubernetes, or at `JAX_COORDINATOR_ADDRESS`. A single process starts nothing.

    Args:
        coordinator: HOST:PORT, a free port of process 0's host.
        num_processes: of the run; 1 ignores the environment.
        process_id: of this one, in [0, num_processes).

    Raises:
        ConfigError: arguments that do not fit together, or processes that do not find each other.
    """
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"distributed.num_processes must be at least 1, got {num_processes}.")
    if num_processes == 1 or ((coordinator, num_processes, process_id) == (None, None, None) and not on_a_cluster()):
        return
    if num_processes is not None and not (process_id is None or 0 <= process_id < num_processes):
        raise ConfigError(
            f"distributed.process_id must be 0 to {num_processes - 1} for {num_processes} processes, got {process_id}."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"distributed.coordinator must be HOST:PORT, got {coordinator!r}.")
    # On CPUs two programs in flight could send their messages in one order here and in another there.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    check_slices()
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, LookupError, TypeError, OSError) as error:
        raise ConfigError(
            f"The processes of this run did not find each other ({' '.join(str(error).split())}). Give every one of "
            "them --distributed.coordinator HOST:PORT, --distributed.num_processes N and its own "
            "--distributed.process_id, or --distributed.num_processes 1 if it is the only one."
        ) from error


def on_a_cluster() -> bool:
    """Return whether the environment names several processes, or this is a Cloud TPU, whose metadata JAX reads."""
    several = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    workers = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if "JAX_COORDINATOR_ADDRESS" in os.environ or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return True
    if "SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        return any(count_in(name) > 1 for name in several)
    if workers is not None:
        return "," in workers
    # JAX sets TPU_SKIP_MDS_QUERY itself on machines without a TPU.
    return "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None


def check_slices() -> None:
    """Check the variables by which several slices of TPUs find each other, where the environment has them.

    JAX takes a slice without a number for the first of one, and two of those would wait for each other.

    Raises:
        ConfigError: slices without a number, or a number that is none of them.
    """
    slices, own = count_in("MEGASCALE_NUM_SLICES", "slices"), os.environ.get("MEGASCALE_SLICE_ID")
    if slices > 1 and own is None:
        raise ConfigError(
            f"The variable MEGASCALE_NUM_SLICES has {slices} slices, but MEGASCALE_SLICE_ID is not set: it must be the "
            f"number of this slice, from 0 to {slices - 1}."
        )
    if own is not None and not (own.strip().isdigit() and int(own) < slices):
        raise ConfigError(
            f"The variable MEGASCALE_SLICE_ID must be the number of this slice, from 0 to {slices - 1} as "
            f"MEGASCALE_NUM_SLICES has {slices}, got {own!r}."
        )


def count_in(name: str, what: str = "processes") -> int:
    """Return the number in a variable of the environment; 1 if it is not set. `what` is counted."""
    value = os.environ.get(name, "1")
    if not (value.strip().isdigit() and int(value)):
        raise ConfigError(
            f"The variable {name} must be the number of {what}, got {value!r}. Unset it, or give "
            "--distributed.num_processes 1 if this is the only one."
        )
    return int(value)


def is_process_0() -> bool:
    """Return whether this is process 0, which writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def process_console() -> Console:
    """Return the console of this process. Process 0 prints to the terminal, the others print nothing."""
    return Console(quiet=not is_process_0())


def on_process_0(make: Callable[[], T]) -> T:
    """Call `make()` on process 0 only, and return its result on every process.

    The result must be JSON-able. An exception is raised on process 0, and the others then end with it (see
    `cotgrpo.distributed.peer_monitor`).
    """
    if jax.process_count() == 1:
        return make()
    data = np.frombuffer(json.dumps(make()).encode(), np.uint8) if is_process_0() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    whole = multihost_utils.broadcast_one_to_all(np.resize(data, size) if data.size else np.zeros(size, np.uint8))
    return json.loads(np.asarray(whole, np.uint8).tobytes())


def broadcast_arrays(make: Callable[[], Tree], like: Tree) -> Tree:
    """Call `make()` on process 0 only, and return its NumPy arrays on every process. `like` has their shapes."""
    if jax.process_count() == 1:
        return make()
    found = multihost_utils.broadcast_one_to_all(make() if is_process_0() else like)
    return jax.tree.map(np.asarray, found)


def check_shared(folder: Path) -> None:
    """Check that every process sees the folder of process 0: each reads a random text that process 0 has written.

    Raises:
        ConfigError: on every process, if one of them does not.
    """
    if jax.process_count() == 1:
        return
    probe = folder / ".shared_by_all"

    def write() -> str:
        token = secrets.token_hex(8)
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text(token, encoding="ascii")
        return token

    token, until = on_process_0(write), time.monotonic() + SHARED_SECONDS
    while not (seen := holds(probe, token)) and time.monotonic() < until:
        time.sleep(0.2)
    all_seen = np.asarray(multihost_utils.process_allgather(np.asarray([seen]))).reshape(-1)
    on_process_0(lambda: probe.unlink(missing_ok=True))
    blind = [str(i) for i, sees in enumerate(all_seen) if not sees]
    if blind:
        raise ConfigError(
            f"Process {', '.join(blind)} of {jax.process_count()} does not see the folder {folder} of process 0: all "
            "machines write checkpoints there. Mount one folder on all of them and name it as run_dir, or set "
            "checkpoint.folder to a bucket (gs://...). See docs/hosts.md."
        )


def holds(path: Path, text: str) -> bool:
    """Return whether a file can be read and holds this text."""
    try:
        os.listdir(path.parent)  # network file systems look again
        return path.read_text(encoding="ascii") == text
    except (OSError, ValueError):
        return False


def fetch(tree: PyTree) -> PyTree:
    """Return a tree with NumPy arrays on every process, however its arrays are sharded."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True) if whole(x) else jax.device_get(x), tree
    )


def process_rows(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> np.ndarray:
    """Return the rows of a global array that this process's devices need, in ascending order.

    Args:
        sharding: of the array.
        shape: global; the first dimension is the rows.
    """
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    rows = [np.arange(shape[0])[index[0]] for index in indices if index is not None]
    return np.unique(np.concatenate(rows))


def global_arrays(sharding: jax.sharding.NamedSharding, tree: Tree) -> Tree:
    """Return a tree of NumPy arrays as global arrays. Arrays that are global already are moved.

    The NumPy arrays have their global shape, and this process has filled its `process_rows`.
    """

    def put(x: AnyArray) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def put_on_mesh(tree: Tree, shardings: PyTree) -> Tree:
    """Do as `jax.device_put`, also onto devices of other processes.

    The arrays must be the same on every process, or global already.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(array: AnyArray, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
        here = np.asarray(array)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    return jax.tree.map(put, tree, shardings)


def gather_rows(rows: np.ndarray, values: np.ndarray, batch_size: int) -> np.ndarray:
    """Gather the values of all rows from all processes: `[n, len(rows)]` on each -> `[n, batch_size]`."""
    if jax.process_count() == 1:
        return values
    mine = np.zeros((2, len(values), batch_size), np.uint32)
    mine[0][:, rows], mine[1][:, rows] = values, 1
    found, there = np.moveaxis(multihost_utils.process_allgather(mine), 1, 0)
    first = there.argmax(axis=0)  # a row may be on several processes, with the same value
    return np.take_along_axis(found, first[None], axis=0)[0]


class Signals:
    """Records SIGINT and SIGTERM instead of dying from them, so that the loop can save first.

    Every process stops after the same step. With one process a second signal acts at once. With several, JAX handles
    SIGTERM, and tells all of them the step to stop after, whichever process received it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}
        self.saving = contextlib.ExitStack()

    def __enter__(self) -> Signals:
        alone = jax.process_count() == 1
        self.saving.enter_context(saving_first())
        try:
            for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
                self.previous[number] = signal.signal(number, self.note if alone else self.pass_on) or signal.SIG_DFL
        except ValueError:  # not in the main thread, which keeps its signals
            self.previous = {}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """Record the signal. A second one then acts at once."""
        self.received = STOPS.saving_for = number
        self.restore()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Turn Ctrl-C into SIGTERM, which JAX listens to. Its handler is not Python's, and stays."""
        self.received = number
        signal.raise_signal(signal.SIGTERM)

    def stop_after(self, step: int) -> int | None:
        """Return the signal to stop for after this step, or None. Every process must ask once per step."""
        if jax.process_count() == 1:
            return self.received
        return (self.received or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    def restore(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def __exit__(self, *exception: object) -> None:
        STOPS.saving_for = None
        self.restore()
        self.saving.close()
