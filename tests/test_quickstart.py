"""The quick start in full, as its users run it: a task with room to improve, on sums that training never shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cotgrpo.run.metrics_log import read_metrics
from cotgrpo.run.quickstart import TEST_ROWS


@pytest.mark.slow
def test_the_quick_start_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cotgrpo.cli", "quickstart", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    base, sft, grpo = (report["accuracy"][name] for name in ("base", "sft", "grpo"))
    assert base["n"] == sft["n"] == grpo["n"] == TEST_ROWS
    assert base["value"] < 0.05, "an untrained student cannot solve the task"
    assert 0.4 <= sft["value"] <= 0.85, "SFT is competent, and leaves room"
    assert grpo["value"] > sft["value"]
    assert report["held_out_loss"]["base"] > report["held_out_loss"]["sft"] > report["held_out_loss"]["grpo"]
    assert f"after GRPO {grpo['value']:6.1%}" in done.stdout
    rows = [row for row in read_metrics(tmp_path / "grpo") if "train/reward" in row]
    assert sum(row["train/ghost_prob"] for row in rows[-5:]) > sum(row["train/ghost_prob"] for row in rows[:5])
    assert not any(row["train/skipped"] for row in rows)
