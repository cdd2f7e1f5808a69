"""Signs of collapse in the rows of the log stop a run, also one that was resumed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.logs.metrics_log import MetricsLog
from cotgrpo.training.collapse import CollapseDetector
from cotgrpo.training.hooks import TrainingStopped


def feed(folder: Path, rows: list[dict[str, Any]], growth: float | None = 2.0) -> None:
    detector = CollapseDetector(folder, growth)
    for number, row in enumerate(rows, 1):
        detector.on_row(number, row)


def test_doubled_entropy_stops_the_run(tmp_path: Path) -> None:
    entropies = lambda *values: [{"train/entropy": value} for value in values]
    feed(tmp_path, entropies(0.3, 0.5, 0.7, 0.5, 0.7))  # one high row may be chance
    feed(tmp_path, entropies(0.3, 9.0, 9.0), None)
    feed(tmp_path, entropies(1e-4, 0.19, 0.19))
    with pytest.raises(TrainingStopped, match=r"0\.650 nats at step 3, more than 2 times the initial 0\.300"):
        feed(tmp_path, entropies(0.3, 0.7, 0.65))


def test_sampled_accuracy_that_falls_while_greedy_holds_stops_the_run(tmp_path: Path) -> None:
    def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [row for sampled, greedy in pairs for row in ({"train/accuracy": sampled}, {"eval/accuracy": greedy})]

    feed(
        tmp_path, rows((0.5, 0.6), (0.45, 0.6), (0.3, 0.5))
    )  # both fall: the student forgets, which is another problem
    with pytest.raises(TrainingStopped, match=r"35\.0% right up to step 6, and were 50\.0% right before"):
        feed(tmp_path, rows((0.5, 0.6), (0.45, 0.6), (0.35, 0.61)))


def test_a_resumed_run_counts_the_rows_before_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(10, {"train/entropy": 0.3})
    log.write(20, {"train/entropy": 0.7})
    log.close()
    with pytest.raises(TrainingStopped, match=r"at step 30, more than 2 times the initial 0\.300"):
        CollapseDetector(tmp_path, 2.0).on_row(30, {"train/entropy": 0.65})


@pytest.mark.parametrize(("replies", "stops"), [(None, True), (8, False), (400, True)])
def test_a_fall_within_two_standard_errors_is_chance(tmp_path: Path, replies: int | None, stops: bool) -> None:
    """Three steps of 8 replies each say little of 31 % against 12 %; 1,200 replies do."""
    detector = CollapseDetector(tmp_path, None, replies)
    detector.on_row(3, {"train/accuracy": 0.31, "eval/accuracy": 1.0})
    with pytest.raises(TrainingStopped) if stops else contextlib.nullcontext():
        detector.on_row(6, {"train/accuracy": 0.12, "eval/accuracy": 1.0})
