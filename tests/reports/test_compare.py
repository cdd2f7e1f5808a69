"""Several runs in one page, whatever is missing of them."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import error_of

from cotgrpo.cli import main
from cotgrpo.config import Config, parse_config, save_config

ACCURACY = {"value": 0.5, "n": 20, "low": 0.3, "high": 0.7}
REPORT: dict[str, Any] = {
    "title": "cotgrpo sft",
    "command": "cotgrpo sft",
    "accuracy": {"base": ACCURACY},
    "held_out_loss": {},
    "held_out_rows": {"accuracy": 20, "loss": 20},
    "wall_seconds": {"total": 1.0},
    "samples": [],
    "data": {},
    "config": "",
    "versions": {},
}


def write_stage(folder: Path, stage: str, rate: float, *, finished: bool = True) -> None:
    place = folder / stage
    place.mkdir(parents=True)
    config: Config = parse_config([f"--{stage}.optimizer.learning_rate", str(rate), "--run_dir", str(folder)])
    save_config(config, place / "config.yaml")
    rows = [{"step": step, "train/loss": 1 / (step + 10 * rate), "eval/loss": 2.0} for step in range(1, 6)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "before.json").write_text(json.dumps({"accuracy": ACCURACY}), encoding="utf-8")
    if finished:
        (place / "after.json").write_text(json.dumps({"accuracy": ACCURACY | {"value": 0.625}}), encoding="utf-8")
        (place / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_stage(tmp_path / "a", "sft", 0.1)
    write_stage(tmp_path / "b<i>", "sft", 0.2, finished=False)
    write_stage(tmp_path / "b<i>", "grpo", 0.3)
    return tmp_path


def page(*runs: str) -> str:
    assert main(["compare", *runs]) == 0
    text = Path("compare.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    return text


ODD = "<i>&amp;</i>"


def write_replies(folder: Path, replies: dict[str, bool], text: str) -> None:
    """Add replies to the measurement after a stage."""
    path = folder / "after.json"
    found = [{"question": q, "gold": "1", "text": f"{text} {q}", "correct": right} for q, right in replies.items()]
    path.write_text(json.dumps({"accuracy": ACCURACY, "replies": found}), encoding="utf-8")


def test_answers_that_differ_are_side_by_side(runs: Path) -> None:
    """Different verdicts come first; questions of one run alone are left out; text stays text."""
    assert "no question has replies of several runs" in page("a", "b<i>")
    write_replies(runs / "a" / "sft", {"same verdict": True, ODD: True, "of one run": True}, "a's")
    write_replies(runs / "b<i>" / "grpo", {"same verdict": True, ODD: False}, "b's")
    text = page("a", "b<i>").partition('<section id="answers">')[2].partition("</section>")[0]
    assert re.findall(r"right|wrong", re.sub("Right|<[^>]*>", "", text)) == ["right", "wrong", "right", "right"]
    shown = html.unescape(re.sub(r"<[^>]*>", " ", text))
    assert shown.index(ODD) < shown.index("same verdict") and "of one run" not in shown
    assert f"a's {ODD}" in shown and f"b's {ODD}" in shown and "<i>" not in text


@pytest.mark.parametrize("replies", [[{"question": "q"}], "text", [[]], None, [{"question": 1, "gold": "1"}]])
def test_replies_that_cannot_be_read_are_left_out(runs: Path, replies: Any) -> None:
    for name in ("a/sft", "b<i>/grpo"):
        (runs / name / "after.json").write_text(json.dumps({"accuracy": ACCURACY, "replies": replies}))
    assert "no question has replies of several runs" in page("a", "b<i>")


def test_the_newest_accuracy_of_each_run_is_one_chart(runs: Path) -> None:
    text = page("a", "b<i>")
    assert re.findall(r'aria-label="Newest accuracy\. ([^"]*)"', text) == [
        "A after SFT: 62.5% (30.0% to 70.0%, n = 20); B after GRPO: 62.5% (30.0% to 70.0%, n = 20)."
    ]


def test_runs_side_by_side(runs: Path) -> None:
    text = page("a", "b<i>")
    assert "b&lt;i&gt;" in text and "<i>" not in text.partition("<main>")[2].replace("</i>", "")
    assert "step 5 of 1000, finished" in text and "step 5 of 1000, not finished" in text
    row = re.search(r"<tr><td><code>sft.optimizer.learning_rate</code></td><td>(.*?)</td><td>(.*?)</td>", text)
    assert row is not None and row.groups() == ("0.1", "0.2")
    assert "run_dir" not in text and "<code>seed" not in text, "settings that are the same, or say nothing"
    assert "<code>grpo." not in text, "one run alone has that stage"
    assert "<strong>62.5%</strong>" in text and "30.0% to 70.0%, n = 20" in text and "not measured" in text
    assert 'id="curves-sft"' in text and 'id="curves-grpo"' in text
    chart = re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    lines = [c for c in chart if 'aria-label="Loss. ' in c]
    assert lines[0].count("<polyline") == 2 and "A</text>" not in lines[0]
    assert "SFT A: " in lines[0] and "SFT B: " in lines[0]


def test_a_stage_folder_is_a_run_too(runs: Path) -> None:
    text = page("a/sft", "b<i>/grpo")
    assert 'id="curves-sft"' in text and 'id="curves-grpo"' in text


@pytest.mark.parametrize("count", [2, 5, 12, 30])
def test_many_runs(runs: Path, count: int) -> None:
    names = [f"r{number}" for number in range(count)]
    for name in names:
        shutil.copytree("a", name)
    assert page(*names).count("<polyline") == 2 * count


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no settings", lambda p: (p / "config.yaml").unlink(), "settings: .*cannot be read"),
    (
        "cut settings",
        lambda p: (p / "config.yaml").write_bytes((p / "config.yaml").read_bytes()[:200]),
        "settings: .*(the end is missing|not valid YAML)",
    ),
    ("other settings", lambda p: (p / "config.yaml").write_text("- a\n"), "settings: .*expected a mapping"),
    ("no log", lambda p: (p / "metrics.jsonl").unlink(), "curves: .* has no rows"),
    ("binary log", lambda p: (p / "metrics.jsonl").write_bytes(b"\xff\x00\n\xfe" * 9), "curves: .* has no rows"),
    ("a folder as log", lambda p: ((p / "metrics.jsonl").unlink(), (p / "metrics.jsonl").mkdir()), "has no rows"),
    ("text as numbers", lambda p: (p / "metrics.jsonl").write_text('{"step": 1, "train/loss": "x"}\n'), "A</td>"),
    ("cut report", lambda p: (p / "report.json").write_text("{"), "report: .*expected JSON"),
    (
        "no accuracy",
        lambda p: [(p / f"{n}.json").unlink() for n in ("before", "after", "report")],
        "nothing was measured",
    ),
    ("odd accuracy", lambda p: (p / "after.json").write_text('{"accuracy": {"value": "x"}}'), "not measured"),
    ("stopped", lambda p: (p / "stopped.json").write_text('{"step": 3, "reason": "It burst."}'), "It burst"),
    ("empty", lambda p: shutil.rmtree(p), "nothing of a run is in it"),
]


@pytest.mark.parametrize(("name", "damage", "missing"), DAMAGES, ids=[name for name, *_ in DAMAGES])
def test_what_is_missing_is_said(runs: Path, name: str, damage: Callable[[Path], object], missing: str) -> None:
    damage(runs / "a" / "sft")
    text = page("a", "b<i>")
    assert re.search(missing, text), text[text.index("<main>") :][:3000]
    assert 'id="curves-grpo"' in text, "the other run is shown"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least two runs"),
        (["a"], "at least two runs"),
        (["a", "nowhere"], "nowhere is not a folder"),
        (["a", "a/sft/config.yaml"], "config.yaml is not a folder"),
        (["empty", "empty"], "Nothing of a run was found in empty, empty"),
        (["a", "b<i>", "--out", "a/sft/config.yaml"], "exists and is not a page"),
        (["a", "b<i>", "--out", "empty"], "exists and is not a page"),
        (["a", "b<i>", "--output", "x"], "Unknown option --output"),
    ],
)
def test_wrong_arguments(runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "empty").mkdir()
    assert main(["compare", *arguments]) == 2
    assert message in error_of(capsys)
