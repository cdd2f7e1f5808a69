"""The lines that a stage prints of its rows, its name and its time."""

from __future__ import annotations

import pytest

from cotgrpo.config import Config, parse_config
from cotgrpo.data.rows import DropReport
from cotgrpo.training.hooks import estimate_text
from cotgrpo.training.reporting import report_lines
from cotgrpo.training.steps import StageName, stage_title

WHOLE = {
    "training rows": 5,
    "held-out rows": 2,
    "training sequences": 5,
    "held-out questions": 2,
    "held-out replies": 2,
}


def printed(read: dict[str, int], dropped: dict[str, int]) -> list[str]:
    reports = {title: DropReport(read=count) for title, count in read.items()}
    for title, count in dropped.items():
        for number in range(count):
            reports[title].drop("too long", f"f:{number}")
    return "\n".join(report_lines(reports)).splitlines()


@pytest.mark.parametrize(
    ("dropped", "lines"),
    [
        ({}, ["training rows: 5 of 5 rows kept; held-out rows: all 2"]),
        (
            {"training sequences": 1},
            [
                "training sequences: 4 of 5 rows kept",
                "  1 dropped, too long: f:0",
                "training rows: 5 of 5 rows kept; held-out rows: all 2",
            ],
        ),
        (
            {"training rows": 2, "held-out replies": 1},
            [
                "training rows: 3 of 5 rows kept",
                "  2 dropped, too long: f:0; f:1",
                "held-out replies: 1 of 2 rows kept",
                "  1 dropped, too long: f:0",
                "held-out rows: 2 of 2 rows kept",
            ],
        ),
    ],
)
def test_kept_rows_are_one_line_and_dropped_ones_have_reasons(dropped: dict[str, int], lines: list[str]) -> None:
    assert printed(WHOLE, dropped) == lines


def test_nothing_read_prints_nothing() -> None:
    assert printed({}, {}) == []


@pytest.mark.parametrize(
    ("stage", "options", "title"),
    [
        ("sft", [], "sft"),
        ("grpo", [], "grpo teacher-forced"),
        ("grpo", ["--grpo.ghosts.source", "privileged_self"], "grpo on-policy"),
        ("grpo", ["--grpo.ghosts.source", "self_reply"], "grpo teacher-forced"),
    ],
)
def test_a_stage_is_named_by_its_contexts(stage: StageName, options: list[str], title: str) -> None:
    config: Config = parse_config(options)
    assert stage_title(stage, config) == title


@pytest.mark.parametrize(
    ("steps", "seconds", "text"),
    [
        (1990, 0.0225, "about 45 s of training left, 1,990 steps of 22.5 ms"),
        (300, 1.5, "about 7 min 30 s of training left, 300 steps of 1.50 s"),
        (10_000, 2.0, "about 5 h 33 min of training left, 10,000 steps of 2.00 s"),
        (1, 0.0001, "about 0 s of training left, 1 steps of 0.1 ms"),
    ],
)
def test_the_time_to_expect(steps: int, seconds: float, text: str) -> None:
    assert estimate_text(steps, seconds) == text
