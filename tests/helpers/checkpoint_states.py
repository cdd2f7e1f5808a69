"""States to save, checkpoints to read back, and a disk that is too small."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo import TrainState
from cotgrpo.checkpoints.manager import Checkpoints


def make_state(step: int, width: int = 8, tx: Any = None, dtype: Any = jnp.float32) -> TrainState:
    """A state whose numbers tell its step; random ones, that compress badly, so that most of a file is data."""
    rng = np.random.default_rng(step)
    params = {
        "embedding": jnp.asarray(rng.normal(size=(61, width)), dtype),
        "layers": {"kernel": jnp.asarray(rng.normal(size=(2, width, 5)), jnp.bfloat16), "none": {}},
    }
    state = TrainState.create(params=params, tx=tx or optax.adamw(1e-3), key=step)
    return state.replace(step=jnp.int32(step))


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def latest(directory: Path, like: TrainState | None = None) -> tuple[TrainState, dict[str, Any], list[str]] | None:
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_latest(like or make_state(0))
    finally:
        checkpoints.close()


def small_file_system(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Yield `mount(size) -> folder`, which mounts a file system of that size or resizes the mounted one."""
    folder.mkdir()

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(folder) else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


# Orbax stops at the first error. It leaves the coroutines of other files, and their errors, to the garbage collector.
ORBAX_LEAVES_ERRORS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
