"""The report of a run: read and check `report.json` and `metrics.jsonl`, and write the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import write_text
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.logs.completions import read_completions
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.reports.page import TRAINED, render

Shape = type | dict[str, Any] | list[Any]

SHAPE: dict[str, Shape] = {
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
"""What `report.json` holds, besides the optional `notes`, a list of text, and `evaluations`. "*" is any names."""

EVALUATIONS: Shape = [
    {"moment": str, "set": str, "n": int, "figures": {"*": {"value": float, "low": float, "high": float}}}
]
"""Further test sets, and pass@k and maj@k, at each moment. `draws`, a text on how replies were drawn, is optional."""

COMPLETION: Shape = {
    "step": int,
    "question": str,
    "gold": str,
    "correct": bool,
    "tokens": [str],
    "rewards": [float],
}
"""What a row of `completions.jsonl` holds, besides the lists `counts` and `ghosts`, which may be null."""

COMPLETIONS_READ, COMPLETIONS_SHOWN = 1_000, 12
STAGE_FOLDERS = {"sft": "sft", "grpo": "grpo", "on_policy": "on_policy/grpo"}
"""Where each stage of a run with several stages has its logs."""

KINDS = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}


class ReportError(ValueError):
    """Raised for a run folder without a valid report; the message names the file, what was expected and the fix."""


def write_report(folder: Path, report: Mapping[str, Any] | None = None) -> Path:
    """Write `folder/report.html`, atomically.

    Args:
        folder: a run folder with `report.json`, and the log of one stage (`metrics.jsonl`) or of several (in the
            folders of `STAGE_FOLDERS`). Without rows in the logs the page lacks curves. If a `completions.jsonl` is
            next to the log, the page shows its newest replies.
        report: in place of `report.json`, which may not be there yet. If the run is not finished, its `stage` names the
            stage of the log.

    Returns:
        The page's path.

    Raises:
        ReportError: `report.json` is missing or does not match `SHAPE`.
    """
    report = read_report(folder / "report.json") if report is None else report
    logged = read_completions(completions_folder(folder), COMPLETIONS_READ)
    replies = choose_replies([row for row in logged if is_completion(row)])
    page = render(report, read_stages(folder, report), replies)
    path = folder / "report.html"
    with explain_disk_errors(path):
        write_text(path, page)
    return path


def is_whole_page(path: Path) -> bool:
    """Return whether a page is there, from its first line to its last."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    return text.lstrip()[:9].lower() == b"<!doctype" and text.rstrip().endswith(b"</html>")


def is_completion(row: dict[str, Any]) -> bool:
    """Return whether a row of `completions.jsonl` can be shown: a disk or a hand may have changed it."""
    try:
        check(row, COMPLETION, "")
    except ReportError:
        return False
    ghosts, counts, length = row.get("ghosts", ""), row.get("counts"), len(row["tokens"])
    lists = [each for each in (row["rewards"], ghosts, counts) if each is not None]
    return all(isinstance(each, list) and len(each) == length for each in lists) and all(
        (isinstance(ghost, str | None)) for ghost in ghosts or ()
    )


def choose_replies(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the newest replies to show.

    Up to two thirds are replies in which the ghost proposes another token: few have one once a student is nearly right.
    Those come last, and the page shows the last first.
    """
    corrected = [row for row in rows if any(ghost is not None for ghost in row["ghosts"] or ())]
    corrected = corrected[-(COMPLETIONS_SHOWN * 2 // 3) :]
    others = [row for row in rows if row not in corrected]
    return others[max(len(others) + len(corrected) - COMPLETIONS_SHOWN, 0) :] + corrected


def completions_folder(folder: Path) -> Path:
    """Return the folder with a report's `completions.jsonl`: a stage's own, or that of a run's last stage."""
    inside = [folder / place for place in STAGE_FOLDERS.values() if (folder / place / "metrics.jsonl").is_file()]
    return inside[-1] if inside and not (folder / "metrics.jsonl").is_file() else folder


def read_report(path: Path) -> dict[str, Any]:
    """Return the checked content of a `report.json`."""
    again = (
        "Give a finished run's folder, or delete the file and run that folder's command again, which writes a new one."
    )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file. Expected the results of a run. {again}") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}). {again}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: expected JSON in UTF-8, but {error}. {again}") from error
    try:
        check(report, SHAPE, "")
        check(report.get("notes", []), [str], "notes")
        check(report.get("evaluations", []), EVALUATIONS, "evaluations")
        for name, row in report["accuracy"].items():
            if not -1e-9 <= row["low"] <= row["value"] + 1e-9 <= row["high"] + 2e-9 <= 1 + 3e-9:
                raise ReportError(f"accuracy.{name} must hold 0 <= low <= value <= high <= 1, got {row}")
    except ReportError as error:
        raise ReportError(f"{path}: {error}. {again}") from None
    return report


def check(value: object, shape: Shape, place: str) -> None:
    """Raise ReportError at the first place where the value does not match the shape (see `SHAPE`)."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ReportError(f"{place or 'the file'} must be an object, got {type(value).__name__} {value!r:.40}")
        shapes: dict[str, Any] = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
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
    """Return the log's rows by stage, in the order of training.

    They are those of the folder itself if it is one stage's, else those of its sub-folders.
    """
    if (folder / "metrics.jsonl").is_file():
        measured = [stage for stage in TRAINED if stage in report["accuracy"]]
        measured += [report["stage"]] if "stage" in report else []
        return {measured[-1] if measured else folder.resolve().name: read_metrics(folder)}
    return {stage: rows for stage in TRAINED if (rows := read_metrics(folder / STAGE_FOLDERS[stage]))}
