"""The files of a run that a report is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cotgrpo.teachers.procedural import ProceduralTeacher


def wilson(right: int, n: int) -> dict[str, Any]:
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return {"value": p, "n": n, "low": min(low, p), "high": max(high, p)}


def results(stages: tuple[str, ...] = ("base", "sft", "grpo")) -> dict[str, Any]:
    """A `report.json` as the stages of a run write it."""
    right = {"base": 3, "sft": 142, "grpo": 183}
    samples = []
    for number, triple in enumerate(ProceduralTeacher(seed=1, digits=3).draw(4)):
        whole = f"{triple.rationale}\n#### {triple.answer}"
        wrong = whole + "7"
        replies = {"base": whole[3:9] * 60, "sft": wrong, "grpo": whole if number < 3 else wrong}
        samples.append(
            {
                "question": triple.question,
                "gold": triple.answer,
                "replies": {s: {"text": replies[s], "correct": s == "grpo" and number < 3} for s in stages},
            }
        )
    train = {"read": 12_000, "kept": 11_874, "dropped": {"wrong answer": 119, "duplicate": 7}}
    train["examples"] = {
        "wrong answer": ["train.jsonl:14: '1,204', gold '1214'", "train.jsonl:88: '-3', gold '3'"],
        "duplicate": ["train.jsonl:907"],
    }
    whole_data = {"read": 300, "kept": 300, "dropped": {}, "examples": {}}
    return {
        "title": "cotgrpo quickstart",
        "command": "cotgrpo quickstart --run_dir runs/first --seed 0",
        "accuracy": {s: wilson(right[s], 300) for s in stages},
        "held_out_loss": {s: {"base": 6.2415, "sft": 0.12345, "grpo": 0.0987}[s] for s in stages},
        "held_out_rows": {"accuracy": 300, "loss": 290},
        "wall_seconds": {"teacher": 4.21, "sft": 233.4, "grpo": 401.9, "evaluation": 61.0, "total": 700.51},
        "samples": samples,
        "data": {"train rows": train, "test rows": whole_data},
        "config": "seed: 0\nstudent:\n  width: 192\n  layers: 4\nsft:\n  steps: 1000\n  optimizer:\n    name: adamw\n",
        "versions": {"cotgrpo": "0.2.0", "jax": "0.10.0", "numpy": "2.3.1", "python": "3.12.4", "device": "1 x cpu"},
    }


def write_run(
    folder: Path, report: Any, stages: dict[str, list[dict[str, Any]]] | None = None, single: bool = False
) -> Path:
    """A run folder; with `single`, that of one stage."""
    for stage, rows in (stages or {}).items():
        place = folder if single else folder / stage
        place.mkdir(parents=True, exist_ok=True)
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder
