"""The whole method on a made-up task, on a CPU in minutes: a procedural teacher, SFT, GRPO (GhostRespond, not Group Relative), a report.

The task is real: multi-step word problems and column arithmetic whose rationales the student has to write out; no sum of the test occurs in training.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    OptimizerConfig,
    StageConfig,
    StudentConfig,
    TokenizerConfig,
)
from cotgrpo.ghosts.procedural import ProceduralTeacher, write_triples
from cotgrpo.run.charts import interval_chart, standalone
from cotgrpo.run.hosts import from_first
from cotgrpo.run.report import write_report
from cotgrpo.run.stages import run_grpo, run_sft, write_json

TRAIN_ROWS, TEST_ROWS = 6_000, 500

QUICKSTART = Config(
    run_dir="quickstart_run",
    student=StudentConfig(
        width=128,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        mlp_width=384,
        rope_theta=1_000.0,
        init_scale=0.06,
    ),
    tokenizer=TokenizerConfig(vocab_size=400),
    data=DataConfig(seq_len=160, loss_on="completion"),
    sft=StageConfig(
        steps=680, batch_size=12, eval_every=170, optimizer=OptimizerConfig(learning_rate=2.5e-3, warmup_steps=40)
    ),
    grpo=GrpoConfig(
        steps=350, batch_size=12, eval_every=70, optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20)
    ),
    eval=EvalConfig(rows=TEST_ROWS, batch_size=250, max_new_tokens=96),
    checkpoint=CheckpointConfig(every=150, keep=2),
)
"""The quick start's settings; every one of them is also an option of the command."""


def run_quickstart(config: Config = QUICKSTART, console: Console | None = None) -> dict[str, Any]:
    """Teacher, SFT, GRPO and a report of all in `config.run_dir`; run again, it goes on where it was. Returns `report.json`.

    The teacher writes `train.jsonl` and `test.jsonl` there, from `config.seed`, unless `config.data.train` names other rows.
    """
    console = console or Console()
    folder = Path(config.run_dir)
    started = time.perf_counter()
    if not config.data.train:
        train, test = folder / "train.jsonl", folder / "test.jsonl"
        from_first(lambda: teach(train, test, config.seed))
        console.print(
            f"teacher: {TRAIN_ROWS} triples in {train}, {TEST_ROWS} held out in {test}", highlight=False, soft_wrap=True
        )
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, train=[str(train)], test=[str(test)])
        )
    taught = time.perf_counter()
    sft = run_sft(config, console)
    grpo = run_grpo(config, console)
    report = combined(config, sft, grpo, taught - started)
    page = from_first(lambda: str(write_combined(folder, report)))
    for name, label in STAGES.items():
        row = report["accuracy"][name]
        console.print(
            f"{label:10} {row['value']:6.1%} of {row['n']} held-out questions (95 % interval {row['low']:.1%} to {row['high']:.1%})",
            highlight=False,
        )
    console.print(f"{report['wall_seconds']['total']:.0f} s in all; open {page}", highlight=False, soft_wrap=True)
    return report


def write_combined(folder: Path, report: dict[str, Any]) -> Path:
    """Writes `report.json`, its page and the chart of the accuracies; returns the page."""
    write_json(folder / "report.json", report)
    rows = [(name, label, report["accuracy"][name]) for name, label in STAGES.items()]
    (folder / "accuracy.svg").write_text(standalone(interval_chart("Held-out accuracy", rows)), encoding="utf-8")
    return write_report(folder)


STAGES = {"base": "untrained", "sft": "after SFT", "grpo": "after GRPO"}


def teach(train: Path, test: Path, seed: int) -> None:
    """Writes the teacher's triples where they are not there yet; their sums are divided between the two files by a hash."""
    train.parent.mkdir(parents=True, exist_ok=True)
    for path, rows, held_out in ((test, TEST_ROWS, True), (train, TRAIN_ROWS, False)):
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            write_triples(temporary, ProceduralTeacher(seed=seed, held_out=held_out).draw(rows))
            os.replace(temporary, path)


def combined(config: Config, sft: dict[str, Any], grpo: dict[str, Any], teacher_seconds: float) -> dict[str, Any]:
    """The report of both stages as one."""
    wall = {"teacher": teacher_seconds}
    for name, stage in (("SFT", sft), ("GRPO", grpo)):
        wall[f"{name} training"] = stage["wall_seconds"]["training"]
        wall[f"{name} evaluation"] = stage["wall_seconds"]["evaluation"]
    wall["total"] = sum(wall.values())
    return grpo | {
        "title": "cotgrpo quickstart",
        "command": f"cotgrpo quickstart --out {shlex.quote(config.run_dir)} --seed {config.seed}",
        "wall_seconds": wall,
        "notes": [
            "GRPO goes on from the SFT student with the teacher's own text as context (teacher-forced), so part of its gain is "
            "that of more training steps.",
        ],
    }
