"""Whole stages on rows that change between them, and while one of them is cut off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import SETTINGS, error_of, read
from helpers.stage_inputs import sum_row, write_jsonl

from cotgrpo.cli import main
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.training.loop import TIME_KEYS, Loop

ROWS = [sum_row(n) for n in range(60)]


def options(folder: Path, run: str, *more: str) -> list[str]:
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    given = ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "rows.jsonl")]
    return [*given, "--run_dir", str(folder / run), *more]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in read_metrics(folder)]


def measured(folder: Path) -> set[str]:
    return {reply["question"] for reply in read(folder / "after.json")["replies"]}


class CutOff(Exception):
    """Ends a run without a save."""


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_that_is_cut_off_while_rows_are_appended_and_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    """It goes on with its own rows, to the bit. A row that is lost is an error, until the flag allows it."""
    path, more = write_jsonl(tmp_path / "rows.jsonl", ROWS), ("--data.streaming", streaming)
    assert main(["sft", *options(tmp_path, "whole", *more)]) == 0
    next_batch, taken = Loop.next_batch, []

    def cut_off(self: Loop, state: Any) -> Any:
        taken.append(1)
        if len(taken) == 6:
            raise CutOff
        return next_batch(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "next_batch", cut_off)
        with pytest.raises(CutOff):
            main(["sft", *options(tmp_path, "cut", *more)])
    capsys.readouterr()
    write_jsonl(path, random.Random(1).sample(ROWS[1:], 59))
    assert main(["sft", *options(tmp_path, "cut", *more)]) == 2
    assert ("1 removed (first was" in (error := error_of(capsys))) and "--allow_changed" in error
    write_jsonl(path, random.Random(1).sample([*ROWS, *(sum_row(n) for n in range(100, 150))], 110))
    assert main(["sft", *options(tmp_path, "cut", *more)]) == 0
    assert "50 rows were appended since" in capsys.readouterr().out
    assert log_of(tmp_path / "cut" / "sft") == log_of(tmp_path / "whole" / "sft")
    assert read(tmp_path / "cut" / "sft" / "after.json") == read(tmp_path / "whole" / "sft" / "after.json")


@pytest.mark.slow
def test_held_out_rows_stay_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sft`, then `grpo --seed 1` after 50 rows were appended: none of the 20 questions is trained on."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert main(["sft", *options(tmp_path, "run")]) == 0
    held_out = measured(tmp_path / "run" / "sft")
    write_jsonl(path, [*ROWS, *(sum_row(n) for n in range(100, 150))])
    assert main(["grpo", *options(tmp_path, "run", "--seed", "1")]) == 0
    report = read(tmp_path / "run" / "grpo" / "report.json")
    assert measured(tmp_path / "run" / "grpo") == held_out and len(held_out) == 20
    assert report["data"]["training rows"]["dropped"]["held out for testing"] >= 20
    line = report["held_out_split"]
    assert "salt 'seed 0'" in line and "of data.test_rows 20" in line
    assert line in " ".join(capsys.readouterr().out.split()) and "Held-out split: " in " ".join(report["notes"])
    assert main(["eval", "--run_dir", str(tmp_path / "run")]) == 0
    assert line.partition(": ")[2].partition(",")[2] in " ".join(capsys.readouterr().out.split())
    assert read(tmp_path / "run" / "grpo" / "eval.json")["held_out_split"] == line
    edited = [row | ({"answer": "7"} if row["question"] in held_out else {}) for row in ROWS]
    write_jsonl(path, edited)
    assert main(["eval", "--run_dir", str(tmp_path / "run")]) == 2
    assert "held-out rows: 20 edited" in error_of(capsys)
    assert main(["eval", "--run_dir", str(tmp_path / "run"), "--allow_changed", "held_out,data"]) == 0
