"""Published runs next to what the plan expects: the data is whole, and the errors are within what docs/plan.md says."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.accelerators.step_estimate import RANGE, StepLoad

ROOT = Path(__file__).parents[1]
RUNS = [json.loads(line) for line in (ROOT / "benchmarks" / "published_throughput.jsonl").read_text().splitlines()]
STORED = sorted((ROOT / "benchmarks" / "results" / "plan_calibration").glob("*.json"))


@pytest.fixture(scope="module")
def calibration() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("plan_calibration")


def test_the_runs_are_whole() -> None:
    assert len({run["run"] for run in RUNS}) == len(RUNS) > 20
    kept_back = [run for run in RUNS if not run["fitted"]]
    assert len(kept_back) >= len(RUNS) / 3
    for chip in {parse_topology(run["topology"]).chip.name for run in RUNS}:  # every chip is in both parts
        assert {run["fitted"] for run in RUNS if parse_topology(run["topology"]).chip.name == chip} == {True, False}
    for run in RUNS:
        devices = 1
        for size in run["mesh"].values():
            devices *= size
        assert devices == parse_topology(run["topology"]).num_devices
        assert run["sequences"] % (devices // run["mesh"].get("tensor", 1)) == 0
        assert run["source"] and run["published"] and run["tokens_per_second_per_chip"] > 0


def test_published_operations_are_the_tokens(calibration: Any) -> None:
    """MaxText's figures are TFLOP/s, of 6 a weight and 12 L T Q H for attention, without the causal half."""
    for run in RUNS:
        if (tflops := re.match(r"(\d+) TFLOP/s", run["published"])) is None:
            continue
        work = calibration.plan_of(run).work
        shape = run["shape"]
        attention = 12 * shape["num_hidden_layers"] * run["seq_len"] * shape["num_attention_heads"] * shape["head_dim"]
        a_token = 6 * (work.layer_weights + work.head_weights) + attention
        assert run["tokens_per_second_per_chip"] * a_token == pytest.approx(float(tflops[1]) * 1e12, rel=1e-3)


@pytest.mark.parametrize("by_arithmetic", [False, True], ids=["as stored", "by arithmetic"])
@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "kept back"])
def test_plans_of_published_runs_are_within_their_range(calibration: Any, fitted: bool, by_arithmetic: bool) -> None:
    """Times are computed here from what is stored of each step, so other constants give other errors."""
    found = [calibration.compare(run, by_arithmetic=by_arithmetic) for run in RUNS if run["fitted"] == fitted]
    errors = [abs(row.error) for row in found]
    assert statistics.median(errors) < 0.15 and max(errors) < 0.35
    for row in found:
        assert RANGE[0] * row.seconds < row.published_seconds < RANGE[1] * row.seconds


def test_stored_loads_are_those_of_compiled_runs(calibration: Any) -> None:
    names = {run["run"]: run for run in RUNS}
    assert STORED
    for path in STORED:
        stored = json.loads(path.read_text())
        assert calibration.stored_path(names[stored["run"]]) == path
        load = StepLoad(**stored["load"])
        assert load.compute > 0 and load.kernels > 0 and load.network > 0 and load.memory == 0
        assert set(stored["versions"]) == {"jax", "libtpu"}


def test_the_page_has_the_table(calibration: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibration.main(["--check"]) == 0
    assert "Kept back: " in capsys.readouterr().out
