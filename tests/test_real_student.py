"""The parts of the study on a real student: its rows, its counted work, its table, and the starts of ghost values."""

from __future__ import annotations

import importlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from cotgrpo.data.triples import Triple
from cotgrpo.models.decoder import DecoderConfig

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("real_student")


@pytest.fixture
def ghost_value(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ghost_value")


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(question: str, answer: int, **more: Any) -> dict[str, Any]:
    return {"question": question, "rationale": f"It is {answer}.", "answer": str(answer), "gold": str(answer)} | more


NAMES = [f"{first}{second}" for first in "abcdefgh" for second in "ijklm"]


def test_rows_are_divided_without_a_leak(study: Any, tmp_path: pathlib.Path) -> None:
    """Test rows are never trained on, nor their form with other numbers, nor rows that are known to be wrong."""
    rows = [row(f"How many {name} are 2 and 3?", 5) for name in NAMES]
    rows += [row(f"How many {name} are 20 and 31?", 51) for name in NAMES]  # the same exercises
    rows += [row(f"What is {name} of 7?", 7, split="test") for name in NAMES[:4]]
    rows += [row(f"Why is {name} 8?", 9, correct=False, gold="8") for name in NAMES[:20]]
    more = [row(f"How many {name} are 6 and 1?", 7) for name in NAMES] + [row(f"Sum {name} 3", 3) for name in NAMES]
    sizes = study.Sizes(test=10, choice=5, small=8, forget=3, more=20)
    files = [write(tmp_path / "a.jsonl", rows)], [write(tmp_path / "b.jsonl", more)]
    found = study.Rows(tmp_path / "rows", sizes, *files)
    counts = {name: len(getattr(found, name)) for name in ("test", "choice", "small", "forget", "more")}
    assert counts == {"test": 10, "choice": 5, "small": 8, "forget": 3, "more": 20}
    assert [question.row.get("split") for question in found.test[:4]] == ["test"] * 4
    parts = [{study.form(each) for each in part} for part in (found.test, found.choice, found.small, found.further)]
    parts += [{study.form(each) for each in part} for part in (found.forget, found.more)]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 10 + 5 + 8 + len(found.further) + 3 + 20
    assert not any("Why" in triple.question for triple in (*found.small, *found.further))
    assert any("Why" in question.question for question in found.test), "a wrong reply, and a good question"
    again = study.Rows(tmp_path / "again", sizes, *files)
    assert [each.question for each in again.test] == [each.question for each in found.test]


def test_too_few_rows_are_an_error(study: Any, tmp_path: pathlib.Path) -> None:
    few = write(tmp_path / "a.jsonl", [row(f"How many {name}?", 5) for name in NAMES[:12]])
    with pytest.raises(SystemExit, match="2 rows are left to train on: more than 8 are needed"):
        study.Rows(tmp_path / "rows", study.Sizes(test=6, choice=4, small=8), [few], [])


@pytest.mark.parametrize(
    ("text", "answer", "replaced"),
    [
        ("4 + 8 = 12. So 12 are left.", "12", 2),
        ("12.5 and 112 and 1.12 and 120", "12", 0),
        ("It is 12.0", "12.0", 0),
        ("the cat", "12", 0),
        ("yes", "yes", 0),
    ],
)
def test_a_mistake_replaces_the_answer_as_a_number(study: Any, text: str, answer: str, replaced: int) -> None:
    spoiled = study.with_mistake(text, answer, "seed")
    assert (spoiled != text) == (replaced > 0)
    if replaced:
        other = spoiled.split(" = ")[1].split(".")[0]
        assert other.isdigit() and 12 < int(other) <= 21
        assert spoiled == f"4 + 8 = {other}. So {other} are left."


def test_a_tenth_of_the_rows_is_wrong(study: Any) -> None:
    rows = [Triple(f"How many are {n} and 1?", f"{n} + 1 = {n + 1}", str(n + 1)) for n in range(1_000)]
    found = study.with_mistakes(rows)
    changed = [new for old, new in zip(rows, found, strict=True) if old != new]
    assert 70 <= len(changed) <= 130  # 100 +- 3 standard deviations of a binomial
    assert all(new.rationale.endswith(f"= {new.answer}") for new in changed), "text and answer agree on the mistake"
    assert study.with_mistakes(rows) == found and study.with_mistakes(rows, 0.0) == rows


@pytest.mark.parametrize(
    ("arm", "passes"), [("sft", 3), ("on_policy", 5), ("privileged_ema", 5), ("group_relative", 4)]
)
def test_work_is_counted(study: Any, arm: str, passes: int) -> None:
    """Means of 4 and of 2 steps; two FLOPs a weight and pass, and the scores of attention."""
    shape = DecoderConfig(
        vocab_size=50, width=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16, tied_head=True
    )
    decoded = {} if study.ARMS[arm].stage == "sft" else {"train/rollout_tokens": 5.0}
    metrics = [{"step": 4, "train/tokens": 10.0} | decoded, {"step": 6, "train/tokens": 20.0} | decoded]
    found = study.work_of(metrics, study.ARMS[arm], shape, 12)
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 50
    scores = 2 * (2 * 2 * 4) * 3 * 12 / 2
    assert found["trained"] == 4 * 10 + 2 * 20 and found["decoded"] == (6 * 5 if decoded else 0)
    assert found["tflops"] == pytest.approx(80 * passes * (2 * weights + scores) / 1e12)


def test_the_table_pairs_seeds_and_questions(study: Any) -> None:
    """Ten questions, two seeds: 60 % against 50 %, always on the same questions but one."""
    figures = {"rate": 1e-4, "steps": 9, "entropy": 0.5, "changed_tokens": 0.25, "length": 40.0, "forget_loss": 2.0}
    figures |= {"trained": 1200.0, "decoded": 0.0, "tflops": 3.0}
    lines = [figures | {"arm": "sft", "seed": seed, "greedy": "1111100000"} for seed in (1, 0)]
    lines += [figures | {"arm": "teacher_text", "seed": seed, "greedy": "1111110000"} for seed in (0, 1)]
    lines += [{"arm": "teacher_text", "rate": 1e-3, "seed": 0, "chosen_on": "choice", "choice": 0.9}]
    lines += [figures | {"arm": "on_policy", "seed": 0, "greedy": "1111111111", "majority": 0.75}]
    sft, text, ours = study.table(lines).splitlines()[2:]
    assert sft.startswith("| sft | 0.0001 | 2 | 50.0 (") and "| - | - | - | -10.0 (" in sft
    assert (
        "| +10.0 (" in text and "| 1, 1 |" in text and text.endswith("| 0.500 | 25.0% | 40 | 2.000 | 1,200 | 0 | 3 |")
    )
    assert "| 75.0 | - | - | - | - |" in ours, "one seed is not compared with two"
    assert study.chart(lines).startswith("<svg")


def test_ways_that_begin_alike_share_their_draws(ghost_value: Any) -> None:
    """y* is the likeliest token in the first reply and not in the second; in the third nothing changes."""
    ids = np.array([5, 6, 7])
    ghosts = lambda teacher, likeliest: {"teacher": np.array(teacher), "likeliest": np.array(likeliest)}
    wrong = [
        ghost_value.Wrong(0, ids, ghosts([5, 9, 7], [5, 9, 7])),
        ghost_value.Wrong(1, ids, ghosts([8, 6, 7], [3, 6, 7])),
        ghost_value.Wrong(2, ids, ghosts([5, 6, 7], [1, 6, 7])),
    ]
    study = object.__new__(ghost_value.Study)
    study.ghosts, study.first = ["teacher"], 40
    asked = []

    def go_on(starts: Any, draws: int, say: Any) -> list[int]:
        asked.extend(starts)
        return [*range(len(starts))]

    study.go_on = go_on
    (found,) = study.values(wrong, 4, print)
    assert asked == [(0, (5, 6)), (0, (5, 9)), (1, (5,)), (1, (8,)), (1, (3,))]
    assert found["right"] == {"own": [0, 2], "ghost": [1, 3], "likeliest": [1, 4]} and found["rows"] == [40, 41]
    assert (found["wrong_replies"], found["corrected"], found["first_change"]) == (3, 2, 0.5)
    assert found["same_as_likeliest"] == 0.5 and found["changed_tokens"] == pytest.approx(2 / 9)


def test_the_value_of_a_question_is_the_mean_of_its_replies(ghost_value: Any) -> None:
    line = {"rows": [3, 3, 7], "draws": 4, "right": {"own": [4, 0, 1], "ghost": [4, 4, 2], "likeliest": [4, 4, 1]}}
    np.testing.assert_allclose(ghost_value.of_questions(line, "own"), [[0.5, 0.25]])
    line |= {"ghost": "teacher", "wrong_replies": 5, "corrected": 3, "changed_tokens": 0.1, "first_change": 2.0}
    line |= {"same_as_likeliest": 0.5}
    other = line | {"rows": [9, 9, 9], "wrong_replies": 15, "changed_tokens": 0.3, "first_change": 4.0}
    alone, both = (ghost_value.table(lines).splitlines()[-1].split(" | ") for lines in ([line], [line, other]))
    assert alone[:6] == ["| teacher", "2", "3 of 5", "10%", "2", "50%"] and alone[6].startswith("37.5 (")
    assert alone[9].startswith("+37.5 (") and alone[11].startswith("+12.5 (")
    assert both[:6] == ["| teacher", "3", "6 of 20", "25%", "3", "50%"] and both[6].startswith("38.9 (")


def test_a_table_needs_no_student(ghost_value: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ghost_value.main(["--json", str(tmp_path / "lines.jsonl")])
    assert "--student and --rows are needed" in capsys.readouterr().err


def test_the_table_of_ghost_values_is_that_of_the_page(ghost_value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/method.md has the table of the lines that are committed."""
    lines = BENCHMARKS / "results" / "cpu" / "ghost_value_smollm2.jsonl"
    assert ghost_value.main(["--table", "--json", str(lines)]) == 0
    page = (BENCHMARKS.parent / "docs" / "method.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page
