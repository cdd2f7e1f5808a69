"""`completions.jsonl` and its part of the report: tokens that are parts of one character are joined."""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.report_files import results, write_run

from cotgrpo.data.tokenizer import UNDECODABLE, decode_text, train_tokenizer
from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.logs.completions import CompletionsLog, read_completions
from cotgrpo.reports.completions import read_completion
from cotgrpo.reports.report import write_report

TOKENIZER = train_tokenizer(["a"], vocab_size=259)
"""Without merges: a token is a byte."""


def written(folder: Path, own: str, ghost: str | None, rewards: list[float], cut: int = 0) -> dict[str, Any]:
    """Log one reply, without its last `cut` tokens, and read it again."""
    ids = np.array(TOKENIZER.encode(own))
    ids = ids[: len(ids) - cut]
    ghosts = None if ghost is None else np.array(TOKENIZER.encode(ghost))[None, : len(ids)]
    text = decode_text(TOKENIZER, ids)
    reply = Reply("9中是什么？", "中", text, None, False, cut == 0)
    log = CompletionsLog(folder, every=1, rows=1)
    log.write(1, TOKENIZER, [reply], [ids], ghosts, np.array([rewards], np.float32))
    (row,) = read_completions(folder, 10)
    assert "".join(row["tokens"]) == row["text"] == text
    assert "\ufffd" not in log.path.read_text(encoding="utf-8")
    return row


@pytest.mark.parametrize(
    ("own", "ghost", "tokens", "counts", "ghosts"),
    [
        ("ab", "ab", ["a", "b"], [1, 1], [None, None]),
        ("ab", "ac", ["a", "b"], [1, 1], [None, "c"]),
        ("中a", "中b", ["中", "a"], [3, 1], [None, "b"]),
        ("一", "丁", ["一"], [3], ["丁"]),  # the third byte alone differs
        ("一", "亀", ["一"], [3], [UNDECODABLE]),  # the second byte, after which the ghost has no third
        ("一", "abc", ["一"], [3], ["a"]),
        ("a一", "一a", ["a", "一"], [1, 3], [UNDECODABLE, UNDECODABLE]),
    ],
)
def test_tokens_of_a_character_are_one_entry(
    tmp_path: Path, own: str, ghost: str, tokens: list[str], counts: list[int], ghosts: list[str | None]
) -> None:
    rewards = [0.5 * (n + 1) for n in range(sum(counts))]
    row = written(tmp_path, own, ghost, rewards)
    assert (row["tokens"], row["counts"], row["ghosts"]) == (tokens, counts, ghosts)
    ends = np.cumsum([0, *counts])
    assert row["rewards"] == [sum(rewards[a:b]) for a, b in itertools.pairwise(ends)]


def test_the_advantage_of_a_reply_is_not_summed(tmp_path: Path) -> None:
    row = written(tmp_path, "a中", None, [0.25] * 4)
    assert row["ghosts"] is None and row["rewards"] == [0.25, 0.25] and row["counts"] == [1, 3]


@pytest.mark.parametrize("cut", [1, 2])
def test_half_a_character_at_the_end(tmp_path: Path, cut: int) -> None:
    row = written(tmp_path, "a中", "b中", [1.0] * 4, cut)
    assert row["tokens"] == ["a", UNDECODABLE] and row["counts"] == [1, 3 - cut] and row["rewards"] == [1.0, 3.0 - cut]


def test_a_replacement_character_that_the_student_wrote_stays() -> None:
    ids = TOKENIZER.encode("a\ufffdb")
    assert decode_text(TOKENIZER, ids) == "a\ufffdb"


def test_the_report_shows_joined_tokens(tmp_path: Path) -> None:
    stages = {"grpo": [{"step": 1, "train/loss": 1.0}]}
    folder = write_run(tmp_path, results() | {"wall_seconds": {"grpo": 5}}, stages, single=True)
    row = written(folder, "答：12元", "答：13元", [0.0] * 6 + [0.0, -0.5] + [0.1, 0.2, 0.3])
    shown = read_completion(row)
    assert [token.text for token in shown.tokens] == ["答", "：", "1", "2", "元"]
    assert [token.title for token in shown.tokens][-2:] == [
        "ghost: 3; reward -0.50",
        "the ghost agrees; reward +0.60 (3 tokens)",
    ]
    page = write_report(folder).read_text(encoding="utf-8")
    assert "\ufffd" not in page and "9中是什么？" in page
    tokens = re.findall(r'<span[^>]* title="[^"]*reward[^"]*">([^<]*)</span>', page)
    assert [html.unescape(token) for token in tokens] == row["tokens"]


def test_logs_without_counts_can_be_read() -> None:
    row = {"step": 1, "question": "?", "gold": "1", "correct": True, "tokens": ["a", "b"], "ghosts": [None, "c"]}
    shown = read_completion(row | {"rewards": [0.0, -1.0]})
    assert [token.title for token in shown.tokens] == ["the ghost agrees; reward +0.00", "ghost: c; reward -1.00"]
