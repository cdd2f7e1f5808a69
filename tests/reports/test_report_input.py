"""A `report.json` that is missing or malformed: refused, with the file, the place, what was expected and the fix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.report_files import results, wilson, write_run

from cotgrpo.reports.report import ReportError, write_report


def without(key: str) -> Any:
    return {k: v for k, v in results().items() if k != key}


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (without("samples"), "the file must have samples; it has title, command"),
        ([1], "the file must be an object, got list [1]"),
        (results() | {"title": 3}, "title must be text, got int 3"),
        (
            results() | {"accuracy": {"sft": {"value": 0.5, "n": 9}}},
            "accuracy.sft must have low, high; it has value, n",
        ),
        (results() | {"accuracy": {"sft": wilson(1, 9) | {"value": 0.9}}}, "accuracy.sft must hold 0 <= low <= value"),
        (results() | {"accuracy": {"sft": wilson(1, 9) | {"low": math.nan}}}, "accuracy.sft must hold 0 <= low"),
        (
            results() | {"accuracy": {"sft": wilson(1, 9) | {"n": True}}},
            "accuracy.sft.n must be a whole number, got bool",
        ),
        (results() | {"held_out_loss": {"sft": None}}, "held_out_loss.sft must be a number, got NoneType None"),
        (results() | {"samples": {}}, "samples must be a list, got dict"),
        (
            results() | {"samples": [{"question": "?", "gold": "", "replies": {"sft": {"text": "", "correct": 1}}}]},
            "samples[0].replies.sft.correct must be true or false, got int 1",
        ),
        (results() | {"notes": "one"}, "notes must be a list, got str 'one'"),
    ],
)
def test_malformed_results_are_refused(tmp_path: Path, report: Any, problem: str) -> None:
    path = write_run(tmp_path, report) / "report.json"
    with pytest.raises(ReportError, match="delete the file and run that folder") as caught:
        write_report(tmp_path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert not (tmp_path / "report.html").exists()


def test_missing_and_unreadable_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(
        ReportError, match=r"no such file\. Expected the results of a run\. Give a finished run's folder"
    ):
        write_report(tmp_path)
    path.write_text('{"title": ')
    with pytest.raises(
        ReportError, match=r"report.json: expected JSON in UTF-8, but Expecting value: line 1 column 11"
    ):
        write_report(tmp_path)
    path.write_bytes(b"\xff{}")
    with pytest.raises(ReportError, match=r"report\.json: expected JSON in UTF-8, but 'utf-8' codec"):
        write_report(tmp_path)
