"""The quick start in full, as its users run it: a task with room to improve, on sums that training never shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.quickstart.quickstart import STAGES, TEST_ROWS


@pytest.mark.slow
def test_the_quick_start_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cotgrpo.cli", "quickstart", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    base, sft, grpo, on_policy = (report["accuracy"][name] for name in STAGES)
    assert all(row["n"] == TEST_ROWS for row in report["accuracy"].values())
    assert base["value"] < 0.05, "an untrained student cannot solve the task"
    assert 0.6 <= sft["value"] <= 0.98, "SFT is competent, and leaves room"
    assert abs(grpo["value"] - sft["value"]) < 0.03, "SFT has got out of the text what there is"
    assert on_policy["value"] >= grpo["value"] + 0.015, "live ghosts at the student's own replies say more"
    losses = report["held_out_loss"]
    assert losses["base"] > losses["sft"] > losses["on_policy"]
    assert f"{STAGES['on_policy']:26} {on_policy['value']:6.1%}" in done.stdout
    assert f"{100 * (on_policy['value'] - grpo['value']):+.1f} points" in " ".join(report["notes"])
    rows = [row for row in read_metrics(tmp_path / "on_policy" / "grpo") if "train/reward" in row]
    assert sum(row["train/accuracy"] for row in rows[-5:]) > sum(row["train/accuracy"] for row in rows[:5])
    assert not any(row["train/skipped"] for row in rows)
