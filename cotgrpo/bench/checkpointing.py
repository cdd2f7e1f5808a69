"""Measure checkpoints. They need orbax, imported where it is used."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from cotgrpo.bench.measure import Times
from cotgrpo.bench.steps import Running
from cotgrpo.models.config import DecoderConfig


def measure_checkpoint(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time a save (until the loop continues, and until all is on disk) and a restore of the whole train state."""
    from cotgrpo.checkpoints.manager import Checkpoints

    state = Running(config).state
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    parts: dict[str, Times] = {"save, the loop waits": Times(), "save, until on disk": Times(), "restore": Times()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1)
        for step in range(args.repeats):
            start = time.perf_counter(), time.process_time()
            checkpoints.save(step, state, {})
            waited = time.perf_counter(), time.process_time()
            checkpoints.wait()
            saved = time.perf_counter(), time.process_time()
            jax.block_until_ready(checkpoints.restore_latest(state))
            restored = time.perf_counter(), time.process_time()
            for found, begin, end in zip(parts.values(), (start, start, saved), (waited, saved, restored), strict=True):
                found.seconds.append(end[0] - begin[0])
                found.cpu_seconds.append(end[1] - begin[1])
        checkpoints.close()
    rows = [{"part": name} | found.row() | {"bytes_per_sec": size / found.median} for name, found in parts.items()]
    return {"rows": rows, "state_bytes": size}
