"""Settings of evaluations, epochs and the warm-up that cannot be used: each is an error that names the setting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import SETTINGS, error_of

from cotgrpo.cli import main
from cotgrpo.config import Config, ConfigError, EvalConfig, StageConfig, parse_config, tree_of
from cotgrpo.data.template import Example
from cotgrpo.optimizers import OptimizerConfig
from cotgrpo.training.steps import count_steps, recorded_epochs, save_epochs, with_steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval.samples", "4", "--eval.k", "[1, 8]"], r"eval\.k must lie between 1 and samples, which is 4, got 8"),
        (["--eval.samples", "4", "--eval.k", "0"], r"eval\.k must lie between 1 and samples"),
        (["--eval.samples", "-1"], r"eval\.samples must be at least 0, got -1"),
        (["--eval.samples", "4", "--eval.temperature", "0"], r"eval\.temperature 0 would draw the same reply 4 times"),
        (["--eval.samples", "4", "--eval.temperature", "-1"], r"eval\.temperature must be at least 0"),
        (["--eval.samples", "4", "--eval.temperature", "nan"], r"eval\.temperature"),
        (["--eval.samples", "4", "--eval.temperature", "inf"], r"eval\.temperature"),
        (["--eval.samples", "4", "--eval.top_p", "0"], r"eval\.top_p must be in \(0, 1\], got 0"),
        (["--eval.samples", "4", "--eval.top_p", "1.5"], r"eval\.top_p must be in \(0, 1\]"),
        (["--eval.samples", "4", "--eval.seed", "-1"], r"eval\.seed must be at least 0"),
        (["--eval.temperature", "0.7"], r"eval\.temperature does not apply to greedy replies\. Set eval\.samples too"),
        (["--eval.k", "2"], r"eval\.k does not apply to greedy replies"),
        (["--eval.sets", '{"": "a.jsonl"}'], r"eval\.sets names a test set ''"),
        (["--eval.sets", '{"a/b": "a.jsonl"}'], r"eval\.sets names a test set 'a/b'"),
        (["--eval.sets", '{"math": []}'], r"eval\.sets\.math must name at least one file"),
        (["--eval.sets", '{"math": [" "]}'], r"eval\.sets\.math must name at least one file"),
        (["--eval.sets", "math.jsonl"], r"eval\.sets"),
        (["--sft.epochs", "0"], r"sft\.epochs must be above 0 or null, got 0"),
        (["--sft.epochs", "-1"], r"sft\.epochs must be above 0"),
        (["--sft.epochs", "nan"], r"sft\.epochs"),
        (["--sft.epochs", "2", "--sft.steps", "5"], r"sft\.steps does not apply to a stage with a number of epochs"),
        (["--sft.epochs", "2", "--data.streaming", "true"], r"sft\.epochs needs the number of packed rows"),
        (["--grpo.epochs", "2", "--data.streaming", "true"], r"grpo\.epochs needs the number of packed rows"),
        (
            ["--grpo.epochs", "1", "--grpo.ghosts.source", "privileged_self"],
            r"grpo\.epochs counts passes over packed rows, which ghosts\.source privileged_self does not make",
        ),
        (["--grpo.epochs", "1", "--grpo.ghosts.source", "self_reply"], r"grpo\.epochs counts passes over packed rows"),
        (["--sft.optimizer.warmup_ratio", "1"], r"sft\.optimizer\.warmup_ratio must lie in \[0, 1\)"),
        (["--sft.optimizer.warmup_ratio", "-0.1"], r"sft\.optimizer\.warmup_ratio must lie in \[0, 1\)"),
        (["--sft.optimizer.warmup_ratio", "nan"], r"sft\.optimizer\.warmup_ratio"),
        (
            ["--sft.optimizer.warmup_ratio", "0.1", "--sft.optimizer.warmup_steps", "2"],
            r"sft\.optimizer\.warmup_ratio is 0\.1 and warmup_steps is 2: give one of the two",
        ),
    ],
)
def test_settings_that_cannot_be_used(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        parse_config(arguments)
    assert "\n" not in str(found.value)


def test_settings_that_can(tmp_path: Path) -> None:
    assert EvalConfig(samples=8).ks == [1, 8] and EvalConfig(samples=8, k=[4, 2, 2]).ks == [2, 4]
    assert EvalConfig(samples=1, temperature=0).ks == [1]
    both = parse_config(["--eval.sets.math", "m.jsonl", "--eval.sets.gsm8k", "[a.jsonl, b.jsonl]"])
    assert both.eval.sets == {"math": "m.jsonl", "gsm8k": ["a.jsonl", "b.jsonl"]}
    # A later source may choose epochs, and what is saved holds one of the two.
    path = tmp_path / "c.yaml"
    path.write_text("sft: {steps: 5}\neval: {sets: {math: m.jsonl}}\n", encoding="utf-8")
    config = parse_config(["--config", str(path), "--sft.epochs", "2.5"])
    assert config.sft.epochs == 2.5 and config.eval.sets == {"math": "m.jsonl"}
    saved = tree_of(config)
    assert "steps" not in saved["sft"] and saved["sft"]["epochs"] == 2.5 and saved["grpo"]["steps"] == 1000


def examples(*lengths: int) -> list[Example]:
    return [Example(np.zeros(n + 1, np.int32), np.ones(n + 1, bool)) for n in lengths]


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    config = parse_config(["--sft.epochs", "1.5", "--sft.batch_size", "2", "--data.seq_len", "10"])
    rows = examples(6, 4, 9, 5, 5, 7)  # packed: 9 | 7 | 6 4 | 5 5
    counted = count_steps(config, "sft", rows)
    assert counted is not None and (counted.rows, counted.steps) == (4, 3)
    assert str(counted) == "1.5 epochs of 4 packed rows, 2 a batch, are 3 steps"
    alone = parse_config(["--sft.epochs", "1.5", "--sft.batch_size", "2", "--data.packing", "false"])
    counted_alone = count_steps(alone, "sft", rows)
    assert counted_alone is not None and (counted_alone.rows, counted_alone.steps) == (6, 5)
    assert count_steps(Config(), "sft", rows) is None and with_steps(Config(), "sft", None) == Config()
    assert with_steps(config, "sft", counted).sft.steps == 3
    # What a stage began with counts, if it began with the same epochs.
    save_epochs(tmp_path, counted)
    assert recorded_epochs(config, "sft", tmp_path) == counted
    assert recorded_epochs(Config(), "sft", tmp_path) is None
    assert recorded_epochs(parse_config(["--sft.epochs", "2"]), "sft", tmp_path) is None
    for text in ("", "[]", json.dumps({"epochs": 1.5, "batch_size": 2, "rows": 4, "steps": "3"})):
        (tmp_path / "epochs.json").write_text(text, encoding="utf-8")
        assert recorded_epochs(config, "sft", tmp_path) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sft.optimizer.warmup_steps", "3"], r"sft\.optimizer\.warmup_steps must lie in \[0, total_steps\), got 3"),
        (["--profile.steps", "2:4"], r"profile\.steps is 2:4, but 1 epochs of 4 packed rows, 2 a batch, are 2 steps"),
        (["--sft.epochs", "1e12"], r"sft\.epochs 1e\+12 are 2e\+12 steps"),
    ],
)
def test_epochs_that_do_not_fit(arguments: list[str], message: str) -> None:
    config = parse_config(["--sft.epochs", "1", "--sft.batch_size", "2", "--data.seq_len", "10", *arguments])
    with pytest.raises(ConfigError, match=message):
        with_steps(config, "sft", count_steps(config, "sft", examples(6, 4, 9, 5, 5, 7)))


def test_a_ratio_warms_up_as_its_steps_do() -> None:
    for ratio, steps, total in ((0.1, 10, 100), (0.101, 11, 100), (0.1, 1, 5), (0.5, 0, 1), (0.99, 9, 10)):
        by_ratio = OptimizerConfig(warmup_ratio=ratio)
        assert by_ratio.warmup(total) == steps
        schedules = [by_ratio.make_schedule(total), OptimizerConfig(warmup_steps=steps).make_schedule(total)]
        rates = [[float(schedule(step)) for step in range(total)] for schedule in schedules]
        assert rates[0] == rates[1]
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps must lie in"):
        StageConfig(steps=5, optimizer=OptimizerConfig(warmup_steps=5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "is empty: expected rows"),
        ('{"question": "What is 1+1?", "rationale": "1+1=2"}\n', "no right answer"),
        ('{"question": "What is 1+1?", "gold": NaN}\n', "NaN"),
        ("not json\n", "JSON"),
    ],
)
def test_a_test_set_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    row = {"question": "What is 1+2?", "rationale": "1+2=3", "answer": "3"}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"question": f"What is {n}+2?"}) + "\n" for n in range(40)), encoding="utf-8"
    )
    (tmp_path / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    if text is not None:
        (tmp_path / "math.jsonl").write_text(text, encoding="utf-8")
    files = ["--config", str(tmp_path / "c.yaml"), "--data.train", str(tmp_path / "rows.jsonl")]
    files += ["--run_dir", str(tmp_path / "run"), "--eval.sets.math", str(tmp_path / "math.jsonl")]
    assert main(["sft", *files]) == 2
    error = error_of(capsys)
    assert "eval.sets.math: " in error and message.lower() in error.lower(), error
    assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()
