"""Whatever a stage writes beside its checkpoints is made again if it is lost, cut off or overwritten."""

from __future__ import annotations

import contextlib
import io
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
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
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


DAMAGES = ("lost", "half", "empty", "garbage", "folder")


def damage(path: Path, kind: str) -> None:
    """Do to a file, or to all files of a folder in its place, what a disk or a hand may do."""
    if path.is_dir() and kind in ("half", "empty", "garbage"):
        for inner in [inner for inner in path.rglob("*") if inner.is_file()]:
            damage(inner, kind)
        return
    whole = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "lost":
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "garbage": bytes(range(256)) * 8}[kind])


ARTEFACTS = {
    # the file: what each command does when it is damaged, and what it does about a folder in its place
    "config.yaml": {"sft": "says", "eval": "says", "export": "says"},
    "inputs.json": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "inputs.npz": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "tokenizer/tokenizer.json": {"sft": "remade", "eval": "says", "export": "says"},
    "tokenizer/tokenizer_config.json": {"sft": "remade", "eval": "says", "export": "says"},
    "before.json": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "after.json": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "report.json": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "report.html": {"sft": "remade", "eval": "goes on", "export": "goes on"},
    "eval.json": {"sft": "goes on", "eval": "remade", "export": "goes on"},
    "metrics.jsonl": {"sft": "goes on", "eval": "goes on", "export": "goes on"},
    "tensorboard": {"sft": "goes on", "eval": "goes on", "export": "goes on"},
    "checkpoints": {"sft": "goes on", "eval": "says", "export": "says"},
    "checkpoints/6": {"sft": "goes on", "eval": "goes on", "export": "goes on"},
    "checkpoints/6/checksums.json": {"sft": "goes on", "eval": "goes on", "export": "goes on"},
}
"""What a finished stage of `sft` keeps in its folder, besides `completions.jsonl` of grpo.

- says: code 2, and one line with the file, or its folder, and what to do.
- remade: code 0, and the file is as it was, apart from times. With a folder in its place: says.
- goes on: code 0. The file is not read, or what can be read of it is used.
"""
EXCEPTIONS = {
    ("config.yaml", "lost", "sft"): "remade",
    ("config.yaml", "folder", "sft"): "says",
    # A whole folder replaces the tokenizer's.
    ("tokenizer/tokenizer.json", "folder", "sft"): "remade",
    ("tokenizer/tokenizer_config.json", "folder", "sft"): "remade",
}


def commands(finished: Path, out: Path) -> dict[str, list[str]]:
    run = ["--run_dir", str(finished / "run")]
    return {"sft": ["sft", *options(finished)], "eval": ["eval", *run], "export": ["export", *run, "--out", str(out)]}


def check_command(finished: Path, stage: Path, tmp_path: Path, name: str, kind: str, command: str) -> None:
    """Damage an artefact, run a command, and compare what happens with the table."""
    expected = ARTEFACTS[name][command]
    if kind == "folder" and expected == "remade":
        expected = "says"
    expected = EXCEPTIONS.get((name, kind, command), expected)
    path = stage / name
    whole = path.read_bytes() if path.is_file() else b""
    report = without_times(read(stage / "report.json"))
    damage(path, kind)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(commands(finished, tmp_path / "out")[command])
    said = [line for line in errors.getvalue().splitlines() if line.startswith("cotgrpo: ")]
    assert code == (2 if expected == "says" else 0), errors.getvalue()
    if expected == "says":
        assert len(said) == 1 and name.split("/")[0] in said[0], said
        assert any(fix in said[0] for fix in ("again", "Train first", "run `cotgrpo sft`", "Run `cotgrpo sft`")), said
    elif expected == "remade":
        assert path.is_file()
        if name == "report.json":
            assert without_times(read(path)) == report
        elif path.suffix in (".json", ".yaml"):
            assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer/tokenizer.json", "before.json", "report.json"])
def test_a_file_that_was_cut_off(finished: Path, again: Path, tmp_path: Path, name: str) -> None:
    check_command(finished, again, tmp_path, name, "half", "sft")


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_artefact_and_every_damage(finished: Path, tmp_path: Path, name: str, kind: str) -> None:
    stage, kept = finished / "run" / "sft", tmp_path / "kept"
    shutil.copytree(stage, kept)
    for command in ("sft", "eval", "export"):
        try:
            check_command(finished, stage, tmp_path, name, kind, command)
        finally:
            for place in (stage, stage.parent / "unreadable_checkpoints"):
                shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(kept, stage)


@pytest.mark.slow
def test_the_table_has_every_artefact(finished: Path) -> None:
    """Whatever a stage writes is in the table, itself or its folder."""
    stage = finished / "run" / "sft"
    found = {str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()}
    unknown = {name for name in found if name not in ARTEFACTS and name.split("/")[0] not in ARTEFACTS}
    assert not unknown


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
