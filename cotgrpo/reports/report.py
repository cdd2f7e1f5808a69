"""The report of a run, from its `report.json` and `metrics.jsonl`: reads and checks them, and writes the page.

GRPO here is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import write_text
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.reports.page import TRAINED, render
from cotgrpo.storage import explaining_disk_errors

SHAPE: dict[str, Any] = {
    "title": str,
    "command": str,
    "accuracy": {"*": {"value": float, "n": int, "low": float, "high": float}},
    "held_out_loss": {"*": float},
    "held_out_rows": {"accuracy": int, "loss": int},
    "wall_seconds": {"*": float},
    "samples": [{"question": str, "gold": str, "replies": {"*": {"text": str, "correct": bool}}}],
    "data": {"*": {"read": int, "kept": int, "dropped": {"*": int}, "examples": {"*": [str]}}},
    "config": str,
    "versions": {"*": str},
}
"""What `report.json` holds, beside the optional `notes`, a list of text. "*": any names."""

COMPLETIONS_READ, COMPLETIONS_SHOWN = 1_000, 12
STAGE_FOLDERS = {"sft": "sft", "grpo": "grpo", "on_policy": "on_policy/grpo"}
"""Of a run with several stages: where each has its logs."""

KINDS = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}


class ReportError(ValueError):
    """A run folder that cannot be reported; the message names the file, what was expected and the fix."""


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html`.

    Args:
        folder: a run folder with `report.json`, and the log of one stage (`metrics.jsonl`) or of several (in the folders `STAGE_FOLDERS`).
            Without rows in the logs there are no curves; where there is a `completions.jsonl` beside the log, its newest replies are shown.

    Returns:
        The page's path.

    Raises:
        ReportError: `report.json` is missing or not what `SHAPE` says.
    """
    report = read_report(folder / "report.json")
    page = render(
        report, read_stages(folder, report), shown(read_completions(completions_of(folder), COMPLETIONS_READ))
    )
    path = folder / "report.html"
    with explaining_disk_errors(path):
        write_text(path, page)
    return path


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest replies to show, up to two thirds of them such as the ghost says another token in: of a student that is nearly right most have none.

    Those come last, which the page puts first.
    """
    corrected = [row for row in rows if any(ghost is not None for ghost in row["ghosts"] or ())]
    corrected = corrected[-(COMPLETIONS_SHOWN * 2 // 3) :]
    others = [row for row in rows if row not in corrected]
    return others[max(len(others) + len(corrected) - COMPLETIONS_SHOWN, 0) :] + corrected


def completions_of(folder: Path) -> Path:
    """The folder whose `completions.jsonl` belongs to a report: a stage's own, or that of a run's last stage."""
    inside = [folder / place for place in STAGE_FOLDERS.values() if (folder / place / "metrics.jsonl").is_file()]
    return inside[-1] if inside and not (folder / "metrics.jsonl").is_file() else folder


def read_report(path: Path) -> dict[str, Any]:
    """The checked content of a `report.json`."""
    again = "Give a finished run's folder, or delete the file and run the command of that folder again: it writes a new one."
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file. Expected the results of a run. {again}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: expected JSON in UTF-8, but {error}. {again}") from error
    try:
        check(report, SHAPE, "")
        check(report.get("notes", []), [str], "notes")
        for name, row in report["accuracy"].items():
            if not -1e-9 <= row["low"] <= row["value"] + 1e-9 <= row["high"] + 2e-9 <= 1 + 3e-9:
                raise ReportError(f"accuracy.{name} must hold 0 <= low <= value <= high <= 1, got {row}")
    except ReportError as error:
        raise ReportError(f"{path}: {error}. {again}") from None
    return report


def check(value: Any, shape: Any, place: str) -> None:
    """Raises ReportError at the first place where the value is not of the shape (see `SHAPE`)."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ReportError(f"{place or 'the file'} must be an object, got {type(value).__name__} {value!r:.40}")
        shapes = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        missing = [name for name in shapes if name not in value]
        if missing:
            raise ReportError(
                f"{place or 'the file'} must have {', '.join(missing)}; it has {', '.join(value) or 'nothing'}"
            )
        for name, inner in shapes.items():
            check(value[name], inner, f"{place}.{name}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ReportError(f"{place} must be a list, got {type(value).__name__} {value!r:.40}")
        for number, item in enumerate(value):
            check(item, shape[0], f"{place}[{number}]")
    elif not isinstance(value, (int, float) if shape is float else shape) or (
        isinstance(value, bool) and shape is not bool
    ):
        raise ReportError(f"{place} must be {KINDS[shape]}, got {type(value).__name__} {value!r:.40}")


def read_stages(folder: Path, report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the log by stage, in the order of training: of the folder itself if it is one stage's, else of its sub-folders."""
    if (folder / "metrics.jsonl").is_file():
        measured = [stage for stage in TRAINED if stage in report["accuracy"]]
        return {measured[-1] if measured else folder.resolve().name: read_metrics(folder)}
    return {stage: rows for stage in TRAINED if (rows := read_metrics(folder / STAGE_FOLDERS[stage]))}
