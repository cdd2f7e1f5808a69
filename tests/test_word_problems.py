"""The word problems of the repository: readable rows whose arithmetic is right, and a config that trains on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cotgrpo.config import load_config
from cotgrpo.data.questions import question_text, read_questions
from cotgrpo.data.triples import read_triples

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "data" / "word_problems.jsonl"
EQUATION = re.compile(r"((?:\d+ [-+*/] )+\d+) = (\d+)")


def value(text: str) -> float:
    """The value of `a + b - c`, or of one product or quotient."""
    parts = text.split()
    found = float(parts[0])
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        found = {"+": found.__add__, "-": found.__sub__, "*": found.__mul__, "/": found.__truediv__}[sign](
            float(number)
        )
    return found


def test_every_row_is_right() -> None:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 759 and len({row["question"] for row in rows}) == 759
    for row in rows:
        found = EQUATION.findall(row["rationale"])
        assert all(value(left) == float(right) for left, right in found), row
        assert found and row["answer"] in re.findall(r"\d+", row["rationale"]), row


@pytest.mark.parametrize(("split", "count"), [("train", 653), ("test", 106)])
def test_both_splits_are_read(split: str, count: int) -> None:
    triples, report = read_triples(FILE, split=split)
    questions, _ = read_questions(FILE, split=split)
    assert len(triples) == len(questions) == count and set(report.dropped) == {"other split"}


def test_the_config_reads_them_from_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question is in both splits."""
    monkeypatch.chdir(ROOT)
    data = load_config(Path("configs/smollm2_word_problems.yaml")).data
    train, _ = read_triples(data.train, split=data.train_split)
    test, _ = read_questions(data.test, split=data.test_split)
    assert len(train) == 653 and not {question_text(row) for row in train} & {question_text(row) for row in test}
