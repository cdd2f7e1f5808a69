"""The benchmark scripts run as they are called, at tiny shapes, and write the results that the tables are made of."""

from __future__ import annotations

import importlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
from helpers.commands import write_rows_and_model

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
LIBRARIES = ("contenders", "paired")
"""Files that other scripts import, and nobody calls."""


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(script, *arguments)`: calls its `main` in this process; returns the exit code and the JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def call(script: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "results" / f"{script}.json"
        code = importlib.import_module(script).main([*arguments, "--json", str(path)])
        return code or 0, json.loads(path.read_text())

    return call


@pytest.mark.parametrize("script", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in LIBRARIES))
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every script that is called by hand has a help. Only this shows a single % in a help text, which is an error."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.slow
def test_rollouts(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--width 32 --layers 1 --prompts 8 --prompt 8 --new_tokens 8 --slots 4 --repeats 1 --updates 1"
    _, result = run("rollouts", *small.split())
    at_once, *others = result["sampler"]
    assert [(row["kind"], row["at_a_time"]) for row in others] == [("batches", 4), ("slots", 4)]
    for row in result["sampler"]:
        assert row["tokens_per_sec"] == pytest.approx(8 * row["mean_length"] / row["seconds"])
    assert others[1]["mean_length"] == at_once["mean_length"], "slots write the same replies"
    for row in result["loop"]:
        assert min(row["update_s"], row["drawing_s"], row["step_s"]) > 0
        assert row["idle"] == pytest.approx(1 - (row["drawing_s"] + row["step_s"]) / row["update_s"])
    assert "device idle" in capsys.readouterr().out


@pytest.mark.slow
def test_peers(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """cotgrpo twice: the same losses. A contender that fails, or whose packages are missing, is a row with a reason."""
    options = ["--shape", "tiny", "--batch", "2", "--seq", "16", "--turns", "2"]
    pythons = ["trl=/usr/bin/env", f"tunix={sys.executable}"]
    code, result = run("peers", *options, "--peers", "cotgrpo", "trl", "tunix", "--python", *pythons)
    itself, broken, missing = result["pairs"]
    assert code == 1 and itself["same"]["largest_difference"] == 0
    losses = [ours for ours, _ in itself["same"]["losses"]]
    assert losses[0] > losses[3] > 0
    assert itself["range"][0] <= itself["times_as_fast"] <= itself["range"][1]
    for row in (itself["cotgrpo_row"], itself["peer_row"]):
        assert row["steps"] == 2 and row["tokens_per_sec"] == pytest.approx(2 * 16 / row["median_s"])
        assert row["first_step_s"] > row["max_s"] and row["peak_rss_bytes"] > 0
    assert broken["failed"].startswith("trl: ") and missing["missing"] == "tunix: No module named 'tunix'"
    assert "missing: tunix: No module named 'tunix'" in capsys.readouterr().out


@pytest.mark.parametrize("axes", [["fsdp"], pytest.param(["data", "tensor", "context"], marks=pytest.mark.slow)])
def test_weak_scaling(run: Any, axes: list[str]) -> None:
    """The compiled step sends what theory expects, to 1 %, and nothing on one device."""
    _, result = run("weak_scaling", "--devices", "1", "4", "--axes", *axes)
    rows = {(row["axis"], row["devices"]): row for row in result["rows"]}
    for axis in axes:
        assert rows[axis, 1]["sent"] == rows[axis, 1]["theory"] == 0
        assert rows[axis, 4]["theory"] < rows[axis, 4]["sent"] < 1.01 * rows[axis, 4]["theory"]


def test_context_attention(run: Any) -> None:
    """Three ways that agree, and send what theory says and the positions besides."""
    shape = ["--tokens", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"]
    _, result = run("context_attention", "--devices", "4", *shape, "--repeats", "1")
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == ["gather", "gather, blocks", "ring"]
    keys_and_values = 2 * 4 * 64 * 2 * 32
    for way, parts in (("gather", 3 * 3), ("gather, blocks", 2 * 3), ("ring", 3 + 3 + 4)):
        row = rows[way]
        assert row["difference"] < 1e-5 and row["temporaries"] > 0 and row["min_s"] > 0
        assert row["theory"] == parts * keys_and_values / 4
        assert row["theory"] <= row["sent"] < 1.03 * row["theory"]


def test_gpu_numerics(run: Any) -> None:
    """On a CPU the float32 rows are the same computation twice, and bfloat16 is not."""
    code, result = run("gpu_numerics", "--smoke", "--objectives", "pair_drawn")
    assert code == 0 and result["complete"] and result["failed"] == 0 and result["raised"] == []
    rows = result["rows"]
    assert {row["part"] for row in rows} == {"draw", "decode", "engine", "step"}
    values = {row["value"] for row in rows if row["part"] == "step"}
    assert {"loss", "embedding", "final_norm/scale", "layers/query/kernel", "layers/down/kernel"} <= values
    for row in rows:
        assert row.keys() == {"part", "objective", "precision", "value", "error", "tolerance", "passed"}
    errors = {(row["part"], row["precision"], row["value"]): row["error"] for row in rows}
    assert errors["engine", "float32", "d head"] < 1e-6 < 1e-4 < errors["engine", "bfloat16", "d head"]


def test_gpu_numerics_says_what_is_wrong(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row above its tolerance and a check that raises both make the exit code 1."""
    numerics = importlib.import_module("gpu_numerics")
    raises = lambda *_: (_ for _ in ()).throw(FloatingPointError("no such kernel"))
    bad = numerics.row("engine", "nll", "float32", "d head", math.nan, 1e-5)
    good = numerics.row("step", "nll", "float32", "loss", 0.0, 1e-5)
    monkeypatch.setattr(numerics, "check_draws", raises)
    monkeypatch.setattr(numerics, "check_decode", lambda *_: [])
    monkeypatch.setattr(numerics, "check_engine", lambda *_: [bad])
    monkeypatch.setattr(numerics, "check_step", lambda *_: [good])
    code, result = run("gpu_numerics", "--smoke", "--objectives", "nll")
    assert code == 1 and result["failed"] == 1 and result["raised"] == ["draw"]
    assert [row["passed"] for row in result["rows"]] == [False, True] and result["rows"][0]["error"] is None
    assert "no such kernel" in "".join(capsys.readouterr())


def test_run_gpu_names_the_parts_that_fail(tmp_path: pathlib.Path) -> None:
    """With an interpreter that fails at once every part is tried, named, and counted."""
    script = BENCHMARKS / "run_gpu.sh"
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": "false"}
    done = subprocess.run(["bash", script, "--smoke"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    for name in ("numerics", "step_tiny", "compile", "engine"):
        assert f"FAILED  {name} (exit code 1" in done.stdout
    assert "FAILED  numerics" in (tmp_path / "run.log").read_text()
    assert subprocess.run(["bash", script, "--fast"], env=environment, capture_output=True).returncode == 2


@pytest.mark.slow
def test_real_student(run: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A study of three arms is taken up where it was left, and its runs serve the value of a ghost token."""
    write_rows_and_model(tmp_path)
    rows, work, lines = tmp_path / "rows.jsonl", tmp_path / "study", tmp_path / "lines.jsonl"
    (work / "rows").mkdir(parents=True)
    for name in ("greedy", "drawn"):  # a student of this size never writes a whole reply
        shutil.copy(rows, work / "rows" / f"{name}.jsonl")
    study = importlib.import_module("real_student")
    options = ["--student", str(tmp_path / "model"), "--rows", str(rows), "--work", str(work), "--json", str(lines)]
    options += ["--size", "tiny", "--seeds", "2", "--learning_rates", "1e-4", "1e-3"]
    assert study.main([*options, "--arms", "sft"]) == 0
    before = lines.read_text()
    assert study.main([*options, "--arms", "sft", "teacher_text_labels", "on_policy_drawn"]) == 0
    after = lines.read_text()
    assert after.startswith(before) and len(before.splitlines()) == 2 + 2 + 2 and len(after.splitlines()) == 2 + 3 * 4
    found = [json.loads(line) for line in after.splitlines()]
    assert {len(line["greedy"]) for line in found if "greedy" in line} == {4}
    assert all(0 <= line["changed_tokens"] <= 1 and line["forget_loss"] > 0 for line in found if "greedy" in line)
    assert len({line["rate"] for line in found if line["arm"] == "sft" and "greedy" in line}) == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-7:]
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| teacher", "| start", "| sft", "| teacher_text_labels", "| on_policy_drawn"
    ]  # fmt: skip
    folders = ["--student", str(work / "start"), "--teacher", str(work / "teacher"), "--rows", str(rows)]
    value = importlib.import_module("ghost_value")
    sizes = ["--questions", "6", "--samples", "1", "--draws", "2", "--new_tokens", "8", "--batch_size", "4"]
    assert value.main([*folders, *sizes, "--json", str(tmp_path / "value.jsonl")]) == 0
    ghosts = [json.loads(line) for line in (tmp_path / "value.jsonl").read_text().splitlines()]
    assert [line["ghost"] for line in ghosts] == ["teacher", "privileged_self"]
    for line in ghosts:
        assert line["replies"] == 6 and line["corrected"] == len(line["rows"]) <= line["wrong_replies"] <= 6
        assert all(0 <= right <= 2 for counts in line["right"].values() for right in counts)


@pytest.mark.slow
def test_ablation(run: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every finished run is a line; called again, nothing is repeated, and the table is the same."""
    ablation = importlib.import_module("ablation")
    path = tmp_path / "rows.jsonl"
    arms = [
        "nll, teacher_forced",
        "forward kl, half, new questions",
        "nll+pair, half, 10 % corrupted",
        "nll, drawn ghosts, on_policy",
    ]
    options = ["--size", "tiny", "--work", str(tmp_path), "--json", str(path)]
    small, large = ["--learning_rates", "1e-3", "--seeds", "1"], ["--learning_rates", "1e-3", "2e-3", "--seeds", "2"]
    calls = [(small, arms, 2 + 4), (large, arms[:1], 3 + 4 + 3), (large, arms[:1], 3 + 4 + 3)]
    tables, texts = [], []
    for more, chosen, lines in calls:
        assert ablation.main([*options, *more, "--arms", *chosen]) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
        texts.append(path.read_text())
        assert len(texts[-1].splitlines()) == lines
    assert texts[1].startswith(texts[0]) and texts[1] == texts[2] and tables[1] == tables[2]
    rows = [json.loads(line) for line in texts[-1].splitlines()]
    assert [row["arm"] for row in rows if row["arm"] in ("teacher", "before")] == ["teacher", "before", "before"]
    found = {(row["arm"], row["rate"], row["seed"]) for row in rows if row["arm"] == arms[0]}
    assert found == {(arms[0], rate, seed) for rate in (1e-3, 2e-3) for seed in (0, 1)}
    assert len(tables[0]) == 2 + 2 + 4


def test_an_arm_is_reported_at_its_own_best_learning_rate(run: Any) -> None:
    ablation = importlib.import_module("ablation")
    rows = [
        {
            "arm": "a",
            "rate": rate,
            "seed": seed,
            "steps": 9,
            "validation": validation,
            "test": test,
            "entropy": 0.1,
            "cpu_seconds": 1.0,
        }
        for rate, seed, validation, test in [
            (1.0, 0, 0.5, 0.9),
            (1.0, 1, 0.5, 0.9),
            (2.0, 0, 0.6, 0.3),
            (2.0, 1, 0.6, 0.5),
            (4.0, 0, 0.9, 0.9),
        ]
    ]
    assert "| a | 9 | 2 (1: 90.0, 2: 40.0, 4: 90.0) | 2 | 40.0 +- 14.1 | - | 0.100 | 1 |" in ablation.table(rows)
    sft = [
        row | {"arm": ablation.SFT, "rate": 1.0, "test": 0.1 * (1 + row["seed"])} for row in rows if row["rate"] == 2.0
    ]
    assert "| 40.0 +- 14.1 | +25.0 +- 7.1 | 0.100 | 1 |" in ablation.table([*rows, *sft])


def test_a_corrupted_row_has_one_wrong_digit(run: Any) -> None:
    ablation = importlib.import_module("ablation")
    triples = ablation.ProceduralTeacher(seed=1).draw(300)
    changed = [
        sum(a != b for a, b in zip(f"{t.rationale}|{t.answer}", f"{c.rationale}|{c.answer}", strict=True))
        for t, c in zip(triples, ablation.corrupt(triples, 0.1, 0), strict=True)
    ]
    assert set(changed) == {0, 1} and 15 < sum(changed) < 50


@pytest.mark.slow
def test_run_gpu_smoke(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(["bash", BENCHMARKS / "run_gpu.sh", "--smoke"], env=environment, timeout=660)
    assert done.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.log",
        "numerics.json",
        "step_tiny.json",
        "compile.json",
        "engine.json",
    }


def test_the_tables_of_the_page_are_those_of_the_results(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tables = importlib.import_module("tables")
    page = "\n".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert tables.main(["--check"]) == 0, f"run benchmarks/tables.py: {capsys.readouterr().out}"
    named = {path for _, path, _ in tables.MARKED.findall(page)}
    assert named and all(f"<!-- {path} -->\n| " in page for path in named)
    without = tables.MARKED.sub(lambda match: match[1], page)
    assert without != page == tables.rewritten(without)


def test_the_lines_of_five_tasks_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["peer_steps.py"])
    importlib.import_module("peer_steps").main()
    table = capsys.readouterr().out
    assert table.count("\n") == 7
    assert table in (BENCHMARKS.parent / "docs" / "steps.md").read_text(encoding="utf-8")
