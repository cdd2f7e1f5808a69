"""A small training run that tests kill, interrupt and resume.

`python training_run.py FOLDER` is that run as a process of its own. With a pause in seconds and the options of
`cotgrpo.distributed` it is one process of several, the batch spread over all of their devices.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import cotgrpo
from cotgrpo import Pair, Student, TrainState
from cotgrpo.cli import run as command
from cotgrpo.config import CheckpointConfig
from cotgrpo.data.batches import make_batches
from cotgrpo.data.template import Example
from cotgrpo.training.loop import LoopSettings, train

VOCAB, WIDTH, STEPS = 48, 16, 60
SEVERAL_STEPS = 24
"""Of a run over several processes."""


# 7 and 9 do not divide 4: a window of the log, and an evaluation, always has a checkpoint inside it.
SETTINGS = LoopSettings(
    "grpo", total_steps=STEPS, log_every=7, eval_every=9, checkpoint=CheckpointConfig(every=4, keep=2)
)


# The loop does not care what the model is: one that predicts each token from the one before it compiles fastest.
STUDENT = Student(
    hidden=lambda params, tokens, positions, segment_ids: params["embedding"][tokens],
    head=lambda params: params["head"],
)


class Batches:
    """Packed batches of made-up documents. `hook(n, batch) -> batch` runs as batch n is taken."""

    def __init__(self, hook: Callable[[int, Any], Any] = lambda number, batch: batch) -> None:
        rng = np.random.default_rng(0)
        documents = [rng.integers(0, VOCAB, rng.integers(5, 17)).astype(np.int32) for _ in range(50)]
        examples = [Example(tokens, np.arange(len(tokens)) > 1) for tokens in documents]
        self.inner = make_batches(examples, batch_size=8, seq_len=24, seed=1)
        self.hook, self.taken = hook, 0

    def __next__(self) -> Any:
        self.taken += 1
        return self.hook(self.taken, next(self.inner))

    def get_state(self) -> dict[str, Any]:
        return {"inner": self.inner.get_state(), "taken": self.taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self.inner.set_state(state["inner"])
        self.taken = state["taken"]


def new_params(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"embedding": (VOCAB, WIDTH), "head": (WIDTH, VOCAB)}
    return {name: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32) for name, shape in shapes.items()}


def new_state() -> TrainState:
    return TrainState.create(params=new_params(), tx=optimizer(), key=3)


def optimizer() -> Any:
    return cotgrpo.make_optimizer("adamw", learning_rate=1e-2, total_steps=STEPS)


def spread(params: Any) -> dict[str, float]:
    return {"loss": float(np.std(np.asarray(params["embedding"])))}


class SharedStep:
    """The step of most tests, compiled once. It draws tokens, so the tests cover random numbers too."""

    compiled: Any = None

    def lower(self, *arguments: Any) -> SharedStep:
        if self.compiled is None:
            step = cotgrpo.make_grpo_step(STUDENT, optimizer(), Pair(estimator="drawn"))
            self.compiled = cotgrpo.jit_step(step).lower(*arguments).compile()
        return self

    def compile(self) -> Any:
        return self.compiled


SHARED_STEP = SharedStep()


def run(folder: Path, batches: Any = None, settings: LoopSettings = SETTINGS, **options: Any) -> TrainState:
    options = {
        "step": SHARED_STEP,
        "state": new_state(),
        "evaluate": spread,
        "console": Console(file=io.StringIO()),
    } | options
    step, state = options.pop("step"), options.pop("state")
    return train(step, state, batches or Batches(), folder, settings, **options)


def as_arrays(state: Any) -> list[np.ndarray]:
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def half_written(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("*tmp*")]


def announced(pause: float) -> Batches:
    """Batches that print their number as they are taken, and take that many seconds."""

    def announce(number: int, batch: Any) -> Any:
        print(number, flush=True)
        time.sleep(pause)
        return batch

    return Batches(announce)


def main(folder: Path) -> None:
    """Train in one process and leave the final state in `final.npz`."""
    np.savez(folder / "final.npz", *as_arrays(run(folder, announced(0.005), console=Console(stderr=True))))


def train_over_processes(folder: Path, pause: float) -> None:
    """Train as one process of several."""

    def evaluate(params: Any) -> dict[str, float]:
        return {"loss": float(jax.jit(lambda p: (p["embedding"] ** 2).mean())(params))}

    step = cotgrpo.make_grpo_step(STUDENT, optimizer(), Pair(estimator="drawn"))
    step = cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(data=-1))
    settings = dataclasses.replace(SETTINGS, total_steps=SEVERAL_STEPS)
    state = train(step, new_state(), announced(pause), folder, settings, evaluate=evaluate)
    print("done", int(state.step), jax.process_index(), jax.process_count(), jax.device_count())


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        where, pause, *options = sys.argv[1:]
        sys.exit(command(lambda rest, console: train_over_processes(Path(where), float(pause)), options))
