"""Whatever a stage writes beside its checkpoints is made again if it is lost, cut off or overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import SETTINGS, options, read

from cotgrpo.cli import main
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `sft` with its rows and config."""
    folder = tmp_path_factory.mktemp("finished")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{SETTINGS}", encoding="utf-8")
    assert main(["sft", *options(folder)]) == 0
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The stage's folder, which is put back afterwards."""
    stage, kept = finished / "run" / "sft", tmp_path / "kept"
    shutil.copytree(stage, kept)
    yield stage
    shutil.rmtree(stage)
    shutil.copytree(kept, stage)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "wall_seconds"}


DAMAGES = [("report.html", "lost")] + [
    (name, damage) for name in ("before.json", "after.json", "report.json") for damage in ("lost", "empty", "cut")
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_an_artefact_is_made_again(finished: Path, again: Path, name: str, damage: str) -> None:
    path, report = again / name, without_times(read(again / "report.json"))
    if name != "report.html":
        (again / "report.html").unlink()
    if name in ("before.json", "after.json"):  # as after a kill before the report
        (again / "report.json").unlink()
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert main(["sft", *options(finished)]) == 0
    assert without_times(read(again / "report.json")) == report
    assert (again / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert read(again / "before.json")["replies"] and read(again / "after.json")["replies"]


def test_a_bad_row_of_the_log_is_left_out(finished: Path, again: Path) -> None:
    rows = read_metrics(again)
    log = again / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"\0\0{broken\n", *lines[1:]]))
    (again / "report.html").unlink()
    assert main(["sft", *options(finished)]) == 0
    assert read_metrics(again) == rows


def test_a_run_that_took_no_step_does_not_hold_its_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice after an error of memory is a smaller batch, in the same folder."""
    stage, more = tmp_path / "sft", ["--run_dir", str(tmp_path)]
    stage.mkdir()
    for name in ("config.yaml", "before.json"):
        shutil.copy(finished / "run" / "sft" / name, stage)
    shutil.copytree(finished / "run" / "sft" / "tokenizer", stage / "tokenizer")
    assert main(["sft", *options(finished, *more, "--sft.batch_size", "1", "--tokenizer.vocab_size", "290")]) == 0
    assert read(stage / "before.json")["replies"] and read_metrics(stage)
    capsys.readouterr()
    assert main(["sft", *options(finished, *more, "--sft.batch_size", "2", "--tokenizer.vocab_size", "290")]) == 2
    assert "holds a run with another config: sft.batch_size (1 there, 2 now)" in capsys.readouterr().err
