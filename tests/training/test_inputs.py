"""What a stage reads: a word about memory before large files are read."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cotgrpo.config import Config, DataConfig
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training import inputs


@pytest.mark.parametrize(("memory", "warned"), [(10**12, False), (20_000, True)])
def test_files_that_may_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, warned: bool
) -> None:
    monkeypatch.setattr(inputs, "physical_memory", lambda: memory)
    write_triples(tmp_path / "rows.jsonl", ProceduralTeacher(seed=1).draw(60))
    console = Console(file=io.StringIO(), width=80)
    config = Config(run_dir=str(tmp_path), data=DataConfig(train=str(tmp_path), test_rows=5, seq_len=1024))
    found = inputs.load_inputs(config, tmp_path / "sft", None, console)
    assert len(found.train) == 55
    lines = console.file.getvalue().splitlines()
    assert lines[0] == f"reading {tmp_path}"
    assert any("data.streaming true reads them during the training" in line for line in lines) == warned


def test_this_machine_has_memory() -> None:
    assert 10**8 < inputs.physical_memory() < 10**15
