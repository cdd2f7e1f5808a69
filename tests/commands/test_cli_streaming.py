"""Runs whose training rows are read while they train: the whole stages, a kill, and what does not go with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import SETTINGS, options, read

from cotgrpo.cli import main
from cotgrpo.data.streaming import StreamedBatches
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS

STREAMED = ("--data.streaming", "true", "--data.bad_rows", "drop", "--data.too_long", "drop")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, one of them bad and one twice, and a config."""
    folder = tmp_path_factory.mktemp("streaming")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(60))
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*lines, lines[0], '{"question": "q"}']))
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{SETTINGS}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run folder that `sft` has filled."""
    assert main(["sft", *options(folder, *STREAMED, "--sft.steps", "20")]) == 0
    return folder


def test_a_streamed_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out rows are never trained on, and the report has what was left out."""
    report = read(trained / "run" / "sft" / "report.json")
    counts = report["data"]["training rows"]
    epochs = counts["read"] // 61
    assert counts["read"] == epochs * 61 and epochs > 1
    assert counts["dropped"] == {"question is in the test set": 20 * epochs, "bad row": epochs}
    assert report["held_out_rows"]["accuracy"] == 20
    rows = [row for row in rows_of(trained / "run" / "sft") if "train/loss" in row]
    assert {row["train/rows_left_out"] for row in rows} == {21 / 61, None}
    assert main(["eval", "--run_dir", str(trained / "run")]) == 0
    assert read(trained / "run" / "sft" / "eval.json")["loss"] == read(trained / "run" / "sft" / "after.json")["loss"]
    capsys.readouterr()


class Killed(Exception):
    """Ends a run without a save."""


def test_a_run_that_was_cut_off_goes_on_with_the_same_rows(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*STREAMED, "--sft.steps", "20", "--run_dir", str(tmp_path)]
    taken = []
    whole = StreamedBatches.__next__

    def cut_off(self: StreamedBatches) -> Any:
        taken.append(1)
        if len(taken) == 13:
            raise Killed
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedBatches, "__next__", cut_off)
        with pytest.raises(Killed):
            main(["sft", *options(trained, *more)])
    assert main(["sft", *options(trained, *more, "--data.num_workers", "1")]) == 0
    assert rows_of(tmp_path / "sft") == rows_of(trained / "run" / "sft")
    counts = [read(run / "sft" / "report.json")["data"]["training rows"] for run in (tmp_path, trained / "run")]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_worker_processes_end_with_a_killed_run(trained: Path, tmp_path: Path) -> None:
    more = options(trained, *STREAMED, "--data.num_workers", "2", "--sft.steps", "100000", "--run_dir", str(tmp_path))
    run = subprocess.Popen([sys.executable, "-m", "cotgrpo.cli", "sft", *more], stdout=subprocess.DEVNULL)

    def children() -> list[str]:
        found = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        return [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    while run.poll() is None and not (tmp_path / "sft" / "metrics.jsonl").is_file():
        time.sleep(0.05)
    workers = children()
    assert len(workers) == 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker process is still there"
        time.sleep(0.05)


def test_group_relative_prompts_are_read_by_index(trained: Path, tmp_path: Path) -> None:
    """A student replies to streamed rows, none of them held out."""
    more = ["--run_dir", str(tmp_path), "--grpo.init_from", str(trained / "run" / "sft"), "--grpo.batch_size", "4"]
    more += ["--grpo.objective.name", "group_relative", "--grpo.ghosts.source", "verified_reward"]
    more += ["--grpo.ghosts.num_generations", "2", "--grpo.ghosts.max_new_tokens", "8"]
    assert main(["grpo", *options(trained, *STREAMED, *more)]) == 0
    report = read(tmp_path / "grpo" / "report.json")
    counts = report["data"]["prompts"]
    assert counts["kept"] >= 4 * 4 / 2 and set(counts["dropped"]) <= {"question is in the test set", "bad row"}
    lines = (tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()
    asked = {json.loads(line)["question"] for line in lines}
    test = {reply["question"] for reply in read(tmp_path / "grpo" / "after.json")["replies"]}
    assert asked and not asked & test


@pytest.mark.parametrize("source", ["privileged_self", "self_reply"])
def test_ghosts_that_need_all_rows(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    more = [
        "--run_dir",
        str(tmp_path),
        "--grpo.init_from",
        str(trained / "run" / "sft"),
        "--grpo.ghosts.source",
        source,
    ]
    assert main(["grpo", *options(trained, *STREAMED, *more)]) == 2
    assert f"grpo.ghosts.source {source} needs the questions of all training rows" in capsys.readouterr().err
    assert not (tmp_path / "grpo" / "config.yaml").exists()


def test_the_first_line_names_the_rows(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before they are read: a bad row ends the run after it."""
    for streaming in ("true", "false"):
        assert main(["sft", *options(trained, "--run_dir", str(tmp_path), "--data.streaming", streaming)]) == 2
        captured = capsys.readouterr()
        assert captured.out.startswith(f"reading {trained / 'rows.jsonl'}\n")
        assert "rows.jsonl:62" in captured.err
        assert not (tmp_path / "sft" / "config.yaml").exists()
