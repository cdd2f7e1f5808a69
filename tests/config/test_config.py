"""Settings from YAML and options: types, ranges, unknown keys with the nearest valid name, and the way back to a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cotgrpo.config.files import flat, load_config, parse_config, save_config
from cotgrpo.config.settings import Config, ConfigError, ObjectiveConfig
from cotgrpo.objectives import GroupRelative, Nll, Pair, Reinforce, RewardGradient
from cotgrpo.objectives.divergences import ForwardKl, ReferenceKl

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_then_options_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml", "seed: 3\ndata: {train: [a.jsonl], seq_len: 77}\nsft: {optimizer: {learning_rate: 3e-4}}\n"
    )
    config = parse_config(["--seed", "1", "--config", path, "--sft.steps", "9", "--grpo.optimizer.name=sgd"])
    assert (config.seed, config.data.train, config.data.seq_len) == (3, ["a.jsonl"], 77)
    assert config.sft.optimizer.learning_rate == 3e-4 and config.sft.steps == 9
    assert config.grpo.optimizer.name == "sgd" and config.grpo.steps == Config().grpo.steps
    assert parse_config(["--config", path, "--seed", "1"]).seed == 1


def test_defaults_of_a_command() -> None:
    defaults = Config(run_dir="there", sft=dataclasses.replace(Config().sft, steps=5))
    config = parse_config(["--sft.batch_size", "2"], defaults=defaults)
    assert (config.run_dir, config.sft.steps, config.sft.batch_size) == ("there", 5, 2)
    assert parse_config([], defaults=defaults) == defaults


def test_one_file_or_several() -> None:
    assert parse_config(["--data.train", "a.jsonl"]).data.train == "a.jsonl"
    assert parse_config(["--data.train", "[a.jsonl, org/name]"]).data.train == ["a.jsonl", "org/name"]


def test_saved_settings_come_back(tmp_path: Path) -> None:
    config = parse_config(
        ["--data.train", "[ä b.jsonl]", "--sft.optimizer.clip_norm", "null", "--sft.optimizer.eps", "1e-10"]
    )
    assert config.sft.optimizer.clip_norm is None
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_ship_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.data.train and config != Config()


FORWARD_KL = ["--grpo.objective.name", "forward_kl", "--grpo.ghosts.source", "privileged_self"]
GROUP_RELATIVE = ["--grpo.objective.name", "group_relative", "--grpo.ghosts.source", "verified_reward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sft.stepz", "1"], r"Unknown option --sft.stepz. Did you mean --sft.steps\?"),
        (["--learning_rate", "1"], r"Unknown option --learning_rate. Did you mean --sft.optimizer.learning_rate\?"),
        (["--zzzzz=1"], "Unknown option --zzzzz. See --help"),
        (["--sft.steps", "many"], 'key "sft.steps": Expected a .*int.* Got value: many'),
        (["--sft.steps", "1.5"], 'key "sft.steps"'),
        (["--student.dtype", "float16"], "float16"),
        (["--sft.steps", "0"], "steps must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--sft.batch_size", "6", "--sft.micro_batches", "4"], r"micro_batches \(4\) must divide batch_size \(6\)"),
        (["--sft.optimizer.warmup_steps", "1000"], "warmup_steps must lie in"),
        (["--student.num_kv_heads", "3"], "must be a multiple of num_kv_heads"),
        (["--grpo.objective.beta", "-1"], "Pair.beta must be a positive number"),
        (["--grpo.objective.name", "nll", "--grpo.objective.beta", "2"], "objective.beta is no setting of 'nll'"),
        (
            ["--grpo.objective.name", "group_relative"],
            "group_relative and ghosts.source verified_reward belong together",
        ),
        (["--grpo.objective.name", "forward_kl"], "forward_kl needs a live ghost.* got teacher_forced"),
        ([*FORWARD_KL, "--grpo.objective.top_k", "0"], "ForwardKl.top_k must be an integer of at least 1, got 0"),
        (["--grpo.objective.top_k", "4"], "top_k is no setting of 'pair'"),
        (["--grpo.ghosts.source", "verified_reward"], "belong together: .* got pair with verified_reward"),
        (
            [*GROUP_RELATIVE, "--grpo.batch_size", "6"],
            "a multiple of ghosts.num_generations, 4 to each question, got 6",
        ),
        ([*GROUP_RELATIVE, "--grpo.ghosts.num_generations", "1"], "ghosts.num_generations must be at least 2"),
        (
            [*GROUP_RELATIVE, "--grpo.ghosts.temperature", "0.5"],
            "temperature is no setting of the source 'verified_reward'",
        ),
        ([*GROUP_RELATIVE, "--grpo.objective.beta", "2"], "beta is no setting of 'group_relative', which has clip"),
        (["stray"], "stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--config"], "config"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sft: {optimiser: {learning_rate: 3}}",
            r"unknown key 'sft.optimiser.learning_rate'. Did you mean sft.optimizer.learning_rate\?",
        ),
        ("stepss: 1", "unknown key 'stepss'"),
        ("sft: {steps: [1]}", "sft.steps"),
        ("- 1", "expected a mapping of settings, got list"),
        ("", "expected a mapping of settings, got NoneType"),
        ("a: [", "not valid YAML"),
        ("sft: 3", "sft is a section: expected a mapping of its settings, got 3"),
        ("sft:", "sft is a section"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_wrong_files(tmp_path: Path, text: str, message: str, form: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(form.format(path).split())
    if "unknown" in message:
        assert path in str(caught.value)


def test_objectives() -> None:
    assert ObjectiveConfig().build() == Pair()
    assert ObjectiveConfig(name="nll").build() == Nll()
    assert ObjectiveConfig(name="reinforce").build() == Reinforce()
    assert ObjectiveConfig(name="group_relative", clip=0.1, reference_kl=0.04).build() == GroupRelative(0.1, 0.04)
    assert ObjectiveConfig(name="reward_gradient", samples=3).build() == RewardGradient(3)
    assert ObjectiveConfig(name="forward_kl", top_k=8).build() == ForwardKl(8)
    assert ObjectiveConfig(name="forward_kl", reference_kl=0.1).build() == ReferenceKl(ForwardKl(), 0.1)
    assert ObjectiveConfig(beta=0.5, negatives="calibrated", reference_kl=0.1).build() == ReferenceKl(
        Pair(beta=0.5, negatives="calibrated"), 0.1
    )


def test_flat() -> None:
    assert dict(flat({"a": {"b": 1, "c": {"d": []}}, "e": {}})) == {"a.b": 1, "a.c.d": [], "e": {}}
