"""Settings from YAML and options: types, ranges, what was given, nearest valid keys, and back to a file."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cotgrpo.config import (
    Config,
    ConfigError,
    GenerateConfig,
    GrpoConfig,
    LoraConfig,
    PrivilegedSelf,
    TeacherForced,
    TeacherModel,
    VerifiedReward,
    flat,
    load_config,
    parse_config,
    parse_settings,
    save_config,
    tree_of,
)
from cotgrpo.config.files import given_in
from cotgrpo.config.ghosts import SOURCES
from cotgrpo.config.old_names import FLAT_DEFAULTS, RENAMED_KEYS, RENAMED_VALUES
from cotgrpo.config.sections import settings_in
from cotgrpo.config.settings import OBJECTIVES
from cotgrpo.objectives import (
    ForwardKl,
    GhostRespond,
    GroupRelative,
    JensenShannon,
    Nll,
    Pair,
    ReferenceKl,
    ReverseKl,
    RewardedGhost,
    RewardGradient,
    SkewedKl,
)

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "old"


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
    defaults = Config(run_dir="there", sft=dataclasses.replace(Config().sft, steps=5), lora=LoraConfig(rank=3))
    config = parse_config(["--sft.batch_size", "2"], defaults=defaults)
    assert (config.run_dir, config.sft.steps, config.sft.batch_size) == ("there", 5, 2)
    assert parse_config([], defaults=defaults) == defaults
    assert parse_config(["--lora.alpha", "8"], defaults=defaults).lora == LoraConfig(rank=3, alpha=8.0)
    assert parse_config(["--lora.rank", "0"], defaults=defaults).lora is None


def test_one_file_or_several() -> None:
    assert parse_config(["--data.train", "a.jsonl"]).data.train == "a.jsonl"
    assert parse_config(["--data.train", "[a.jsonl, org/name]"]).data.train == ["a.jsonl", "org/name"]


LIVE = ["--grpo.ghosts.source", "teacher_model", "--grpo.ghosts.teacher", "t"]
FORWARD_KL = ["--grpo.objective.name", "forward_kl", "--grpo.ghosts.source", "privileged_self"]
GROUP_RELATIVE = ["--grpo.objective.name", "group_relative", "--grpo.ghosts.source", "verified_reward"]
NLL = ["--grpo.objective.name", "nll"]
REWARD = ["--grpo.reward_weight", "0.5"]
SELF = ["--grpo.ghosts.source", "privileged_self"]
EXACT = ["--grpo.objective.name", "reverse_kl", "--grpo.objective.top_k", "null"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.train", "[ä b.jsonl]", "--sft.optimizer.clip_norm", "null", "--sft.optimizer.eps", "1e-10"],
        ["--student.path", "org/model", "--lora.rank", "8", "--lora.targets", "[query]", "--data.format", "chat"],
        [*LIVE, "--grpo.ghosts.prompts", "[a, b]", "--grpo.reference_kl", "0.1", "--grpo.objective.beta", "0.5"],
        [*LIVE, *EXACT, "--grpo.ghosts.when", "disagree", *REWARD, "--grpo.ghosts.num_generations", "2"],
        [*SELF, "--grpo.ghosts.self", "ema", "--grpo.ghosts.decay", "0.5"],
        [*SELF, "--grpo.ghosts.self", "live"],
        GROUP_RELATIVE,
        NLL,
    ],
)
def test_saved_settings_come_back(tmp_path: Path, arguments: list[str]) -> None:
    config = parse_config(arguments)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config != Config()


def test_a_saved_config_holds_what_applies() -> None:
    tree = tree_of(parse_config(["--student.path", "org/model", "--data.format", "chat", *GROUP_RELATIVE]))
    assert tree["grpo"]["objective"] == {"name": "group_relative", "clip": 0.2, "kl_weight": 0.0}
    assert "temperature" not in tree["grpo"]["ghosts"] and tree["grpo"]["ghosts"]["source"] == "verified_reward"
    assert tree["lora"] == {"rank": 0} and "width" not in tree["student"]
    assert "reference_kl" not in tree["grpo"] and "separator" not in tree["data"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_ship_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.data.train and config != Config()


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ([], Pair()),
        (NLL, Nll()),
        (
            ["--grpo.objective.beta", "0.5", "--grpo.objective.negatives", "calibrated"],
            Pair(0.5, negatives="calibrated"),
        ),
        (["--grpo.reference_kl", "0.1"], ReferenceKl(Pair(), 0.1)),
        (["--grpo.objective.name", "reward_gradient", "--grpo.objective.samples", "3"], RewardGradient(3)),
        ([*FORWARD_KL, "--grpo.objective.top_k", "8", "--grpo.reference_kl", "0.1"], ReferenceKl(ForwardKl(8), 0.1)),
        ([*GROUP_RELATIVE, "--grpo.objective.kl_weight", "0.04"], GroupRelative(kl_weight=0.04)),
        ([*LIVE, "--grpo.objective.name", "reverse_kl", "--grpo.objective.top_k", "null"], ReverseKl(None)),
        ([*LIVE, "--grpo.objective.name", "jensen_shannon", "--grpo.objective.beta", "0"], JensenShannon(beta=0.0)),
        (
            [*LIVE, "--grpo.objective.name", "skewed_kl", "--grpo.objective.direction", "reverse"],
            SkewedKl(direction="reverse"),
        ),
        (["--grpo.objective.name", "ghost_respond", "--grpo.objective.beta", "0"], GhostRespond(0.0)),
        ([*LIVE, "--grpo.ghosts.when", "wrong"], RewardedGhost(Pair())),
        (
            [*LIVE, *REWARD, "--grpo.ghosts.num_generations", "4", "--grpo.reference_kl", "0.1"],
            ReferenceKl(RewardedGhost(Pair(), 0.5), 0.1),
        ),
    ],
)
def test_objectives(arguments: list[str], want: Any) -> None:
    grpo = parse_config(arguments).grpo
    assert grpo.full_objective == want and grpo.full_objective is grpo.full_objective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sft.stepz", "1"], r"Unknown option --sft.stepz. Did you mean --sft.steps\?"),
        (["--learning_rate", "1"], r"Unknown option --learning_rate. Did you mean --sft.optimizer.learning_rate\?"),
        (["--zzzzz=1"], "Unknown option --zzzzz. See --help"),
        (["--sft.step", "1"], "Unknown option --sft.step. Did you mean --sft.steps"),
        (["--sft.steps", "many"], 'key "sft.steps": Expected a .*int.* Got value: many'),
        (["--sft.steps", "1.5"], 'key "sft.steps"'),
        (["--student.dtype", "float16"], "float16"),
        (["--student.remat", "block"], "none.*full.*block"),
        (["--sft.steps", "0"], "^sft.steps must be at least 1, got 0"),
        (["--seed", "-1"], "^seed must be at least 0, got -1"),
        (
            ["--sft.batch_size", "6", "--sft.micro_batches", "4"],
            r"^sft.micro_batches \(4\) must divide batch_size \(6\)",
        ),
        (["--sft.optimizer.warmup_steps", "1000"], "^sft.optimizer.warmup_steps must lie in"),
        (["--grpo.optimizer.weight_decay", "-1"], "^grpo.optimizer.weight_decay must be at least 0"),
        (["--student.num_kv_heads", "3"], r"^student.num_heads \(4\) must be a multiple of num_kv_heads"),
        (["--run_dir", "gs://bucket/run"], "^run_dir must be a folder of this machine"),
        (["--grpo.objective.beta", "-1"], "^grpo.objective.beta must be a positive number"),
        (["--grpo.reference_kl", "-1"], "^grpo.reference_kl must be at least 0"),
        (["--grpo.max_entropy_growth", "1"], "^grpo.max_entropy_growth must be above 1 or null, got 1"),
        ([*FORWARD_KL, "--grpo.objective.top_k", "0"], "^grpo.objective.top_k must be an integer of at least 1, got 0"),
        ([*LIVE, "--grpo.ghosts.temperature", "0"], "^grpo.ghosts.temperature must be above 0"),
        (["--grpo.objective.name", "skewed_kl"], "skewed_kl needs the distribution of a live ghost.* teacher_forced"),
        ([*LIVE, "--grpo.objective.name", "jensen_shannon", "--grpo.objective.beta", "2"], "^grpo.objective.beta must"),
        ([*SELF, *EXACT, "--grpo.ghosts.self", "live"], "top_k null .* a frozen model in this process"),
        ([*SELF, *EXACT, "--grpo.ghosts.teacher_forced_share", "0.5"], "set ghosts.teacher_forced_share to 0"),
        ([*SELF, *EXACT, "--grpo.reference_kl", "0.1"], "in the place of the reference: set reference_kl to 0"),
        (
            [*SELF, *EXACT, "--grpo.ghosts.privileged_prompt", "{question} {answer} {feedback}"],
            "a frozen privileged_self that reads no reply",
        ),
        (REWARD, "reward_weight adds a reward to the objective of a live ghost.* got teacher_forced.*group_relative"),
        ([*GROUP_RELATIVE, *REWARD], "reward_weight adds a reward to the objective of a live ghost"),
        ([*LIVE, *REWARD], "set ghosts.num_generations to 2 or more.* got 1"),
        (
            [*LIVE, *REWARD, "--grpo.ghosts.num_generations", "2", "--grpo.ghosts.temperature", "0.7"],
            "set ghosts.temperature to 1, got 0.7",
        ),
        (
            [*LIVE, *REWARD, "--grpo.ghosts.num_generations", "2", "--grpo.ghosts.teacher_forced_share", "0.5"],
            "needs replies in every row: set ghosts.teacher_forced_share to 0",
        ),
        (
            [*LIVE, "--grpo.ghosts.num_generations", "3"],
            "^grpo.batch_size leaves 16 replies: .* multiple of .*3",
        ),
        ([*LIVE, "--grpo.ghosts.num_generations", "0"], "^grpo.ghosts.num_generations must be at least 1"),
        ([*LIVE, "--grpo.ghosts.when", "right"], "always.*wrong.*disagree.*right"),
        ([*SELF, "--grpo.ghosts.self", "ema", "--grpo.ghosts.decay", "1"], r"^grpo.ghosts.decay must be in \(0, 1\)"),
        ([*SELF, "--grpo.ghosts.privileged_prompt", "{question} {hint}"], "a field that is not known: 'hint'"),
        (
            [*SELF, "--grpo.ghosts.privileged_prompt", "{question}"],
            "{question} and {answer}, or {feedback}",
        ),
        ([*LIVE[:2]], "^grpo.ghosts.teacher must be the folder or hub id"),
        ([*GROUP_RELATIVE, "--grpo.ghosts.num_generations", "1"], "^grpo.ghosts.num_generations must be at least 2"),
        (
            ["--grpo.objective.name", "group_relative"],
            "group_relative and ghosts.source verified_reward .* GroupRelative",
        ),
        (["--grpo.ghosts.source", "verified_reward"], "belong together.* got Pair with verified_reward"),
        (
            [
                *("--grpo.objective.name", "reward_gradient", "--grpo.objective.samples", "2"),
                *("--grpo.ghosts.source", "privileged_self"),
            ],
            "objective.samples must be 1",
        ),
        (
            ["--grpo.objective.name", "forward_kl"],
            "forward_kl needs the distribution of a live ghost.* got teacher_forced",
        ),
        (
            [*GROUP_RELATIVE, "--grpo.batch_size", "6"],
            "a multiple of ghosts.num_generations, 4 to each question, got 6",
        ),
        (["stray"], "stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--config"], "config"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Given at its default or not: what counts is that it was given.
        ([*NLL, "--grpo.objective.beta", "1.0"], "grpo.objective.beta .* 'nll', which takes no options"),
        (["--grpo.objective.top_k", "4"], "grpo.objective.top_k .* 'pair', which takes beta, .*samples"),
        (
            [*GROUP_RELATIVE, "--grpo.objective.beta", "2"],
            "grpo.objective.beta .* 'group_relative', which takes clip, kl",
        ),
        ([*GROUP_RELATIVE, "--grpo.reference_kl", "0.1"], "grpo.reference_kl .* grpo.objective.kl_weight"),
        (
            [*GROUP_RELATIVE, "--grpo.ghosts.temperature", "0.5"],
            "grpo.ghosts.temperature .* 'verified_reward', which takes",
        ),
        (["--grpo.ghosts.teacher", "t"], "grpo.ghosts.teacher .* 'teacher_forced', which takes no options"),
        ([*SELF, "--grpo.ghosts.decay", "0.9"], "grpo.ghosts.decay does not apply to grpo.ghosts.self frozen"),
        (["--grpo.ghosts.self", "ema"], "grpo.ghosts.self .* 'teacher_forced', which takes no options"),
        ([*LIVE, "--grpo.ghosts.self", "ema"], "grpo.ghosts.self .* 'teacher_model', which takes"),
        (["--student.path", "org/model", "--student.width", "256"], "student.width .* a pretrained student"),
        (["--lora.dropout", "0.0"], "lora.dropout .* set lora.rank"),
        (["--lora.rank", "0", "--lora.dropout", "0.1"], "lora.dropout .* set lora.rank"),
        (["--data.reasoning", "plain"], "data.reasoning .* data.format plain"),
        (["--data.format", "chat", "--data.separator", "|"], "data.separator .* data.format chat"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True], ids=["options", "file"])
def test_what_is_given_must_apply(tmp_path: Path, arguments: list[str], message: str, in_file: bool) -> None:
    if in_file:
        lines = [f"{key[2:]}: {value}" for key, value in zip(arguments[::2], arguments[1::2], strict=True)]
        tree: dict[str, Any] = {}
        for key, value in (yaml.safe_load(line).popitem() for line in lines):
            *sections, last = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        arguments = ["--config", write(tmp_path / "c.yaml", yaml.safe_dump(tree))]
    with pytest.raises(ConfigError, match=message.replace(" .* ", " does not apply to .*", 1)):
        parse_config(arguments)


def test_another_choice_leaves_out_what_an_earlier_file_gave_for_its_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml",
        "student: {width: 64}\ndata: {format: chat, system: be brief}\ngrpo: {objective: {name: pair, beta: 0.5}, "
        "ghosts: {source: teacher_model, teacher: t, temperature: 0.5, max_new_tokens: 9}}\n",
    )
    more = ["--student.path", "org/model", "--data.format", "plain", "--grpo.ghosts.source", "privileged_self"]
    config = parse_config([*more, "--config", path, *more, *NLL])
    assert config.grpo.objective == Nll() and config.student == parse_config(more).student
    assert config.grpo.ghosts == PrivilegedSelf(temperature=0.5, max_new_tokens=9) and config.data.system == ""
    other = write(tmp_path / "d.yaml", "grpo: {ghosts: {source: teacher_forced}}\nlora: {rank: 4, alpha: 8.0}\n")
    assert parse_config(["--config", path, "--config", other]).grpo.ghosts == TeacherForced()
    assert parse_config(["--config", other, "--lora.rank", "0"]).lora is None
    with pytest.raises(ConfigError, match=r"grpo.ghosts.teacher does not apply to the ghosts 'teacher_forced'"):
        parse_config(["--config", path, "--grpo.ghosts.source", "teacher_forced", "--grpo.ghosts.teacher", "t"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sft: {optimiser: {learning_rate: 3}}",
            r"unknown key 'sft.optimiser.learning_rate'. Did you mean sft.optimizer.learning_rate\?",
        ),
        ("stepss: 1", "unknown key 'stepss'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("sft: {steps: [1]}", "sft.steps"),
        ("- 1", "expected a mapping of settings, got list"),
        ("", "expected a mapping of settings, got NoneType"),
        ("a: [", "not valid YAML"),
        ("sft: 3", "sft is a section: expected a mapping of its settings, got 3"),
        ("sft:", "sft is a section"),
        ("grpo: {objective: nll}", "grpo.objective is a section"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_wrong_files(tmp_path: Path, text: str, message: str, form: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(form.format(path).split())
    assert path in str(caught.value)


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    assert load_config(Path(write(tmp_path / "c.yaml", "sft: {}\ngrpo: {objective: {}}\n"))) == Config()


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


SAMPLES: dict[str, Any] = {
    "grpo.ghosts.slots": 3,
    "grpo.ghosts.candidates": 8,
    "grpo.ghosts.reuse": 2,
    "grpo.ghosts.ahead": True,
    "grpo.objective.reference_kl": 0.1,
}
NEEDS = {"grpo.ghosts": {"source": "verified_reward"}, "grpo.objective": {"name": "pair"}}


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_keys_in_a_file_are_translated(tmp_path: Path, old: str, new: str) -> None:
    section, _, name = old.rpartition(".")
    objective = {"objective": {"name": "group_relative"}} if section == "grpo.ghosts" else {}
    last = section.rpartition(".")[2]
    tree = {"grpo": objective | {last: NEEDS[section] | {name: SAMPLES[old]}}}
    config = load_config(Path(write(tmp_path / "c.yaml", yaml.safe_dump(tree))))
    assert dict(flat(tree_of(config)))[new] == SAMPLES[old]


@pytest.mark.parametrize(
    ("key", "old", "new"), [(key, *pair) for key, values in RENAMED_VALUES.items() for pair in values.items()]
)
def test_old_values_in_a_file_are_translated(tmp_path: Path, key: str, old: str, new: str) -> None:
    config = load_config(Path(write(tmp_path / "c.yaml", yaml.safe_dump(nested(key, old)))))
    assert dict(flat(tree_of(config)))[key] == new


def test_the_kl_of_group_relative_has_its_own_name(tmp_path: Path) -> None:
    text = "grpo: {objective: {name: group_relative, reference_kl: 0.04}, ghosts: {source: verified_reward}}"
    grpo = load_config(Path(write(tmp_path / "c.yaml", text))).grpo
    assert grpo.objective == GroupRelative(kl_weight=0.04) and grpo.reference_kl == 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "live",
            [
                *("--student.width", "64", "--student.remat", "full", "--data.train", "[a.jsonl, b.jsonl]"),
                *("--sft.steps", "7", "--grpo.objective.beta", "0.5", "--grpo.reference_kl", "0.1"),
                *(*LIVE, "--grpo.ghosts.decode_batch_size", "3", "--grpo.ghosts.updates_per_rollout", "2"),
                *("--grpo.ghosts.prompts", "[q.jsonl]"),
            ],
        ),
        (
            "group_relative",
            [
                *("--student.path", "org/model", "--student.remat", "none", "--lora.rank", "8"),
                *("--lora.targets", "[query, value]", "--data.train", "a.jsonl", "--data.format", "chat"),
                *("--data.reasoning", "think", *GROUP_RELATIVE, "--grpo.objective.kl_weight", "0.04"),
                *("--grpo.ghosts.num_generations", "8", "--grpo.ghosts.prefetch_rollouts", "true"),
            ],
        ),
        ("nll", NLL),
    ],
)
def test_a_config_that_an_earlier_version_saved(tmp_path: Path, name: str, arguments: list[str]) -> None:
    """Each file holds every setting of its time, whether it applies or not, under the names of its time."""
    path = OLD / f"{name}.yaml"
    config = load_config(path)
    assert config == parse_config(arguments)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["grpo"]["objective"]["samples"] = 5  # which neither takes, and is not the default
    changed = Path(write(tmp_path / "c.yaml", yaml.safe_dump(tree)))
    if name == "live":
        assert load_config(changed).grpo.objective == Pair(beta=0.5, samples=5)
    else:
        with pytest.raises(ConfigError, match=r"grpo.objective.samples does not apply"):
            load_config(changed)


def test_settings_are_declared_once() -> None:
    """Alternatives that share a key share its type; each setting has a line of help, and old defaults are settings."""
    for defaults in (Config(), GenerateConfig()):
        settings = list(settings_in(defaults))
        assert len({setting.key for setting in settings}) == len(settings)
        assert [setting.key for setting in settings if not setting.help] == []
    known = {setting.key for setting in settings_in(Config())}
    assert known >= FLAT_DEFAULTS.keys() and known >= set(RENAMED_KEYS.values())
    for name, kind in OBJECTIVES.items():
        for field in dataclasses.fields(kind):
            assert f"grpo.objective.{field.name}" in known, name


def test_a_custom_objective_cannot_be_saved() -> None:
    class Mine(Nll):
        pass

    config = dataclasses.replace(Config(), grpo=GrpoConfig(objective=Mine()))
    with pytest.raises(ConfigError, match="cannot name a Mine: expected one of Pair, "):
        tree_of(config)


def test_sources_in_python() -> None:
    with pytest.raises(ConfigError, match=r"TeacherModel.temperature must be above 0, .* got 0"):
        TeacherModel(teacher="t", temperature=0)
    assert TeacherModel(teacher="t").on_policy and VerifiedReward().on_policy and not TeacherForced().on_policy


def test_settings_of_generate(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "questions: a.jsonl\nteacher: {model: m, temperature: null}\n")
    config = parse_settings(["--config", path, "--candidates", "3"], GenerateConfig())
    assert config.questions == "a.jsonl" and config.teacher.temperature is None and config.candidates == 3
    with pytest.raises(ConfigError, match="candidates must be at least 1"):
        parse_settings(["--candidates", "0"], GenerateConfig())


def test_flat() -> None:
    assert dict(flat({"a": {"b": 1, "c": {"d": []}}, "e": {}})) == {"a.b": 1, "a.c.d": [], "e": {}}


@pytest.mark.parametrize("cls", [Config, GenerateConfig])
def test_no_setting_takes_an_absurd_number(cls: type) -> None:
    """The whole table of settings: each takes numbers, and none of these."""
    keys = [s.key for s in settings_in(cls()) if {int, float} & (set(typing.get_args(s.type)) or {s.type})]
    taken = []
    for key in keys:
        for value in ("nan", "inf", "-inf", "1e400", str(10**39), "-0.5", "-7"):
            try:
                parse_settings([f"--{key}", value], cls())
                taken.append((key, value))
            except ConfigError as error:
                if key not in str(error):
                    taken.append((key, str(error)))
    assert len(keys) > 10 and not taken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "seed is set twice, in lines 1 and 2"),
        ("sft: {steps: 1, steps: 2}", "sft.steps is set twice"),
        ("sft:\n  optimizer: {b1: 0.9}\n  optimizer: {b2: 0.9}", "sft.optimizer is set twice, in lines 2 and 3"),
        ("data: {columns: {question: a, question: b}}", "data.columns.question is set twice"),
        ("sft: {optimizer: {b2: 1}}", r"sft.optimizer.b2 must lie in \[0, 1\)"),
        ("sft: {optimizer: {b1: 1.0}}", r"sft.optimizer.b1 must lie in \[0, 1\)"),
        ("sft: {optimizer: {eps: 0}}", "sft.optimizer.eps must be positive"),
        ("run_dir: ''", "run_dir must be the name of a folder"),
        ("run_dir: '  '", "run_dir must be the name of a folder"),
        ("seed: 4294967296", "seed must be at most 4,294,967,295"),
        ("sft: {optimizer: {learning_rate: .nan}}", "sft.optimizer.learning_rate must be a finite number, got nan"),
        ("mesh: {fsdp: 0}", "mesh.fsdp must be at least 1, or -1"),
    ],
)
def test_files_with_slips(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Path(write(tmp_path / "c.yaml", text)))


def test_a_saved_config_of_a_newer_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What reads a run lists the settings that it does not know; what trains on, and a user's own file, refuse them."""
    text = "seed: 3\nfuture: 1\nsft: {steps: 7, optimizer: {nonsense: 2}, later: {a: 1}}\n"
    path = Path(write(tmp_path / "c.yaml", text))
    config = load_config(path, may_be_newer=True)
    assert (config.seed, config.sft.steps) == (3, 7) and given_in(path)[0] == {"seed": 3, "sft.steps": 7}
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "does not know them: future, sft.optimizer.nonsense, sft.later.a" in error
    for load in (load_config, lambda path: parse_config(["--config", str(path)])):
        with pytest.raises(ConfigError, match="unknown key 'future'"):
            load(path)
    with pytest.raises(ConfigError, match="seed must"):
        load_config(Path(write(tmp_path / "d.yaml", "seed: -3\nfuture: 1")), may_be_newer=True)


@pytest.mark.parametrize("alternatives", [SOURCES, OBJECTIVES], ids=["ghosts", "objective"])
def test_a_setting_of_several_alternatives_has_one_type(alternatives: Mapping[str, type[Any]]) -> None:
    """The command line has one type for each key: with another one, an alternative would refuse its own values."""
    types: dict[str, set[str]] = {}
    for kind in alternatives.values():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            types.setdefault(field.name, set()).add(str(hints[field.name]))
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("grpo.rollouts.retries", "-7", "must be at least 0"),
        ("grpo.rollouts.largest_gap", "-1", "must be above 0"),
        ("grpo.rollouts.largest_gap", "0.5", "does not apply"),
        ("grpo.ghosts.num_generations", "0", "must be at least 1"),
        ("grpo.ghosts.num_generations", "2", "does not apply"),
        ("grpo.objective.top_k", "-3", "must be"),
        ("grpo.objective.top_k", "3", "does not apply"),
    ],
)
def test_a_value_that_no_alternative_takes_is_wrong_before_it_does_not_apply(key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} {says}"):
        parse_config([f"--{key}", value])
