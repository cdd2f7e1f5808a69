"""Where a stage's checkpoints are: next to its logs, elsewhere, or copied to an object store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cotgrpo.checkpoints.location import CheckpointLocation
from cotgrpo.config import CheckpointConfig, Config, save_config


def config_with(run_dir: Path, folder: str | None) -> Config:
    return dataclasses.replace(Config(), run_dir=str(run_dir), checkpoint=CheckpointConfig(folder=folder))


def test_folder_and_copy_follow_the_setting(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "sft"
    assert CheckpointLocation.of(stage, None) == CheckpointLocation(stage / "checkpoints")
    kept = tmp_path / "kept"
    assert CheckpointLocation.of(stage, str(kept)) == CheckpointLocation(kept / "sft")
    copied = CheckpointLocation.of(stage, "memory://bucket/runs/")
    assert copied.folder == stage / "checkpoints"
    assert copied.copy is not None and copied.copy.url == "memory://bucket/runs/sft"


def test_a_stage_of_another_run_has_its_own_setting(tmp_path: Path) -> None:
    """The config of the run that asks counts for its own stages only."""
    asking = config_with(tmp_path / "new", str(tmp_path / "new_kept"))
    assert CheckpointLocation.resolve(tmp_path / "new" / "grpo", asking).folder == tmp_path / "new_kept" / "grpo"
    other = tmp_path / "old" / "sft"
    assert CheckpointLocation.resolve(other, asking).folder == other / "checkpoints"
    other.mkdir(parents=True)
    save_config(config_with(tmp_path / "old", str(tmp_path / "old_kept")), other / "config.yaml")
    for config in (asking, None):
        assert CheckpointLocation.resolve(other, config).folder == tmp_path / "old_kept" / "sft"


def test_it_exists_with_its_first_checkpoint(tmp_path: Path) -> None:
    location = CheckpointLocation(tmp_path / "checkpoints")
    assert not location.exists()
    (location.folder / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # half written
    assert not location.exists()
    (location.folder / "5").mkdir()
    assert location.exists()
