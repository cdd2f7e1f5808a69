"""Inputs that changed: what is an error, what is only told, and what the flag does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import write_model
from helpers.stage_inputs import begin, small_config, sum_row, write_jsonl

from cotgrpo.atomic_files import read_json
from cotgrpo.config import Config, ConfigError, StudentConfig
from cotgrpo.data.questions import Question
from cotgrpo.identity.known import EXPORTED, HELD_OUT, copy_split
from cotgrpo.identity.record import InputsRecord
from cotgrpo.training.inputs import load_eval_inputs

Rows = list[dict[str, Any]]
ROWS = [sum_row(n) for n in range(40)]
STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["memory", "streaming"])
STAGES = pytest.mark.parametrize("stage", ["sft", "grpo"], ids=["resume", "next stage"])


def index_of(folder: Path, held_out: bool, **options: Any) -> int:
    """Return a row of the file that is held out, or that is not."""
    split = begin(small_config(folder, **options), "sft")
    asked = split.held_out if held_out else split.trained
    return next(n for n, row in enumerate(ROWS) if row["question"] in asked)


def edited(rows: Rows, number: int, **fields: Any) -> Rows:
    return [{**row, **(fields if n == number else {})} for n, row in enumerate(rows)]


CHANGED: dict[str, tuple[Callable[[Rows, int], Rows], str]] = {
    "another rationale": (lambda rows, n: edited(rows, n, rationale="No."), "1 edited (first: {file}:{line})"),
    "another answer": (lambda rows, n: edited(rows, n, answer="7"), "1 edited (first: {file}:{line})"),
    "another question": (lambda rows, n: edited(rows, n, question="Why?"), "1 edited (first: {file}:{line})"),
    "a system message": (lambda rows, n: edited(rows, n, system="Add."), "1 edited (first: {file}:{line})"),
    "a row less": (lambda rows, n: rows[:n] + rows[n + 1 :], "1 removed (first was {file}:{line})"),
    "edited and shuffled": (lambda rows, n: edited(rows, n, rationale="No.")[::-1], "1 edited"),
}


@STREAMED
@STAGES
@pytest.mark.parametrize("change", CHANGED)
def test_training_rows(tmp_path: Path, change: str, stage: str, streaming: bool) -> None:
    """A row that is edited or removed is an error that names it, until the flag allows it."""
    path, (make, message) = write_jsonl(tmp_path / "rows.jsonl", ROWS), CHANGED[change]
    number = index_of(tmp_path, held_out=False, streaming=streaming)
    origin = tmp_path / "run" / "sft" if stage == "grpo" else None
    write_jsonl(path, make(ROWS, number))
    with pytest.raises(ConfigError) as error:
        begin(small_config(tmp_path, streaming=streaming), stage, origin)
    if streaming and "shuffled" in change:  # the lines' hashes tell no question
        message = "1 removed (first was {file}:{line}), 1 new"
    assert message.format(file=path, line=number + 1) in str(error.value)
    assert str(tmp_path / "run" / "sft") in str(error.value) and "go on with --allow_changed data" in str(error.value)
    found = begin(small_config(tmp_path, streaming=streaming, allow_changed="data"), stage, origin)
    assert "allowed: training rows: 1" in found.printed
    again = begin(small_config(tmp_path, streaming=streaming), stage, origin)
    assert again.train == found.train and "allowed" not in again.printed
    assert InputsRecord.load(tmp_path / "run" / stage) is not None


@STREAMED
@STAGES
@pytest.mark.parametrize(
    ("change", "kinds"),
    [("another answer", "held_out"), ("a row less", "held_out"), ("another question", "held_out")],
)
def test_held_out_rows(tmp_path: Path, change: str, kinds: str, stage: str, streaming: bool) -> None:
    path, (make, _) = write_jsonl(tmp_path / "rows.jsonl", ROWS), CHANGED[change]
    number = index_of(tmp_path, held_out=True, streaming=streaming)
    origin = tmp_path / "run" / "sft" if stage == "grpo" else None
    write_jsonl(path, make(ROWS, number))
    # Of a stream, the line is one of the rows that may be trained on too.
    allowed = f"data,{kinds}" if streaming else kinds
    with pytest.raises(ConfigError, match=rf"held-out rows: 1 \w+.*--allow_changed {allowed}"):
        begin(small_config(tmp_path, streaming=streaming), stage, origin)
    begin(small_config(tmp_path, streaming=streaming, allow_changed=allowed), stage, origin)


@STAGES
def test_rows_of_a_test_file(tmp_path: Path, stage: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    tests = [sum_row(n) for n in range(100, 110)]
    path = write_jsonl(tmp_path / "test.jsonl", tests)
    first = begin(small_config(tmp_path, test=str(path)), "sft")
    assert "held-out split: 10 rows of data.test" in first.inputs.split_text
    assert not (tmp_path / "run" / HELD_OUT).exists()
    origin = tmp_path / "run" / "sft" if stage == "grpo" else None
    write_jsonl(path, edited(tests, 3, answer="5"))
    with pytest.raises(ConfigError, match=rf"held-out rows: 1 edited \(first: {path}:4\).*--allow_changed held_out"):
        begin(small_config(tmp_path, test=str(path)), stage, origin)
    write_jsonl(path, [sum_row(112), *tests[::-1], sum_row(111)])
    found = begin(small_config(tmp_path, test=str(path)), stage, origin)
    assert "2 rows were appended to data.test" in found.printed if stage == "sft" else True
    assert len(found.held_out) == (10 if stage == "sft" else 12)


def test_a_test_question_that_was_trained_on(tmp_path: Path) -> None:
    """Whatever the way that it came there."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path = write_jsonl(tmp_path / "test.jsonl", [sum_row(n) for n in range(100, 110)])
    begin(small_config(tmp_path, test=str(path)), "sft")
    other = write_jsonl(tmp_path / "other.jsonl", [sum_row(n) for n in range(38, 50)])
    with pytest.raises(ConfigError, match=rf"2 of 12 held-out questions were trained on \(first: {other}:1\)"):
        begin(small_config(tmp_path, test=str(other)), "grpo", tmp_path / "run" / "sft")
    first = InputsRecord.load(tmp_path / "run" / "sft")
    assert first is not None
    asked = first.with_trained([Question("new?", "1"), Question(ROWS[0]["question"], "1")])
    assert len(asked.trained) == len(first.trained) + 1
    with pytest.raises(ConfigError, match=r"trained on all of them. Name held-out rows in data\.test"):
        begin(small_config(tmp_path), "grpo", tmp_path / "run" / "sft")


@STREAMED
def test_appended_rows(tmp_path: Path, streaming: bool) -> None:
    """A stage that goes on keeps its own rows and their order; the next one uses and counts them all."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = begin(small_config(tmp_path, streaming=streaming), "sft")
    write_jsonl(path, [sum_row(n) for n in range(100, 150)] + ROWS[::-1])
    resumed = begin(small_config(tmp_path, streaming=streaming), "sft")
    assert resumed.train == first.train and resumed.held_out == first.held_out
    assert f"50 rows were appended since {tmp_path / 'run' / 'sft'} began: they are used by the next" in resumed.printed
    later = begin(small_config(tmp_path, streaming=streaming, seed=1, test_rows=20), "grpo", tmp_path / "run" / "sft")
    assert "50 rows were appended since" in later.printed and "they are used from now on" in later.printed
    assert "data.test_rows 20 is not used: the run holds out the questions of data.test_rows 8" in later.printed
    assert later.trained > first.trained and later.held_out >= first.held_out
    assert len(later.trained | later.held_out) == 90


def test_the_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    begin(small_config(tmp_path), "sft")
    path = tmp_path / "run" / "sft" / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokens = tokenizer["model"]["vocab"]
    first, second = list(tokens)[100:102]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    for stage, origin in (("sft", None), ("grpo", tmp_path / "run" / "sft")):
        with pytest.raises(ConfigError, match=r"the tokenizer has another vocabulary.*--allow_changed tokenizer"):
            begin(small_config(tmp_path), stage, origin)
    begin(small_config(tmp_path, allow_changed="tokenizer"), "grpo", tmp_path / "run" / "sft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pretrained") / "model", [row["question"] for row in ROWS])


def change_weights(model: Path) -> None:
    (path,) = model.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_field(model: Path, name: str, field: str, value: Any) -> None:
    path = model / name
    path.write_text(json.dumps(read_json(path) | {field: value}), encoding="utf-8")


STUDENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (change_weights, "the student has other weights"),
    "config": (lambda model: change_field(model, "config.json", "rope_theta", 5e5), "the student has other config"),
    "stops": (
        lambda model: change_field(model, "generation_config.json", "eos_token_id", [2]),
        "the student has other generation_config",
    ),
}


@pytest.mark.parametrize("change", STUDENTS)
def test_a_pretrained_student(tmp_path: Path, model: Path, change: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    own, (make, message) = tmp_path / "model", STUDENTS[change]
    shutil.copytree(model, own)

    def config(allow_changed: str = "") -> Config:
        return dataclasses.replace(
            small_config(tmp_path, allow_changed=allow_changed), student=StudentConfig(path=str(own))
        )

    begin(config(), "sft")
    make(own)
    for stage, origin in (("sft", None), ("grpo", tmp_path / "run" / "sft")):
        with pytest.raises(ConfigError, match=rf"{message}.*--allow_changed student"):
            begin(config(), stage, origin)
    assert f"allowed: {message}" in begin(config("student"), "grpo", tmp_path / "run" / "sft").printed
    begin(config(), "grpo")
    load_eval_inputs(config(), folder=tmp_path / "run" / "grpo")
    with pytest.raises(ConfigError, match=message):
        load_eval_inputs(config(), folder=tmp_path / "run" / "sft")


def test_the_checkpoint_that_a_stage_starts_from(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    begin(small_config(tmp_path), "sft")
    sft = tmp_path / "run" / "sft"
    (sft / "checkpoints" / "4").mkdir(parents=True)
    checksums = sft / "checkpoints" / "4" / "checksums.json"
    checksums.write_text("{}", encoding="utf-8")
    begin(small_config(tmp_path), "grpo", sft)
    begin(small_config(tmp_path), "grpo", sft)
    checksums.write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the student has other start \(checksums\).*--allow_changed student"):
        begin(small_config(tmp_path), "grpo", sft)
    shutil.rmtree(sft / "checkpoints")  # a stage that has begun needs it no more
    begin(small_config(tmp_path), "grpo", sft)


def test_an_exported_student_keeps_its_split(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = begin(small_config(tmp_path), "sft")
    exported = tmp_path / "exported"
    shutil.copytree(model, exported)
    copy_split(tmp_path / "run", exported)
    config = dataclasses.replace(
        small_config(tmp_path, seed=7, test_rows=3),
        run_dir=str(tmp_path / "other"),
        student=StudentConfig(path=str(exported)),
    )
    second = begin(config, "sft")
    assert second.held_out == first.held_out and str(exported / EXPORTED) in second.inputs.split_text
    measured = load_eval_inputs(dataclasses.replace(config, run_dir=str(tmp_path / "none")))
    assert {q.question for q in measured.test_questions} == first.held_out


def test_other_package_versions_are_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    begin(small_config(tmp_path), "sft")
    record = tmp_path / "run" / "sft" / "inputs.json"
    record.write_text(json.dumps(read_json(record) | {"versions": {"cotgrpo": "0.0.1", "gone": "1"}}), encoding="utf-8")
    assert "other package versions: cotgrpo 0.0.1 then" in begin(small_config(tmp_path), "sft").printed


def test_a_measurement_of_other_rows(tmp_path: Path) -> None:
    """Held-out rows that changed are an error; training rows that changed are told."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    number, other = (index_of(tmp_path, held_out=held_out) for held_out in (True, False))
    folder = tmp_path / "run" / "sft"
    write_jsonl(path, edited(ROWS, number, answer="5"))
    with pytest.raises(ConfigError, match="held-out rows: 1 edited"):
        load_eval_inputs(small_config(tmp_path), folder=folder)
    write_jsonl(path, [*edited(ROWS, other, answer="5"), *(sum_row(n) for n in range(100, 130))][::-1])
    found = load_eval_inputs(small_config(tmp_path), folder=folder)
    assert len(found.test_questions) == 8 and "held-out split: 8 questions" in found.split_text


@pytest.mark.parametrize("lost", ["held_out.json", "sft/inputs.json", "sft/inputs.npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_one_lost_file_is_made_again(tmp_path: Path, lost: str, damage: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = begin(small_config(tmp_path), "sft")
    path = tmp_path / "run" / lost
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    again = begin(small_config(tmp_path, seed=1, test_rows=5), "grpo", tmp_path / "run" / "sft")
    assert not (first.trained & again.held_out or first.held_out & again.trained)
    assert (tmp_path / "run" / HELD_OUT).is_file()
    begin(small_config(tmp_path), "sft")
    if damage != "missing" or lost != "held_out.json":
        assert (path.read_bytes() == whole) == (lost != "sft/inputs.npz") or lost.endswith("npz")


def test_a_split_that_is_lost_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    begin(small_config(tmp_path), "sft")
    for name in (HELD_OUT, "sft/inputs.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match=r"held_out\.json is missing or damaged.*Restore one of them from a backup"):
        begin(small_config(tmp_path, seed=1), "grpo", tmp_path / "run" / "sft")


@STREAMED
def test_a_run_of_an_older_version(tmp_path: Path, streaming: bool) -> None:
    """It keeps the rows that its seed drew, also in a stage with another seed."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    begin(small_config(tmp_path, streaming=streaming), "sft")
    saved = tmp_path / "run" / "sft" / "config.yaml"
    saved.write_text(saved.read_text(encoding="utf-8").replace("allow_changed: []\n", ""), encoding="utf-8")
    for name in (HELD_OUT, "sft/inputs.json", "sft/inputs.npz"):
        (tmp_path / "run" / name).unlink()
    drawn = [sum_row(n)["question"] for n in sorted(np.random.default_rng(0).permutation(40)[:8].tolist())]
    origin = tmp_path / "run" / "sft"
    later = begin(small_config(tmp_path, streaming=streaming, seed=1), "grpo", origin)
    assert "drawn as an older version did" in later.inputs.split_text
    assert streaming or later.held_out == set(drawn)
    write_jsonl(path, [sum_row(n) for n in range(100, 120)] + ROWS)
    resumed = begin(small_config(tmp_path, streaming=streaming), "sft")
    assert resumed.held_out == later.held_out and not resumed.held_out & resumed.trained


def test_a_run_that_starts_from_another_run(tmp_path: Path) -> None:
    """It takes that run's split, and refuses to use two."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first = begin(small_config(tmp_path), "sft")
    config = small_config(tmp_path, seed=5)
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"))
    second = begin(other, "grpo", tmp_path / "run" / "sft")
    assert second.held_out == first.held_out and second.inputs.split_text.endswith(f"({tmp_path / 'run' / HELD_OUT})")
    assert read_json(tmp_path / "other" / HELD_OUT) == read_json(tmp_path / "run" / HELD_OUT)
    third = dataclasses.replace(config, run_dir=str(tmp_path / "third"))
    begin(third, "sft")
    with pytest.raises(ConfigError, match=r"holds other questions out than .*third.*--allow_changed held_out"):
        begin(third, "grpo", tmp_path / "run" / "sft")
    assert path.is_file()
