"""The blocks on `Run` in the README, in both languages, and in two pages, on a small model and a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import write_model
from helpers.pages import Runner, blocks_of

import cotgrpo.runs
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

TRIPLES = ProceduralTeacher(seed=1).draw(60)
ROWS = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in TRIPLES]
PAGES = {"README.md": "py", "README.zh.md": "py", "docs/python.md": "python", "docs/from_trl.md": "py"}
SAVED = {"README.md", "README.zh.md", "docs/python.md"}
"""Pages that save a student."""


class SmallRun(Run):
    """A run with the page's settings, of a few short steps."""

    def __init__(self, run_dir: Any, **settings: Any) -> None:
        data = {"seq_len": 512, "test_rows": 8, **settings.pop("data", {})}
        super().__init__(run_dir, data=data, eval={"rows": 4, "max_new_tokens": 8}, **settings)

    def sft(self, **settings: Any) -> dict[str, Any]:
        return super().sft(**settings | {"steps": 2, "batch_size": 2})

    def grpo(self, **settings: Any) -> dict[str, Any]:
        ghosts = settings.get("ghosts", {})
        if isinstance(ghosts, dict):
            settings["ghosts"] = ghosts | {"max_new_tokens": 8}
        return super().grpo(**settings | {"steps": 2, "batch_size": 8})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cotgrpo.runs, "Run", SmallRun)
    write_model(tmp_path / "model", [row["question"] + row["rationale"] for row in ROWS])
    write_triples(tmp_path / "rows.jsonl", TRIPLES)
    replace = {
        "org/name": "model",
        "HuggingFaceTB/SmolLM2-135M-Instruct": "model",
        "examples/data/word_problems.jsonl": "rows.jsonl",
        ", ...]": ", *more_rows]",
        "max_new_tokens=256": "max_new_tokens=8",
        "max_new_tokens=128": "max_new_tokens=8",
    }
    runner = Runner(replace, names={"Run": SmallRun, "more_rows": ROWS})
    blocks = [block for block in blocks_of(page) if block.language == PAGES[page]]
    assert any("Run(" in block.code for block in blocks)
    for block in blocks:
        runner.run(block)
    assert (page not in SAVED) or (tmp_path / "my-student" / "model.safetensors").is_file()
