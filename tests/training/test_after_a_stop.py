"""After a stage that stopped: what `eval`, `export` and the next stage take, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import SETTINGS, error_of, options, read

from cotgrpo.checkpoints.manager import Checkpoints, restore_params, steps_in
from cotgrpo.cli import main
from cotgrpo.models import load_pretrained
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training import stages

MORE = ("--checkpoint.every", "1", "--checkpoint.keep", "2", "--checkpoint.keep_best", "1", "--max_skipped", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n{SETTINGS}", encoding="utf-8")
    return tmp_path


def ruin(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on, the update of that step gives parameters of 1e30."""
    make = stages.stage_step

    def stage_step(*arguments: Any, **named: Any) -> Any:
        pure = make(*arguments, **named)

        def ruined(state: Any, batch: Any, *rest: Any) -> Any:
            state, metrics = pure(state, batch, *rest)
            size = jnp.where(state.step == step, 1e30, 1.0)
            return state.replace(params=jax.tree.map(lambda leaf: leaf * size, state.params)), metrics

        return ruined

    monkeypatch.setattr(stages, "stage_step", stage_step)


@pytest.mark.slow
def test_the_last_good_student_is_used_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    with monkeypatch.context() as patch:
        ruin(patch, 4)
        assert main(["sft", *options(folder, *MORE)]) == 3
        error = error_of(capsys)
        assert "2 updates in a row were skipped up to step 6" in error
        assert "The checkpoint of step 3 is the last good one" in error and f"name {run / 'sft'} as init_from" in error
    stopped = f"{run / 'sft'} stopped after step 6, and its last good checkpoint is that of step 3."
    assert main(["eval", "--run_dir", str(run)]) == 0
    assert stopped in capsys.readouterr().out
    assert read(run / "sft" / "eval.json")["step"] == 3 and read(run / "sft" / "eval.json")["loss"] < 10
    assert main(["export", "--run_dir", str(run), "--out", str(folder / "out")]) == 0
    assert stopped in capsys.readouterr().out
    exported = load_pretrained(folder / "out")
    saved, step = restore_params(run / "sft" / "checkpoints", exported.params)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, exported.params, saved)

    with monkeypatch.context() as patch:
        ruin(patch, 1)
        assert main(["grpo", *options(folder, *MORE)]) == 3
        said = capsys.readouterr()
        assert stopped in said.out and f"from {run / 'sft'} at step 3" in said.out
        assert "No checkpoint was saved before" in said.err
    assert main(["eval", "--run_dir", str(run)]) == 0
    said = capsys.readouterr()
    assert f"{run / 'grpo'} stopped after step 3, and it has no good checkpoint." in said.out
    assert read(run / "sft" / "eval.json")["step"] == 3


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_never_measured_or_exported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of an earlier version that has nothing else: one line and code 2."""
    assert main(["sft", *options(folder)]) == 0
    checkpoints = folder / "run" / "sft" / "checkpoints"
    assert sorted(steps_in(checkpoints)) == [2, 4, 6]
    spoil_all(folder, checkpoints)
    capsys.readouterr()
    for command in (
        ["eval", "--run_dir", str(folder / "run")],
        ["export", "--run_dir", str(folder / "run"), "--out", str(folder / "out")],
        ["grpo", *options(folder)],
    ):
        assert main(command) == 2
        assert "can be read: 6: it holds numbers that are not finite; 4: it holds" in error_of(capsys)
    assert not (folder / "out").exists()


def spoil_all(folder: Path, directory: Path) -> None:
    """Write every checkpoint again with one parameter that is NaN."""
    from cotgrpo.config import load_config
    from cotgrpo.training.inputs import model_of

    config = load_config(folder / "run" / "sft" / "config.yaml")
    like = stages.new_state(
        "sft", config, model_of(config, folder / "run" / "sft", folder / "run" / "sft", []).first_params()
    )
    checkpoints = Checkpoints(directory)
    state, position, _ = checkpoints.restore_latest(like) or pytest.fail("no checkpoint")
    checkpoints.close()
    for path in directory.iterdir():
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    params = jax.tree.map(lambda leaf: leaf, state.params) | {
        "embedding": state.params["embedding"].at[3, 0].set(jnp.nan)
    }
    checkpoints = Checkpoints(directory)
    for step in (2, 4, 6):
        checkpoints.save(step, state.replace(params=params, step=jnp.int32(step)), position)
    checkpoints.close()
