"""Checkpoints outside the run folder outlive it, and errors about them come before anything is compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.checkpoint_states import assert_same, latest, make_state
from helpers.commands import SETTINGS, options, read

from cotgrpo.checkpoints.manager import Checkpoints, restore_params
from cotgrpo.checkpoints.object_stores import link_folder
from cotgrpo.cli import main
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a config, and the run that `sft` has made with its checkpoints elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    settings = SETTINGS.replace("{every: 2}", f"{{every: 2, keep: 1, keep_best: 1, folder: {folder / 'kept'}}}")
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{settings}", encoding="utf-8")
    assert main(["sft", *options(folder)]) == 0
    return folder


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs compiled from here on, of those that take a model's time: a step, an evaluation, a sampler."""
    found: list[str] = []
    jit = jax.jit

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        found.append(getattr(function, "__qualname__", str(function)))
        return jit(function, *arguments, **options)

    monkeypatch.setattr(jax, "jit", counted)
    return found


def test_all_commands_find_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (trained / "run" / "sft" / "checkpoints").exists()
    assert "6" in {path.name for path in (trained / "kept" / "sft").iterdir()}
    assert main(["eval", *options(trained)]) == 0
    assert read(trained / "run" / "sft" / "eval.json")["step"] == 6
    assert main(["grpo", *options(trained)]) == 0
    assert (trained / "kept" / "grpo" / "4").is_dir()
    assert main(["export", "--run_dir", str(trained / "run"), "--out", str(trained / "out")]) == 0
    assert (trained / "out" / "model.safetensors").is_file()
    capsys.readouterr()


def test_on_a_new_machine_the_same_command_resumes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder is lost; the checkpoints are not."""
    shutil.copytree(trained / "kept" / "sft", tmp_path / "kept" / "sft")
    place = ("--run_dir", str(tmp_path / "run"), "--checkpoint.folder", str(tmp_path / "kept"))
    assert main(["sft", *options(trained, *place)]) == 0
    assert "sft: all 6 steps are done already." in capsys.readouterr().out
    assert read(tmp_path / "run" / "sft" / "after.json")["loss"] == read(trained / "run" / "sft" / "after.json")["loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--student.width", "16"), "/kept/sft/6 is of another model or optimizer: params/"),
        (("--sft.optimizer.name", "adafactor"), "/kept/sft/6 is of another model or optimizer: opt_state/"),
        (("--checkpoint.folder", "/proc/kept"), "/proc/kept/sft: checkpoints cannot be kept there"),
        (
            ("--checkpoint.folder", "no-store://bucket/run"),
            "no-store://bucket/run/sft: no library here reads and writes such",
        ),
        (("--run_dir", "gs://bucket/run"), "run_dir must be a folder of this machine, got 'gs://bucket/run'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_compiled(
    trained: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiled = compilations(monkeypatch)
    assert main(["sft", *options(trained, "--run_dir", str(tmp_path / "run"), *more)]) == 2
    assert message in capsys.readouterr().err
    assert not [name for name in compiled if "step" in name or "sample" in name]
    assert not (tmp_path / "run" / "sft" / "config.yaml").exists()


@pytest.mark.parametrize(
    "name", ["a[1]", "[[x]]", "a*b", "a?", "{a,b}", "sp ace", "~x", "a%20b", "\u00fc[\u65e5]", "a\nb", "'", "#"]
)
def test_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    """Orbax expands paths as patterns: a sibling must not match either."""
    for sibling in ("axb", "a1", "ab"):
        (tmp_path / sibling).mkdir()
    folder, state = tmp_path / name / "checkpoints", make_state(3)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"epoch": 1})
    checkpoints.wait()
    shutil.rmtree(link_folder(), ignore_errors=True)  # as a sweeper of temporary files does
    checkpoints.save(4, make_state(4), {"epoch": 2})
    checkpoints.close()
    found = latest(folder)
    assert found is not None and found[1] == {"epoch": 2}
    assert_same(found[0], make_state(4))
    params, step = restore_params(folder, state.params)
    assert step == 4
    assert_same(params, make_state(4).params)
