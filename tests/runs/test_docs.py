"""The blocks on `Run` in the README and in docs/python.md, on a small model and a few steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.commands import write_model

from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

ROOT = Path(__file__).parents[2]
TRIPLES = ProceduralTeacher(seed=1).draw(60)
ROWS = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in TRIPLES]
PAGES = {"README.md": "py", "docs/python.md": "python"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, in order, as one script."""
    blocks = re.findall(rf"^```{PAGES[page]}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert any("Run(" in block for block in blocks)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", [row["question"] + row["rationale"] for row in ROWS])
    write_triples(tmp_path / "rows.jsonl", TRIPLES)
    code = "\n".join(block for block in blocks)
    code = re.sub(r'"(org/name|HuggingFaceTB/[^"]*)"', repr(str(tmp_path / "model")), code)
    code = re.sub(r"^rows = .*$", "", code, flags=re.M)
    code = re.sub(r"steps=\d+", "steps=2, batch_size=2", code).replace("batch_size=8, ", "")
    code = re.sub(r'data=\{("format": "chat")?("seq_len": 512)?\}', self_made, code)
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=8", code).replace(
        '{"source": "privileged_self"}', '{"source": "privileged_self", "max_new_tokens": 8}'
    )
    code = code.replace("lora={", 'eval={"rows": 4, "max_new_tokens": 8}, lora={')
    names: dict[str, object] = {"rows": ROWS}
    exec(compile(code, page, "exec"), names)
    assert (tmp_path / "my-student" / "model.safetensors").is_file()


def self_made(found: re.Match[str]) -> str:
    """The settings of a small run in the place of the page's."""
    kind = '"format": "chat", ' if found[1] else ""
    small = f'data={{{kind}"seq_len": 512, "test_rows": 8}}'
    return small if found[2] else f'{small}, eval={{"rows": 4, "max_new_tokens": 8}}'
