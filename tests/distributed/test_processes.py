"""Several processes as one run: the same rows, losses and checkpoints as one, and an end for all where one ends.

`helpers/training_run.py` is the training run of the tests, one process of it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import training_run
from helpers.commands import options, read, write_rows_and_model
from helpers.training_run import SEVERAL_STEPS as STEPS
from helpers.training_run import as_arrays, half_written, new_state

from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.cli import main
from cotgrpo.config import ConfigError
from cotgrpo.distributed.peer_monitor import OTHER_ENDED
from cotgrpo.distributed.processes import on_a_cluster, start
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


class Run:
    """The processes of one run on this machine, with four devices in all."""

    def __init__(self, folder: Path, count: int, *, pause: float = 0.0, command: list[str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder.parent / f"{folder.name}-{count}-{i}.txt" for i in range(count)]
        coordinator = f"localhost:{free_port()}"
        flags = os.environ.get("XLA_FLAGS", "")
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={4 // count}",
            "NPROC": str(os.cpu_count()),  # few devices a process, so as many threads of XLA as outside the tests
            "JAX_COMPILATION_CACHE_DIR": "",  # a half-written entry of a killed process would be a warning, so an error
        }
        command = command or [sys.executable, "-W", "error", training_run.__file__, str(folder), str(pause)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            where = ["--distributed.coordinator", coordinator, "--distributed.num_processes", str(count)]
            where += ["--distributed.process_id", str(i)] if count > 1 else []
            with open(output, "w") as file:
                process = subprocess.Popen([*command, *where], stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.processes.append(process)

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes, once all have ended."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def output(self, process: int) -> str:
        return self.outputs[process].read_text()

    def kill(self) -> None:
        """All at once, and none of them may have ended before."""
        for process in self.processes:
            process.kill()
        assert self.wait() == [-signal.SIGKILL] * len(self.processes), "\n".join(
            path.read_text() for path in self.outputs
        )

    def when_taken(self, batches: int) -> None:
        """Returns when every process has taken so many batches."""
        until = time.monotonic() + 120
        while not all(str(batches) in self.output(i).split() for i in range(len(self.processes))):
            assert time.monotonic() < until and all(process.poll() is None for process in self.processes)
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, True),
        ({"SLURM_NTASKS": "8", "TPU_SKIP_MDS_QUERY": "1"}, False),  # in the batch script, not under srun
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
    ],
)
def test_the_environment_tells_of_several_processes(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert on_a_cluster() == several


SLICES = "MEGASCALE_NUM_SLICES"
OWN = "MEGASCALE_SLICE_ID"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, None),  # one slice, or several whose numbers are in the machine's metadata
        ({SLICES: "1"}, None),
        ({SLICES: "1", OWN: "0"}, None),
        ({SLICES: "2", OWN: "1"}, None),
        ({OWN: "0"}, None),
        ({SLICES: "2"}, "has 2 slices, but MEGASCALE_SLICE_ID is not set: .* from 0 to 1"),
        ({SLICES: "2", OWN: "2"}, "MEGASCALE_SLICE_ID must be .* from 0 to 1 as .* got '2'"),
        ({SLICES: "2", OWN: "-1"}, "MEGASCALE_SLICE_ID must be .* got '-1'"),
        ({SLICES: "2", OWN: "b"}, "MEGASCALE_SLICE_ID must be .* got 'b'"),
        ({SLICES: "2", OWN: ""}, "MEGASCALE_SLICE_ID must be .* got ''"),
        ({OWN: "1"}, "from 0 to 0 as MEGASCALE_NUM_SLICES has 1, got '1'"),
        ({SLICES: "two", OWN: "0"}, "MEGASCALE_NUM_SLICES must be the number of slices, got 'two'"),
        ({SLICES: "0", OWN: "0"}, "MEGASCALE_NUM_SLICES must be the number of slices, got '0'"),
    ],
)
def test_variables_of_slices(
    environment: dict[str, str],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One slice without its number would wait for the others without end."""
    for name in (SLICES, OWN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **options: started.append(place))
    if message is None:
        start("host:1", 2, 0)
        assert started == [("host:1", 2, 0)]
        return
    with pytest.raises(ConfigError, match=message) as found:
        start("host:1", 2, 0)
    assert "\n" not in str(found.value) and not started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--distributed.coordinator host --distributed.num_processes 2 --distributed.process_id 0",
            "must be HOST:PORT, got 'host'",
        ),
        (
            "--distributed.num_processes 2 --distributed.process_id 2",
            "process_id must be 0 to 1 for 2 processes, got 2",
        ),
        ("--distributed.num_processes two", "distributed.num_processes: .*'two'"),
        ("--distributed.process_id", "distributed.process_id: expected one argument"),
        (
            "--distributed.num_processes 2 --distributed.process_id 1",
            "did not find each other .*--distributed.coordinator HOST:PORT",
        ),
    ],
)
def test_wrong_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of the log, without times."""
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(folder)]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def whole_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that are whole, beside others."""
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def final_state(folder: Path) -> list[np.ndarray]:
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.restore_latest(new_state())
    checkpoints.close()
    assert found is not None
    return as_arrays(found[0])


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same steps, data (to the bit), losses and last checkpoint. Sums over processes are in another order."""
    got, want = rows_of(folder), rows_of(whole)
    assert [row["step"] for row in got] == [row["step"] for row in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.get("train/batch_crc") == theirs.get("train/batch_crc")
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert steps_of(folder) == steps_of(whole)
    for a, b in zip(final_state(folder), final_state(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("hosts") / "whole"
    assert Run(folder, 1).wait() == [0]
    return folder


@pytest.mark.slow
def test_several_processes_are_the_run_of_one(whole: Path, tmp_path: Path) -> None:
    count = 4
    run = Run(tmp_path / "run", count)
    assert run.wait() == [0] * count
    assert_same_run(tmp_path / "run", whole)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    for i in range(count):
        assert f"done {STEPS} {i} {count} 4" in run.output(i)
        assert ("loss" in run.output(i)) == (i == 0)


def test_a_killed_process_ends_the_other_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, 2, pause=0.1)
    run.when_taken(10)
    run.processes[1].kill()
    killed = time.monotonic()
    assert run.wait() == [4, -signal.SIGKILL]
    assert time.monotonic() - killed < 60
    name = f"process 1 of 2 ({socket.gethostname()}, pid {run.processes[1].pid})"
    assert f"cotgrpo: {name} has ended: it was killed, or its machine is gone." in run.output(0)


@pytest.mark.slow
def test_whichever_process_is_killed_and_however_many_resume(whole: Path, tmp_path: Path) -> None:
    """Four processes, the third is killed; then two, the first is killed; then one. All on the same checkpoints."""
    folder = tmp_path / "run"
    for count, taken, victim in ((4, 7, 2), (2, 14, 0)):
        run = Run(folder, count, pause=0.1)
        run.when_taken(taken)
        run.processes[victim].kill()
        killed = time.monotonic()
        codes = run.wait()
        assert time.monotonic() - killed < 60
        assert codes.pop(victim) == -signal.SIGKILL and all(codes)
        for i in {*range(count)} - {victim}:
            assert f"cotgrpo: process {victim} of {count} ({socket.gethostname()}, pid " in run.output(i)
    assert Run(folder, 1).wait() == [0]
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_two_killed_in_the_middle_of_a_save_resume_to_the_bit(tmp_path: Path) -> None:
    """Killed by chance, then with a checkpoint half written: rows and last checkpoint of a run that was not killed."""
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    assert Run(undisturbed, 2).wait() == [0, 0]
    rng = random.Random(time.time_ns())
    run = Run(folder, 2, pause=0.05)
    run.when_taken(rng.randrange(9, 11))  # the second save has begun, so that the first is whole
    time.sleep(rng.random() * 0.1)
    run.kill()
    for _ in range(3):  # the folder may have got its name before the signal arrived
        run = Run(folder, 2, pause=0.05)
        run.when_taken(max(whole_steps(folder)) + rng.randrange(1, 4))
        while not half_written(folder):
            time.sleep(0.0005)
        run.kill()
        if half_written(folder):
            break
    assert half_written(folder)
    run = Run(folder, 2)
    assert run.wait() == [0, 0]
    assert "Resuming after step" in run.output(0)
    assert rows_of(folder) == rows_of(undisturbed)
    for got, want in zip(final_state(folder), final_state(undisturbed), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_lora_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Both stages, the frozen base spread over the processes, with a frozen reference: every number and every reply."""
    write_rows_and_model(tmp_path)
    more = ["--lora.rank", "4", "--data.format", "chat", "--mesh.data", "1", "--mesh.fsdp", "4"]
    more += ["--sft.batch_size", "4", "--grpo.batch_size", "4", "--grpo.reference_kl", "0.1"]
    for count in (1, 2):
        folder = tmp_path / str(count)
        for stage in ("sft", "grpo"):
            command = [sys.executable, "-W", "error", "-m", "cotgrpo.cli", stage]
            run = Run(folder, count, command=[*command, *options(tmp_path, *more, "--run_dir", str(folder))])
            assert run.wait() == [0] * count, run.output(0)
    for stage in ("sft", "grpo"):
        two, one = tmp_path / "2" / stage, tmp_path / "1" / stage
        for mine, theirs in zip(rows_of(two), rows_of(one), strict=True):
            assert mine.get("train/batch_crc") == theirs.get("train/batch_crc")
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        for name in ("before.json", "after.json"):
            mine, theirs = read(two / name), read(one / name)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["replies"] == theirs["replies"]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_at_one_step(whole: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGINT to the run that resumed, then four processes finish it."""
    folder = tmp_path / "run"
    for number, taken in ((signal.SIGTERM, 5), (signal.SIGINT, 12)):
        run = Run(folder, 2, pause=0.3)
        run.when_taken(taken)
        run.processes[1].send_signal(number)
        signalled = time.monotonic()
        assert run.wait() == [128 + signal.SIGTERM, 128 + number]
        assert time.monotonic() - signalled < 30
        last = max(steps_of(folder))
        for i in (0, 1):
            assert f"Stopped by a signal after step {last}, and saved" in run.output(i)
    run = Run(folder, 4)
    assert run.wait() == [0] * 4
    assert f"Resuming after step {last}." in run.output(0)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_signal_to_the_quick_start(tmp_path: Path) -> None:
    """Two processes are saved, and end with the documented code within 30 s."""
    folder = tmp_path / "run"
    run = Run(folder, 2, command=[sys.executable, "-m", "cotgrpo.cli", "quickstart", "--out", str(folder)])
    until = time.monotonic() + 300
    while "sft  20/" not in run.output(0):
        assert time.monotonic() < until and run.processes[0].poll() is None
        time.sleep(0.1)
    run.processes[-1].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    assert run.wait() == [128 + signal.SIGTERM] * 2
    assert time.monotonic() - signalled < 30
    (kept,) = (folder / "sft" / "checkpoints").iterdir()
    assert f"Stopped by a signal after step {kept.name}, and saved" in run.output(0)


ON_POLICY = """
student: {width: 32, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 8, mlp_width: 64, init_scale: 0.2}
tokenizer: {vocab_size: 300}
data: {seq_len: 128, test_rows: 8}
sft: {steps: 1, batch_size: 4}
grpo:
  steps: 3
  batch_size: 4
  log_every: 1
  ghosts: {source: privileged_self, max_new_tokens: 8, updates_per_rollout: 2}
eval: {rows: 8, batch_size: 8, max_new_tokens: 8}
mesh: {fsdp: 2}
"""


@pytest.mark.slow
def test_on_policy_over_two_processes(tmp_path: Path) -> None:
    """Each process writes the replies to its share of the questions. Log and replies are those of one process."""
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(60))
    (tmp_path / "c.yaml").write_text(ON_POLICY, encoding="utf-8")
    live = ["forward_kl", "privileged_self"]
    group_relative = ["group_relative", "verified_reward", "--grpo.ghosts.prefetch_rollouts", "true"]

    def run_stage(count: int, folder: Path, stage: str, *more: str) -> None:
        program = [sys.executable, "-m", "cotgrpo.cli", stage, *options(tmp_path, *more, "--run_dir", str(folder))]
        run = Run(folder, count, command=program)
        assert run.wait() == [0] * count, run.output(0)

    for count in (1, 2):
        run_stage(count, tmp_path / f"run{count}", "sft")
        for objective, source, *more in (live, group_relative):
            start = ("--grpo.init_from", str(tmp_path / f"run{count}" / "sft"))
            choice = ("--grpo.objective.name", objective, "--grpo.ghosts.source", source, *more)
            run_stage(count, tmp_path / f"{source}{count}", "grpo", *start, *choice)
    for source in ("privileged_self", "verified_reward"):
        one, two = (tmp_path / f"{source}{count}" / "grpo" for count in (1, 2))
        got, want = rows_of(two), rows_of(one)
        assert len(got) == len(want) >= 3
        for mine, theirs in zip(got, want, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        replies = [[row["text"] for row in read_completions(folder, 100)] for folder in (one, two)]
        assert replies[0] == replies[1] and len(replies[0]) == 8


@pytest.mark.slow
def test_the_error_of_one_process_is_told_to_all(tmp_path: Path) -> None:
    """Process 1 cannot read its rows, and process 0 would wait for it in the first step."""
    program = """
import sys
import jax
from jax.experimental import multihost_utils
from cotgrpo.cli import run
from cotgrpo.data.triples import DataError

def work(rest, console):
    if jax.process_index() == 1:
        raise DataError("rows.jsonl: no such file.")
    multihost_utils.sync_global_devices("a step")

sys.exit(run(work, sys.argv[1:]))
"""
    run = Run(tmp_path / "run", 2, command=[sys.executable, "-W", "error", "-c", program])
    assert run.wait(60) == [4, 2]
    assert "cotgrpo: rows.jsonl: no such file." in run.output(1)
    assert f"process 1 of 2 ({socket.gethostname()}" in run.output(0)
    assert "has ended: DataError: rows.jsonl: no such file." in run.output(0)


def test_hosts_without_a_shared_folder_are_told_at_the_start(tmp_path: Path) -> None:
    """Each has a disk of its own, under one name here and two there."""
    program = """
import sys
from pathlib import Path
import jax
from cotgrpo.cli import run
from cotgrpo.distributed.processes import check_shared

def work(rest, console):
    folder, shared = Path(rest[0]), rest[1] == "shared"
    check_shared(folder if shared else folder / f"disk_of_{jax.process_index()}")
    print("seen by all")

sys.exit(run(work, sys.argv[1:]))
"""
    together = Run(tmp_path / "a", 2, command=[sys.executable, "-c", program, str(tmp_path / "run"), "shared"])
    assert together.wait() == [0, 0] and "seen by all" in together.output(0) + together.output(1)
    assert list((tmp_path / "run").iterdir()) == []
    apart = Run(tmp_path / "b", 2, command=[sys.executable, "-c", program, str(tmp_path / "run"), "apart"])
    assert set(apart.wait()) <= {2, OTHER_ENDED} and 2 in apart.wait()
    assert "Process 1 of 2 does not see the folder" in apart.output(0) + apart.output(1)
