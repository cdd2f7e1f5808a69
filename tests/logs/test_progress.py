"""The progress of a phase: a bar that moves in a terminal, a line now and then in a log, nothing for a short phase."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from cotgrpo.logs import progress
from cotgrpo.logs.progress import PhaseProgress


class Clock:
    """A clock that moves only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=80, color_system=None, _environ={}), file


def rows(clock: Clock, count: int, seconds_each: float) -> Any:
    for number in range(count):
        clock.now += seconds_each
        yield number


def test_a_log_has_a_line_now_and_then(clock: Clock) -> None:
    """640 rows in 64 s: the first line after 2 s, then every 15 s, and a last one."""
    to, file = console()
    with PhaseProgress("reading rows", to, 640) as phase:
        assert list(phase.over(rows(clock, 640, 0.1))) == list(range(640))
    lines = file.getvalue().splitlines()
    assert lines[0] == "reading rows 64/640  10 rows/s  0:58 left"
    assert lines[-1] == "reading rows 640/640  10 rows/s"
    counts = [int(line.split()[2].partition("/")[0]) for line in lines]
    assert counts == [64, 256, 448, 640]


def test_a_title_is_shown_as_it_is_and_fits(clock: Clock) -> None:
    """A folder's name may hold markup and control sequences, and be long."""
    title = "runs/[red]a[/] \x1b[31m" + "long/" * 20
    for terminal in (True, False):
        to, file = console(terminal)
        with PhaseProgress(title, to, 10) as phase:
            phase.progress.live.auto_refresh = False
            clock.now += 3
            phase(5)
            phase.progress.refresh()
        shown = file.getvalue()
        assert "runs/[red]a[/] \\x1b[31m" in shown and "5/10" in shown and "\x1b[31m" not in shown
        bars = [line for line in re.split(r"[\r\n]|\x1b\[[?\d]*[A-Za-z]", shown) if "runs/" in line]
        assert not terminal or (len(bars) > 2 and all(len(line) <= 80 for line in bars[:-1]))


def test_without_a_total(clock: Clock) -> None:
    to, file = console()
    with PhaseProgress("indexing rows", to) as phase:
        clock.now += 3
        phase(60_000)
    assert file.getvalue().splitlines()[0] == "indexing rows 60000  20.0k rows/s"


@pytest.mark.parametrize("count", [0, 5, 640])
def test_a_short_phase_prints_nothing_in_a_log(clock: Clock, count: int) -> None:
    to, file = console()
    with PhaseProgress("reading rows", to, count) as phase:
        assert len(list(phase.over(rows(clock, count, 0.003)))) == count
    assert file.getvalue() == "" and phase.done == count


def test_a_terminal_has_a_bar_of_one_line(clock: Clock) -> None:
    """It fits into 80 columns, moves, and is gone at the end."""
    to, file = console(terminal=True)
    with PhaseProgress("training a tokenizer", to, 219_682) as phase:
        phase.progress.live.auto_refresh = False
        for done in (64, 100_000, 219_682):
            clock.now += 1.5
            phase(done)
            phase.progress.refresh()
    shown = [line for line in re.split(r"[\r\n]|\x1b\[[?\d]*[A-Za-z]", file.getvalue()) if "tokenizer" in line]
    assert all(len(line) <= 80 for line in shown)
    assert any("64/219682" in line for line in shown) and any("100000/219682" in line for line in shown)
    assert any("rows/s" in line and "━" in line for line in shown)
    # A phase of over two seconds leaves a line.
    assert file.getvalue().rstrip().endswith("training a tokenizer 219682/219682  48.8k rows/s")
