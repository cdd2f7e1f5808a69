"""`cotgrpo bench`: every part runs at a tiny shape, counts what it says, and prints and writes the same."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotgrpo.accelerators.mfu import StepFlops, matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.command import run_bench
from cotgrpo.bench.measure import Times, in_turn, ratio
from cotgrpo.bench.parts import PARTS
from cotgrpo.bench.workload import SHAPES, random_batch
from cotgrpo.cli import main
from cotgrpo.models.config import DecoderConfig

ROOT = Path(__file__).parents[2]
SMALL = ("--shape", "tiny", "--batch", "2", "--seq", "16", "--repeats", "2", "--warmup", "1")


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`bench(part, *arguments)`: what the part writes, after a look at what is the same in all."""

    def call(part: str, *arguments: str) -> dict[str, Any]:
        path = tmp_path / "results" / f"{part}.json"
        found = run_bench([part, *SMALL, *arguments, "--json", str(path)])
        result: dict[str, Any] = json.loads(path.read_text())
        assert result == json.loads(json.dumps(found))
        assert {"device", "backend", "versions", "settings", "params", "matrix_flops_per_sec"} <= set(result)
        out = capsys.readouterr().out
        assert all(title in out for title, _, _ in PARTS[part].columns)
        for row in result["rows"]:
            if "median_s" in row:
                assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        return result

    return call


def test_step(bench: Any) -> None:
    result = bench("step", "--supervised", "0.5")
    assert [row["step"] for row in result["rows"]] == ["sft", "grpo"]
    by_hand = Work(SHAPES["tiny"], tokens=32, seq_len=16, supervised=0.5).model_flops
    for row in result["rows"]:
        assert row["model_flops"] == by_hand
        assert row["tokens_per_sec"] == pytest.approx(2 * 16 / row["median_s"])
        assert row["mfu"] == pytest.approx(by_hand / row["median_s"] / result["matrix_flops_per_sec"])
        assert row["program_bytes"] > row["temp_bytes"] > 0 < row["compile_s"]
        assert row["peak_bytes_so_far"] > row["program_bytes"]
    found = result["grpo_over_sft"]
    assert found["range"][0] <= found["median_of_pairs"] <= found["range"][1] and found["cpu_seconds"] > 0


def test_supervised(bench: Any) -> None:
    """Half of the tokens without a loss: the head's operations are halved, and the layers' are not."""
    rows = bench("supervised", "--shares", "1", "0.5")["rows"]
    assert rows[0]["time_share"] == rows[0]["flops_share"] == 1
    head = 6 * 32 * 64 * 512
    whole = Work(SHAPES["tiny"], 32, 16).model_flops
    assert rows[1]["flops_share"] == pytest.approx((whole - head / 2) / whole)


def test_remat(bench: Any) -> None:
    """The same step, and the less is kept, the less memory it takes."""
    rows = bench("remat", "--policies", "none", "full", "--seq", "128")["rows"]
    assert [row["policy"] for row in rows] == ["none", "full"]
    assert rows[0]["time_share"] == 1
    assert rows[0]["temp_bytes"] > rows[1]["temp_bytes"]


@pytest.mark.slow
def test_memory_of_a_token_does_not_depend_on_the_vocabulary(bench: Any) -> None:
    result = bench("memory", "--vocab", "65536", "131072", "--batch", "32", "--seq", "64")
    tokens = result["bytes_of_a_further_token"]
    assert tokens["131072"] == pytest.approx(tokens["65536"], rel=0.01)
    assert 0 < tokens["131072"] < 4 * 131_072 / 4
    assert [row["vocab"] for row in result["rows"]] == [65_536, 65_536, 131_072, 131_072]


def test_engine(bench: Any) -> None:
    (row,) = bench("engine", "--vocab", "4096", "--seq", "512", "--objectives", "nll")["rows"]
    assert row["logits_bytes"] == 4 * 1_024 * 4_096
    assert row["naive_bytes"] >= row["logits_bytes"] > row["temp_bytes"]
    assert row["naive_over_engine"] == pytest.approx(row["naive_bytes"] / row["temp_bytes"])


def test_attention(bench: Any) -> None:
    """The tokens of a batch stay as many: twice the length, half the rows."""
    rows = bench("attention", "--lengths", "32")["rows"]
    assert {row["attention"] for row in rows} == {"xla", "blocks"}
    assert {(row["seq"], row["batch"]) for row in rows} == {(32, 1)}
    assert all(row["tokens_per_sec"] == pytest.approx(32 / row["median_s"]) for row in rows)


def test_generate(bench: Any) -> None:
    result = bench("generate", "--new-tokens", "4", "--batches", "2")
    (row,) = result["rows"]
    assert result["weight_bytes"] == 4 * SHAPES["tiny"].num_params()
    assert row["tokens_per_sec"] == pytest.approx(2 * 4 / row["median_s"])
    assert row["further_token_s"] == pytest.approx((row["median_s"] - row["first_token_s"]) / 3)


@pytest.mark.slow
def test_on_policy(bench: Any) -> None:
    rows = {row["part"]: row for row in bench("on_policy", "--new-tokens", "8")["rows"]}
    assert list(rows) == ["rollout", "ghost", "step", "together"]
    assert rows["together"]["share"] == 1
    parts = sum(rows[part]["min_s"] for part in ("rollout", "ghost", "step"))
    assert rows["together"]["max_s"] >= parts


def test_data(bench: Any, tmp_path: Path) -> None:
    """Twenty short documents of one length."""
    triples = [{"question": "aa", "rationale": "b", "answer": f"{n:02d}"} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(triple) + "\n" for triple in triples))
    result = bench("data", "--rows", str(path), "--steps", "2")
    assert result["documents"] == 20
    assert 0 < result["packing_efficiency"] <= 1 and result["host_seconds_a_batch"] > 0
    real = {row["batches"]: row["tokens_per_sec"] / row["padded_tokens_per_sec"] for row in result["rows"]}
    assert list(real.values()) == pytest.approx([result["packing_efficiency"]] * 2)


def test_checkpoint(bench: Any, tmp_path: Path) -> None:
    result = bench("checkpoint", "--folder", str(tmp_path))
    waits, saved, _ = result["rows"]
    assert waits["median_s"] <= saved["median_s"]
    assert result["state_bytes"] > 3 * 4 * SHAPES["tiny"].num_params()  # weights, and Adam's two moments
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.slow
def test_compile(bench: Any) -> None:
    """One process for each depth, on one device as a user has it."""
    first, last = (result := bench("compile", "--layers", "1", "2", "--repeats", "1"))["rows"]
    assert (first["layers"], last["layers"]) == (1, 2)
    assert all(row["total_s"] == pytest.approx(row["lower_s"] + row["compile_s"]) for row in (first, last))
    assert result["last_over_first"] == pytest.approx(last["total_s"] / first["total_s"])


def test_compile_takes_the_least_of_its_processes(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process is the same command with `--here` and one depth; one that fails is an error with its output."""
    compiled: list[int] = []

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "cotgrpo.bench.command", "compile"] and "--here" in command
        compiled.append(int(command[command.index("--layers") + 1]))
        row = {"lower_s": 1.0, "compile_s": compiled[-1] / len(compiled), "text_chars": 7}
        return subprocess.CompletedProcess(command, len(compiled) > 4, json.dumps({"rows": [row]}), "no memory")

    monkeypatch.setattr(subprocess, "run", process)
    rows = bench("compile", "--layers", "1", "8")["rows"]
    assert compiled == [1, 8, 1, 8]
    assert [(row["layers"], row["total_s"]) for row in rows] == [(1, pytest.approx(1 + 1 / 3)), (8, 1 + 8 / 4)]
    with pytest.raises(RuntimeError, match="1 layers did not compile:\nno memory"):
        bench("compile", "--layers", "1", "8")


def test_programs_take_turns() -> None:
    calls: list[str] = []

    def program(name: str, seconds: float) -> Any:
        return lambda: (calls.append(name), time.sleep(seconds))[1]

    times = in_turn({"a": program("a", 0.01), "b": program("b", 0.03)}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert len(times["a"].seconds) == 3 and min(times["a"].seconds) >= 0.01
    assert ratio(times["b"], times["a"])["median_of_pairs"] > 1


def test_a_ratio_is_that_of_neighbours() -> None:
    """The machine became ten times slower half-way: the ratio does not notice."""
    base, other = Times([1.0, 1.0, 10.0], [1.0, 1.0, 1.0]), Times([2.0, 2.0, 20.0], [3.0, 3.0, 3.0])
    assert ratio(other, base) == {"median_of_pairs": 2, "range": [2, 2], "fastest": 2, "cpu_seconds": 3}


def test_a_random_batch_supervises_the_last_tokens() -> None:
    batch = random_batch(SHAPES["tiny"], 2, 8, 0.25)
    np.testing.assert_array_equal(batch.loss_mask, [[0] * 6 + [1] * 2] * 2)
    np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])


def test_mfu_by_hand() -> None:
    """Width 4, one layer, one head of 2, MLP 3, vocabulary 5.

    There are 6 operations per weight and token. Attention reads half of 8 keys.
    """
    config = DecoderConfig(5, 4, 1, 1, 1, 2, 3)
    weights = 4 * 2 * 3 + 2 * 4 + 3 * 4 * 3
    attention = 3 * 2 * (2 * 2) * 4
    flops = StepFlops.of(config, 8, devices=2)
    assert flops.token == 6 * weights + attention and flops.supervised == 6 * 4 * 5
    assert flops.rate == 2 * matrix_rate("float32") > 0
    assert flops.mfu(30.0, 10.0, 2.0) == pytest.approx((30 * flops.token + 10 * flops.supervised) / (2.0 * flops.rate))


def test_what_cannot_be_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", *SMALL, "--rows", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["bench", "on_policy", *SMALL, "--new-tokens", "16"]) == 2
    assert "--seq 16 is prompt and reply: it must be above --new-tokens, which is 16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "speed"])


@pytest.mark.parametrize("part", ["attention", pytest.param("step", marks=pytest.mark.slow)])
def test_a_part_is_measured_without_the_other_dependencies(
    run_on_the_core_alone: Callable[..., str], part: str
) -> None:
    bench = "import cotgrpo.cli\nsys.exit(cotgrpo.cli.main(['bench', *sys.argv[1:]]))"
    options = ("--lengths", "16") if part == "attention" else ()
    assert f"{part}: tiny" in run_on_the_core_alone(bench, part, *SMALL, *options)
