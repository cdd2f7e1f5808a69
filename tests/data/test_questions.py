"""Held-out rows: every question with a right answer is asked, and the loss sees the correct replies alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotgrpo.cli import main
from cotgrpo.config import Config, DataConfig, EvalConfig
from cotgrpo.data.questions import Question, make_held_out, read_questions
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.training.inputs import read_train_and_test

SVAMP = Path(__file__).parents[3] / "shared" / "data" / "svamp_palm540b.jsonl"
ROWS: list[tuple[dict[str, Any], str, bool]] = [
    ({"question": "1", "rationale": "r", "answer": "1"}, "1", True),
    ({"question": "2", "rationale": "r", "answer": "3", "gold": "2"}, "2", False),
    ({"question": "3", "rationale": "r", "answer": "3.0", "gold": 3}, "3", True),
    ({"question": "4", "rationale": "r", "answer": None, "gold": "4", "correct": False}, "4", False),
    ({"question": "5", "gold": "5"}, "5", False),
    ({"question": "6", "answer": 6}, "6", False),
    ({"question": "7", "answer": "r #### 7"}, "7", True),
    ({"question": "8", "rationale": " ", "answer": "", "gold": "8"}, "8", False),
    ({"question": "9", "rationale": "r", "answer": "9", "gold": "9", "correct": False}, "9", False),
    ({"question": "10", "rationale": "r", "answer": "ten", "gold": "10", "correct": True}, "10", True),
    ({"prompt": "11", "completion": "I do not know", "gold": "11"}, "11", False),
    ({"prompt": "12", "completion": "r #### 13", "gold": "12"}, "12", False),
]
"""Row, its right answer, and whether its reply counts for the loss."""


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("row", "gold", "correct"), ROWS)
def test_rows(row: dict[str, Any], gold: str, correct: bool, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row)
    (question,), report = read_questions(path)
    assert (question.gold, question.source, report.kept) == (gold, f"{path}:1", 1)
    assert (question.reference is not None) == correct
    if question.reference is not None:
        assert [question.reference] == read_triples(path)[0] and question.question == question.reference.question


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold": "1"}, "missing field 'question'"),
        ({"question": "q"}, "no right answer: expected a field gold, or an answer that is correct. Add it"),
        ({"question": "q", "gold": " "}, "no right answer"),
        ({"question": "q", "rationale": "r", "answer": "1", "correct": False}, "no right answer"),
        ({"prompt": "q", "completion": "so I think"}, "no right answer"),
        ({"question": "q", "gold": ["1"]}, "'gold' must be text, got list"),
        ({"question": "q", "answer": "1", "correct": "false"}, "'correct' must be true or false, got 'false'"),
        ({"question": "q", "rationale": 5, "answer": "1"}, "'rationale' must be text, got int 5"),
        ([], "expected a JSON object"),
    ],
)
def test_bad_rows(row: Any, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"question": "q", "answer": "1"}, row)
    with pytest.raises(DataError, match=message) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:2: ")
    questions, report = read_questions(path, bad_rows="drop")
    assert len(questions) == 1 and report.dropped == {"bad row": 1}
    with pytest.raises(DataError, match=r"No usable row in .*rows.jsonl. 0 of 1 rows kept"):
        read_questions(jsonl(path, row), bad_rows="drop")


def test_splits_and_duplicates(tmp_path: Path) -> None:
    """Two wrong replies to one question are two rows, as two right ones are."""
    row = {"question": "q", "rationale": "r", "answer": "1", "gold": "2"}
    path = jsonl(tmp_path / "rows.jsonl", row, row, row | {"answer": "3"}, row | {"split": "train"})
    questions, report = read_questions(path, split="test")
    assert [question.source for question in questions] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {"duplicate": 1, "other split": 1}


def test_a_system_message_of_its_own(template: Template, tmp_path: Path) -> None:
    """Exact match asks with it, wrong reply or not, and with what the loss reads."""
    row = {"question": "q", "rationale": "r", "answer": "1", "gold": "1"}
    path = jsonl(tmp_path / "rows.jsonl", row, row | {"system": "s"}, row | {"system": "s", "answer": "2"})
    questions, _ = read_questions(path)
    assert [question.system for question in questions] == ["", "s", "s"]
    prompt = template.prompt("q", "s").tolist()
    assert prompt == template.prompt("s\n\nq").tolist()
    _, (_, example), _ = make_held_out(questions, template, 64)
    assert example.tokens[: len(prompt)].tolist() == prompt
    with pytest.raises(DataError, match=r"rows.jsonl:3: the prompt needs 5 positions"):
        make_held_out(questions[2:], template, len(prompt) - 1)


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(train_tokenizer([], vocab_size=260), loss_on="completion")


def test_what_does_not_fit_the_window(template: Template) -> None:
    """A reply that is too long leaves its question; a prompt that is too long does not."""

    def asked(question: str, rationale: str | None) -> Question:
        reference = None if rationale is None else Triple(question, rationale, "1", source=f"f:{question[:1]}")
        return Question(question, "1", reference, f"f:{question[:1]}")

    length = len(template.prompt("a" * 20))
    rows = [asked("a", "r"), asked("b" * 20, "r" * 90), asked("c" * 20, None), asked("d" * 21, None)]
    questions, examples, reports = make_held_out(rows, template, length, too_long="drop")
    assert [question.question[0] for question in questions] == ["a", "b", "c"]
    assert [example.source for example in examples] == ["f:a"]
    assert reports["held-out questions"].to_dict() | {"examples": {}} == {
        "read": 4,
        "kept": 3,
        "dropped": {"too long": 1},
        "examples": {},
    }
    replies = reports["held-out replies"]
    assert (replies.read, replies.kept) == (3, 1) and replies.dropped == {"too long": 1, "no correct reply": 1}
    for some, message in (
        (slice(1, 3), r"f:b: needs \d+ positions"),
        (slice(3, 4), r"f:d: the prompt needs \d+ positions.*Raise seq_len"),
    ):
        with pytest.raises(DataError, match=message):
            make_held_out(rows[some], template, length)
    with pytest.raises(DataError, match="No held-out question fits into 5 positions"):
        make_held_out(rows[1:], template, 5, too_long="drop")


def test_held_out_of_the_training_file(tmp_path: Path) -> None:
    """Questions that the teacher got wrong are drawn as often as others, and are not trained on."""
    rows = [{"question": f"q{i}", "rationale": f"r{i}", "answer": str(i % 2), "gold": "1"} for i in range(40)]
    no_right_answer = {"question": "q", "rationale": "r", "answer": "2", "correct": False}
    config = Config(
        data=DataConfig(train=str(jsonl(tmp_path / "rows.jsonl", *rows, no_right_answer)), test_rows=20),
        eval=EvalConfig(rows=30),
    )
    train, test, reports = read_train_and_test(config)
    wrong = [question for question in test if question.reference is None]
    assert len(test) == 20 and 0 < len(wrong) < 20 and all(question.gold == "1" for question in test)
    assert len(train) == 20 - (20 - len(wrong)) and not {t.question for t in train} & {q.question for q in test}
    report = reports["training rows"]
    assert report.dropped == {"wrong answer": 21, "held out for testing": 20 - len(wrong)} and report.kept == len(train)
    rows_and_mistakes, _, _ = read_train_and_test(
        dataclasses.replace(config, data=dataclasses.replace(config.data, keep_incorrect=True))
    )
    assert len(rows_and_mistakes) == 21 and not {t.question for t in rows_and_mistakes} & {q.question for q in test}
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(40)]
    jsonl(tmp_path / "rows.jsonl", *shuffled)
    again = read_train_and_test(config)[1]
    assert {q.question for q in again} == {q.question for q in test} and again != test
    assert [q.question for q in again] == [
        r["question"] for r in shuffled if r["question"] in {q.question for q in test}
    ]


def test_what_is_noted_of_held_out_rows(tmp_path: Path) -> None:
    """Of those that are drawn only. Chats that end in the same words are different questions."""
    said = [("Hi", "Hello!"), ("Go on.", "It is 5, I think.")]
    roles = ("user", "assistant")
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{t} {i if n == 0 else ''}"}
                for n, pair in enumerate(said)
                for r, t in zip(roles, pair, strict=True)
            ]
        }
        for i in range(6)
    ]
    rows += [
        {"question": f"q{i}", "response": f"We add them up to {i} apples. In all there are {i}."} for i in range(6)
    ]
    config = Config(data=DataConfig(train=str(jsonl(tmp_path / "rows.jsonl", *rows)), test_rows=6))
    train, test, reports = read_train_and_test(config)
    assert len(train) == len(test) == 6 and reports["training rows"].dropped == {"held out for testing": 6}
    prose = sum(not question.context for question in test)
    assert 0 < prose < 6 and reports["held-out rows"].noted == {"gold read from prose": prose}
    assert (reports["held-out rows"].read, reports["held-out rows"].kept) == (6, 6)


@pytest.mark.skipif(not SVAMP.is_file(), reason=f"the real data set is not at {SVAMP}")
def test_svamp() -> None:
    """200 questions, of which the teacher got 155 right; 7 wrong rows have no answer at all."""
    questions, report = read_questions(SVAMP, split="test")
    assert (len(questions), report.read, report.dropped) == (200, 1000, {"other split": 800})
    correct = [question.reference for question in questions if question.reference is not None]
    assert len(correct) == 155 and correct == read_triples(SVAMP, split="test")[0]
    assert {question.gold for question in questions} >= {"22", "21"}


SETTINGS = """
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 16}
tokenizer: {vocab_size: 300}
data: {seq_len: 64}
sft: {steps: 2, batch_size: 2, log_every: 1, eval_every: 1}
grpo: {steps: 1, batch_size: 2, log_every: 1}
eval: {batch_size: 8, max_new_tokens: 4}
"""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("only_wrong", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run(only_wrong: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any correct reply there is accuracy, and no loss anywhere."""
    train = [{"question": f"train {i}", "rationale": "r", "answer": str(i)} for i in range(8)]
    test = [row for row, _, correct in ROWS if not (only_wrong and correct)]
    config = tmp_path / "c.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    arguments += ["--data.train", str(jsonl(tmp_path / "train.jsonl", *train))]
    arguments += ["--data.test", str(jsonl(tmp_path / "test.jsonl", *test))]
    references = 0 if only_wrong else 4
    stages = ("sft",) if only_wrong else ("sft", "grpo")
    for command in stages:
        assert main([command, *arguments]) == 0
    said = capsys.readouterr().out
    assert ("no loss: no row has a correct reply" in said) == only_wrong
    report = read(tmp_path / "run" / stages[-1] / "report.json")
    assert {row["n"] for row in report["accuracy"].values()} == {len(test)}
    assert report["held_out_rows"] == {"accuracy": len(test), "loss": references}
    assert set(report["held_out_loss"]) == (set() if only_wrong else {"base", *stages})
    assert report["data"]["held-out replies"]["dropped"] == {"no correct reply": len(test) - references}
    page = (tmp_path / "run" / stages[-1] / "report.html").read_text(encoding="utf-8")
    assert ("There is no loss" if only_wrong else "The loss is that of the 4 of 12 with a correct") in page
    log = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text(encoding="utf-8")
    assert ("eval/loss" in log) != only_wrong
    assert main(["eval", "--run_dir", str(tmp_path / "run")]) == 0
    measured = read(tmp_path / "run" / stages[-1] / "eval.json")
    assert (measured["loss"] is None) == only_wrong and measured["loss_rows"] == references
    assert [reply["gold"] for reply in measured["replies"]] == [
        g for _, g, correct in ROWS if not (only_wrong and correct)
    ]
    assert main(["export", "--run_dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert f"% of {len(test)} (95 %" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
