"""Runs with epochs, accuracy during SFT, drawn replies and several test sets: their files, their page, their resume."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import SETTINGS, read
from rich.console import Console

from cotgrpo.data.sources import DataError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = yaml.safe_load(SETTINGS)
DRAWN = {"samples": 2, "k": [1, 2], "temperature": 0.8}
EVAL = {"rows": 4, "batch_size": 4, "max_new_tokens": 6}


def run_of(folder: Path, out: io.StringIO, **evaluation: Any) -> Run:
    stage = SMALL["sft"] | {"epochs": 0.2, "eval_every": 2, "eval_accuracy": True, "log_every": 1}
    del stage["steps"]
    stage["optimizer"] = {"learning_rate": 1e-3, "warmup_ratio": 0.5, "schedule": "constant"}
    return Run(
        folder / "run",
        train=str(folder / "rows.jsonl"),
        console=Console(file=out, width=200),
        **{**SMALL, "sft": stage, "eval": EVAL | evaluation},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT with everything."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, seed, count in (("rows", 1, 60), ("math", 2, 3), ("gsm8k", 3, 12)):
        write_triples(folder / f"{name}.jsonl", ProceduralTeacher(seed=seed).draw(count))
    sets = {name: str(folder / f"{name}.jsonl") for name in ("math", "gsm8k")}
    out = io.StringIO()
    run_of(folder, out, sets=sets, **DRAWN).sft()
    (folder / "out.txt").write_text(out.getvalue(), encoding="utf-8")
    return folder


def test_steps_follow_from_the_epochs_and_are_recorded(folder: Path) -> None:
    stage = folder / "run" / "sft"
    recorded = read(stage / "epochs.json")
    assert recorded["steps"] == -(-round(0.2 * recorded["rows"] * 10) // 20) > 1
    line = f"0.2 epochs of {recorded['rows']} packed rows, 2 a batch, are {recorded['steps']} steps"
    assert line in (folder / "out.txt").read_text(encoding="utf-8").splitlines()
    rows = read_metrics(stage)
    assert rows[-1]["step"] == recorded["steps"]
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    warmup = -(-recorded["steps"] // 2)
    assert rates == pytest.approx([1e-3 * min(1, (step + 1) / warmup) for step in range(recorded["steps"])])
    saved = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
    assert saved["sft"]["epochs"] == 0.2 and "steps" not in saved["sft"]
    assert f"0.2 epochs of the training rows are {recorded['steps']} steps." in read(stage / "report.json")["notes"]


def test_accuracy_is_measured_during_sft(folder: Path) -> None:
    rows = read_metrics(folder / "run" / "sft")
    measured = [row["step"] for row in rows if "eval/accuracy" in row]
    last = rows[-1]["step"]
    assert measured == sorted({*range(2, last + 1, 2), last})
    assert "Reply accuracy" in (folder / "run" / "sft" / "report.html").read_text(encoding="utf-8")


def test_every_set_is_in_the_files_the_page_and_the_terminal(folder: Path) -> None:
    stage, out = folder / "run" / "sft", (folder / "out.txt").read_text(encoding="utf-8")
    after = read(stage / "after.json")
    assert {name: found["accuracy"]["n"] for name, found in after["sets"].items()} == {"math": 3, "gsm8k": 4}
    names = ["pass@1", "pass@2", "maj@2"]
    for found in (after, *after["sets"].values()):
        assert [name for name in found["sampled"] if "@" in name] == names
        assert [len(row["samples"]) for row in found["replies"]] == [2] * found["accuracy"]["n"]
        assert found["sampled"]["pass@1"]["n"] == found["accuracy"]["n"]
    rows = read(stage / "report.json")["evaluations"]
    places = [(row["moment"], row["set"]) for row in rows]
    assert places == [(moment, name) for moment in ("base", "sft") for name in ("held-out", "math", "gsm8k")]
    page = (stage / "report.html").read_text(encoding="utf-8")
    for text in ("<th>maj@2</th>", "<td>gsm8k</td>", "2 replies to each question, temperature 0.8, seed 0"):
        assert text in page
    assert "after sft: held-out pass@1" in out
    heading = next(line for line in out.splitlines() if line.startswith("  test set"))
    assert heading.split() == ["test", "set", "rows", "accuracy", *names]


def test_evaluate_takes_the_settings_of_eval(folder: Path) -> None:
    run = Run.open(folder / "run", console=Console(file=io.StringIO()))
    found = run.evaluate(samples=3, k=3, temperature=1.2, seed=7, sets={"other": str(folder / "math.jsonl")})
    assert found == read(folder / "run" / "sft" / "eval.json")
    assert list(found["sets"]) == ["other"] and list(found["sampled"])[-4:-2] == ["pass@3", "maj@3"]
    page = (folder / "run" / "sft" / "report.html").read_text(encoding="utf-8")
    assert "cotgrpo eval, step" in page and "<td>other</td>" in page and "<th>maj@3</th>" in page
    again = run.evaluate(samples=3, k=3, temperature=1.2, seed=7, sets={}, batch_size=2)
    assert [row["samples"] for row in again["replies"]] == [row["samples"] for row in found["replies"]]
    assert again["sampled"] == found["sampled"] and "sets" not in again
    greedy = run.evaluate(samples=0, sets={})
    assert greedy["accuracy"] == found["accuracy"] and "sampled" not in greedy
    with pytest.raises(DataError, match=r"^eval\.sets\.gone: .*gone\.jsonl"):
        run.evaluate(sets={"gone": str(folder / "gone.jsonl")})


def test_a_resumed_run_keeps_the_steps_of_the_first(folder: Path) -> None:
    """More rows came, and the stage lacks its end: it has as many steps, and the same numbers."""
    stage = folder / "run" / "sft"
    steps, log = read(stage / "epochs.json")["steps"], (stage / "metrics.jsonl").read_text(encoding="utf-8")
    more = ProceduralTeacher(seed=9).draw(60)
    with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
        for triple in more:
            row = {"question": triple.question, "rationale": triple.rationale, "answer": triple.answer}
            file.write(json.dumps(row) + "\n")
    for name in ("report.json", "after.json"):
        (stage / name).unlink()
    out = io.StringIO()
    run_of(folder, out, sets={"math": str(folder / "math.jsonl")}, **DRAWN).sft()
    assert f", 2 a batch, are {steps} steps" in out.getvalue()
    assert (stage / "metrics.jsonl").read_text(encoding="utf-8") == log
    # The student before the stage is gone: its measurement stays. The one after it is made with what is asked now.
    assert list(read(stage / "before.json")["sets"]) == ["math", "gsm8k"]
    assert list(read(stage / "after.json")["sets"]) == ["math"]
