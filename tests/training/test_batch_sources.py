"""Prompts of streamed rows: read by index, with the next row in place of one that is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.data.rows import DropReport
from cotgrpo.data.sources import DataError
from cotgrpo.data.streaming import StreamedTriples, WindowReader, index_rows
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.training.batch_sources import StreamedPrompts

TEMPLATE = Template(train_tokenizer([], vocab_size=260))
"""A token is a byte."""
ROWS = [
    {"question": "held out?", "rationale": "r", "answer": "0"},
    {"question": "1?", "rationale": "r", "answer": "1"},
    {"question": "q" * 40, "rationale": "r", "answer": "2"},
    {"question": "no reply?"},
    {"question": "4?", "rationale": "r" * 99, "answer": "4"},
    {"question": "5?", "rationale": "r", "answer": "5"},
]


def prompts(folder: Path, rows: list[Any], too_long: Any = "drop", bad_rows: Any = "drop") -> StreamedPrompts:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = index_rows([path], folder / "index")
    triples = StreamedTriples(files, bad_rows=bad_rows, held_out=frozenset({"held out?"}))
    return StreamedPrompts(WindowReader(triples, TEMPLATE, 64, too_long), 20, DropReport())


def test_the_next_row_takes_the_place_of_one_that_is_left_out(tmp_path: Path) -> None:
    found = prompts(tmp_path, ROWS)
    assert len(found) == 6
    assert [prompt.question.gold for prompt in found[:]] == ["1", "1", "5", "5", "5", "5"]
    assert [prompt.prompt.tolist() for prompt in found[1:2]] == [TEMPLATE.prompt("1?").tolist()]
    assert found[1].question.source.endswith("rows.jsonl:2") and found[1].teacher_prompt is None
    assert set(found.report.dropped) == {"question is in the test set", "too long", "bad row"}


def test_what_may_not_be_left_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: missing field"):
        prompts(tmp_path, ROWS[3:], bad_rows="error")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the prompt needs 41 positions"):
        prompts(tmp_path, ROWS[2:], too_long="error")
    with pytest.raises(DataError, match="No training row can be used as a prompt"):
        prompts(tmp_path, [ROWS[0], ROWS[2], ROWS[3]])
