"""Several processes as one run: the same rows, losses and checkpoints as one, and an end for all where one ends.

Run as a program, `python test_hosts.py FOLDER [SLOWLY]` and with the options of `cotgrpo.cli`, this file is the training run of the tests, one process of it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 24


def main(folder: Path, pause: float) -> None:
    from cotgrpo.cli import run

    sys.exit(run(lambda rest, console: training(folder, pause), sys.argv[3:]))


def training(folder: Path, pause: float) -> None:
    """The run of test_train_loop.py, with its batch spread over all devices."""
    import jax
    from test_train_loop import SETTINGS, STUDENT, Batches, new_state, optimizer

    import cotgrpo
    from cotgrpo.run.train import train

    def report(number: int, batch: Any) -> Any:
        print(number, flush=True)
        time.sleep(pause)
        return batch

    def evaluate(params: Any) -> dict[str, float]:
        return {"loss": float(jax.jit(lambda p: (p["embedding"] ** 2).mean())(params))}

    step = cotgrpo.make_grpo_step(STUDENT, optimizer(), cotgrpo.Pair(estimator="drawn"))
    settings = dataclasses.replace(SETTINGS, total_steps=STEPS)
    state = train(
        cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(data=-1)),
        new_state(),
        Batches(report),
        folder,
        settings,
        evaluate=evaluate,
    )
    print("done", int(state.step), jax.process_index(), jax.process_count(), jax.device_count())


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
        }
        command = command or [sys.executable, "-W", "error", __file__, str(folder), str(pause)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            where = ["--distributed.coordinator", coordinator, "--distributed.num_processes", str(count)]
            where += ["--distributed.process_id", str(i)] if count > 1 else []
            with open(output, "w") as file:
                process = subprocess.Popen([*command, *where], stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes, once all have ended."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def output(self, process: int) -> str:
        return self.outputs[process].read_text()

    def when_taken(self, batches: int) -> None:
        """Returns when every process has taken so many batches."""
        until = time.monotonic() + 120
        while not all(str(batches) in self.output(i).split() for i in range(len(self.processes))):
            assert time.monotonic() < until and all(process.poll() is None for process in self.processes)
            time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
