"""Rows, and a stage that reads its inputs and claims its folder as a real one does, without training."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.config import Config, DataConfig, StudentConfig, TokenizerConfig
from cotgrpo.data.questions import question_text
from cotgrpo.data.triples import Triple
from cotgrpo.training.inputs import StageInputs, claim_folder, load_inputs

SMALL = StudentConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=8)


def sum_row(number: int, **more: Any) -> dict[str, Any]:
    """Return a row whose question holds the number."""
    return {
        "question": f"What is {number} + 1?",
        "rationale": f"One more than {number}.",
        "answer": str(number + 1),
    } | more


CHANGED = itertools.count(10**18, 10**9)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows. Each call gives the file another time of change, however fast it follows another."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    os.utime(path, ns=(now := next(CHANGED), now))
    return path


def small_config(folder: Path, *, seed: int = 0, allow_changed: str = "", **data: Any) -> Config:
    """Return the config of a run in `folder / "run"` on `folder / "rows.jsonl"`."""
    settings: dict[str, Any] = {"train": str(folder / "rows.jsonl"), "test_rows": 8, "seq_len": 256} | data
    return Config(
        run_dir=str(folder / "run"),
        seed=seed,
        student=SMALL,
        tokenizer=TokenizerConfig(vocab_size=280),
        data=DataConfig(**settings),
        allow_changed=allow_changed,
    )


@dataclasses.dataclass(frozen=True)
class Begun:
    """A stage that has read its inputs.

    Attributes:
        inputs: what it has read.
        printed: what it printed.
        train: the training rows in the order of their numbers, without their places.
    """

    inputs: StageInputs
    printed: str
    train: list[Triple]

    @property
    def trained(self) -> set[str]:
        return {question_text(triple) for triple in self.train}

    @property
    def held_out(self) -> set[str]:
        assert self.inputs.rows is not None
        return {question_text(question) for question in self.inputs.rows.test}


def begin(config: Config, stage: str, origin: Path | None = None) -> Begun:
    """Read a stage's inputs and claim its folder."""
    console = Console(file=io.StringIO(), width=10_000)
    folder = Path(config.run_dir) / stage
    inputs = load_inputs(config, folder, origin, console)
    claim_folder(folder, inputs)
    rows, stream = inputs.train_triples, inputs.stream
    if stream is not None:
        rows = stream.triples.read(range(len(stream.triples.files)))[0]
    rows = [dataclasses.replace(row, source="") for row in rows]
    return Begun(inputs, console.file.getvalue(), rows)  # type: ignore[attr-defined]
