"""Wrong command lines, config files, folders and data: one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import PRETRAINED_SETTINGS, SETTINGS, write_model

from cotgrpo.cli import COMMANDS, main, make_parser
from cotgrpo.config import Config, GenerateConfig
from cotgrpo.config.files import option_names
from cotgrpo.config.ghosts import SOURCES
from cotgrpo.config.sections import Setting, settings_in
from cotgrpo.config.settings import OBJECTIVES
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

ROWS = ("--data.train", "rows.jsonl")
SFT = ("sft", "--config", "c.yaml", *ROWS)
GRPO = ("grpo", "--config", "c.yaml", *ROWS)
PRETRAINED = ("sft", "--config", "p.yaml", *ROWS)
LIVE = ("--grpo.ghosts.source", "privileged_self")
GENERATE = ("generate", "--questions", "rows.jsonl", "--teacher.path", "model", "--out", "generated")
GOLD = ("gold", "--student", "replies.jsonl", "--ghosts", "rows.jsonl", "--out", "edit.jsonl")
BENCH = ("bench", "step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, settings, a model, and one of each kind of thing that is not a file."""
    folder = tmp_path_factory.mktemp("wrong")
    rows = ProceduralTeacher(seed=1).draw(40)
    write_triples(folder / "rows.jsonl", rows)
    write_model(folder / "model", [f"{t.question}\n{t.rationale}" for t in rows])
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    (folder / "p.yaml").write_text(PRETRAINED_SETTINGS, encoding="utf-8")
    (folder / "text").write_text("a text", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail, and return its line."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    assert code == 2, arguments
    error = capsys.readouterr().err
    assert error.startswith("cotgrpo: ") and error.count("\n") == 1 and "Traceback" not in error, error
    return error


COMMAND_LINES: list[tuple[str, tuple[str, ...]]] = [
    ("unknown command", ("evall",)),
    ("unknown command", ("SFT",)),
    ("unknown command", ("",)),
    ("expected a command", ("--sft",)),
    ("Unknown option --sft.optimizer.warmup_stepz. Did you mean --sft.optimizer.warmup_steps?",
     ("sft", "--sft.optimizer.warmup_stepz", "3")),
    ("Did you mean --sft.steps", ("sft", "--sft.step", "3")),
    ("Did you mean --grpo.objective.beta", ("grpo", "--grpo.objective.betta", "3")),
    ("Did you mean --run_dir", ("export", "--rundir", "x")),
    ("Did you mean --student", ("gold", "--studnt", "x")),
    ("Did you mean --topology", ("plan", "--topolgy", "h100:8")),
    ("unrecognized arguments", ("sft", "surplus")),
    ("expected", ("sft", "--sft.steps")),
    ("expected", ("sft", "--config")),
    ("NUL", ("sft", "--run_dir", "a\0b")),
    ("run_dir must be text", ("sft", "--run_dir", "\udcff")),
    ("run_dir must be the name of a folder", ("sft", "--run_dir", "")),
    ("run_dir must be a folder of this machine", ("sft", "--run_dir", "gs://bucket/run")),
    ("data.train is empty", ("sft",)),
    ("data.train is empty", ("grpo",)),
    ("holds no trained student", ("eval",)),
    ("name two students", ("eval", "--model", "model", "--run_dir", "x")),
    ("data.test is empty", ("eval", "--model", "model")),
    ("export needs --run_dir", ("export",)),
    ("export needs --run_dir", ("export", "--run_dir", "x")),
    ("dtype", ("export", "--run_dir", "x", "--out", "y", "--dtype", "int8")),
    ("gold needs", ("gold",)),
    ("gold needs", ("gold", "--student", "x")),
    ("gold needs", (*GOLD, "--edited", "x")),
    ("--rows must be", (*GOLD, "--rows", "edited")),
    ("rows", (*GOLD, "--rows", "some")),
    ("columns", (*GOLD, "--columns", "[a]")),
    ("plan needs --topology", ("plan",)),
    ("topology", ("plan", "--topology", "v99:4x4")),
    ("topology", ("plan", "--topology", "h100:0")),
    ("topology", ("plan", "--topology", "h100:-8")),
    ("h100", ("plan", "--topology", "h100:" + "9" * 30)),
    ("stage", ("plan", "--topology", "h100:8", "--stage", "dpo")),
    ("questions is empty", ("generate",)),
    ("Name one teacher", ("generate", "--questions", "rows.jsonl")),
    ("teacher.base_url does not apply", (*GENERATE, "--teacher.base_url", "http://localhost:1")),
    ("teacher.batch does not apply", (*GENERATE, "--teacher.batch", "true")),
    ("candidates", (*GENERATE, "--candidates", "2", "--teacher.temperature", "0")),
    ("majority", (*GENERATE, "--verify.without_gold", "majority")),
    ("question must hold {question} once", (*GENERATE, "--prompt.question", "no field")),
    ("check must be package.module:function", (*GENERATE, "--verify.check", "nonsense")),
    ("nonsense_module", (*GENERATE, "--verify.check", "nonsense_module:f")),
    ("language", ("quickstart", "--language", "fr")),
    ("bench", ("bench",)),
    ("nonsense", ("bench", "nonsense")),
    ("--batsch", (*BENCH, "--batsch", "3")),
    ("--batch", (*BENCH, "--batch", "many")),
    ("--batch must be at least 1, got 0", (*BENCH, "--batch", "0")),
    ("--seq must be at least 1, got -1", (*BENCH, "--seq", "-1")),
    ("--repeats must be at least 1, got 0", (*BENCH, "--repeats", "0")),
    ("--warmup must be at least 0, got -1", (*BENCH, "--warmup", "-1")),
    ("--shape", (*BENCH, "--shape", "huge")),
    ("--dtype", (*BENCH, "--dtype", "int8")),
    ("distributed.process_id", ("sft", "--distributed.num_processes", "2", "--distributed.process_id", "2")),
    ("distributed.process_id", ("sft", "--distributed.process_id", "one")),
    ("distributed.coordinator", ("sft", "--distributed.coordinator", "host", "--distributed.num_processes", "2",
                                 "--distributed.process_id", "0")),
    ("distributed.num_processes must be at least 1", ("sft", "--distributed.num_processes", "0")),
    ("distributed.num_processes must be at least 1", ("sft", "--distributed.num_processes", "-3")),
]  # fmt: skip
CONTRADICTIONS: list[tuple[str, tuple[str, ...]]] = [
    ("sft.micro_batches (3) must divide", (*SFT, "--sft.micro_batches", "3", "--sft.batch_size", "4")),
    ("grpo.micro_batches (3) must divide", ("grpo", "--grpo.micro_batches", "3", "--grpo.batch_size", "4")),
    ("sft.optimizer.warmup_steps", (*SFT, "--sft.optimizer.warmup_steps", "7", "--sft.steps", "6")),
    ("grpo.optimizer.warmup_steps", (*GRPO, "--grpo.optimizer.warmup_steps", "9", "--grpo.steps", "4")),
    ("mesh", (*SFT, "--mesh.fsdp", "3")),
    ("mesh", (*SFT, "--mesh.data", "64")),
    ("mesh", (*SFT, "--mesh.tensor", "1000000")),
    ("mesh", (*SFT, "--mesh.data", "-1", "--mesh.fsdp", "-1")),
    ("seq_len", (*SFT, "--data.seq_len", "2")),
    ("test_rows must leave rows to train on", (*SFT, "--data.test_rows", "40")),
    ("test_rows must leave rows to train on", (*SFT, "--data.test_rows", "4000")),
    ("test_rows must leave rows to train on", (*SFT, "--data.test_rows", "0")),
    ("vocab_size must be at least", (*SFT, "--tokenizer.vocab_size", "5")),
    ("student.num_heads", (*SFT, "--student.num_heads", "3", "--student.num_kv_heads", "2")),
    ("student.head_dim must be even", (*SFT, "--student.head_dim", "15")),
    ("student.attention splash needs a TPU", (*SFT, "--student.attention", "splash")),
    ("student.width does not apply", (*PRETRAINED, "--student.path", "model", "--student.width", "64")),
    ("lora.alpha does not apply", (*SFT, "--lora.alpha", "8")),
    ("lora.targets", (*PRETRAINED, "--student.path", "model", "--lora.rank", "2", "--lora.targets", "[nonsense]")),
    ("data.system does not apply", (*SFT, "--data.system", "be brief")),
    ("data.separator does not apply", (*SFT, "--data.format", "chat", "--data.separator", "<sep>")),
    ("data.answer_format must hold {answer} once", (*SFT, "--data.format", "chat", "--data.answer_format", "x")),
    ("column", (*SFT, "--data.columns", "{nonsense: a}")),
    ("data.row_function must be", (*SFT, "--data.row_function", "nonsense")),
    ("nonsense_module", (*SFT, "--data.row_function", "nonsense_module:f")),
    ("grpo.ghosts.teacher must be", (*GRPO, "--grpo.ghosts.source", "teacher_model")),
    ("grpo.ghosts.teacher does not apply", (*GRPO, *LIVE, "--grpo.ghosts.teacher", "model")),
    ("grpo.ghosts.temperature does not apply", (*GRPO, "--grpo.ghosts.temperature", "1")),
    ("grpo.objective.beta does not apply", (*GRPO, "--grpo.objective.name", "nll", "--grpo.objective.beta", "1")),
    ("belong together", (*GRPO, "--grpo.objective.name", "group_relative")),
    ("needs the distribution of a live ghost", (*GRPO, "--grpo.objective.name", "forward_kl")),
    ("grpo.ghosts.privileged_prompt", (*GRPO, *LIVE, "--grpo.ghosts.privileged_prompt", "no field")),
    ("grpo.ghosts.privileged_prompt", (*GRPO, *LIVE, "--grpo.ghosts.privileged_prompt", "{question} {answer} {x}")),
    ("grpo.ghosts.privileged_prompt", (*GRPO, *LIVE, "--grpo.ghosts.privileged_prompt", "{question} {answer} {")),
    ("grpo.ghosts.temperatures", (*GRPO, "--grpo.ghosts.source", "self_reply", "--grpo.ghosts.temperatures", "[]")),
    ("grpo.ghosts.temperatures", (*GRPO, "--grpo.ghosts.source", "self_reply", "--grpo.ghosts.temperatures", "[0]")),
    ("run `cotgrpo sft`", GRPO),
    ("tokenizer", (*SFT, "--tokenizer.path", "./missing")),
]  # fmt: skip


@pytest.mark.parametrize(("says", "arguments"), COMMAND_LINES + CONTRADICTIONS, ids=str)
def test_wrong_command_lines(says: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"bench"}))
def test_an_option_that_is_misspelt(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest option is named, with its whole key."""
    names = {name for name in option_names(make_parser(command)) if not name.endswith("+")} - {"help", "version"}
    assert len(names) > 3
    for name in sorted(names)[:: max(len(names) // 12, 1)]:
        assert f"Did you mean --{name}?" in refused(capsys, command, f"--{name}z", "1"), name


def numeric(setting: Setting) -> bool:
    return bool({int, float} & (set(typing.get_args(setting.type)) or {setting.type}))


ABSURD = ("nan", "inf", "-inf", "1e400", "-1e400", "-0.5", "-7", str(10**39), str(-(10**39)), "abc", "[[1]]")
NUMBERS = [("sft", s.key) for s in settings_in(Config()) if numeric(s) and not s.key.startswith(("grpo.", "lora."))]
NUMBERS += [("grpo", s.key) for s in settings_in(Config()) if numeric(s) and s.key.startswith(("grpo.", "lora."))]
NUMBERS += [("generate", s.key) for s in settings_in(GenerateConfig()) if numeric(s)]


def switches(key: str) -> list[str]:
    """Return the options with which a setting of an alternative applies."""
    section, _, last = key.rpartition(".")
    if section == "lora":
        return ["--lora.rank", "2"] * (last != "rank")
    found: list[str] = []
    for part, switch, kinds in (("objective", "name", OBJECTIVES), ("ghosts", "source", SOURCES)):
        names = [name for name, kind in kinds.items() if last in {field.name for field in dataclasses.fields(kind)}]
        if section == f"grpo.{part}" and names:
            found += [f"--{section}.{switch}", names[0]]
            found += ["--grpo.ghosts.teacher", "model"] * (names[0] == "teacher_model")
            found += ["--grpo.ghosts.base_url", "http://localhost:9/v1"] * (names[0] == "teacher_server")
            found += ["--grpo.ghosts.source", "verified_reward"] * (names[0] == "group_relative")
            found += ["--grpo.ghosts.source", "privileged_self"] * (names[0] == "forward_kl")
            found += ["--grpo.objective.name", "group_relative"] * (names[0] == "verified_reward")
    return found


@pytest.mark.parametrize(("command", "key"), NUMBERS)
def test_numbers_that_no_setting_takes(command: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ABSURD:
        error = refused(capsys, command, *switches(key), f"--{key}", value)
        assert key in error and "does not apply" not in error, value


@pytest.mark.parametrize(("command", "defaults"), [("sft", Config()), ("generate", GenerateConfig())])
def test_values_of_another_type(command: str, defaults: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A mapping, a list of lists and null, for each setting of a file that does not take them."""
    tried = 0
    for setting in settings_in(defaults):
        for value in ({"nested": {"deeper": 1}}, [[[1]]], None):
            if value is None and type(None) in typing.get_args(setting.type):
                continue
            tree: Any = value
            for part in reversed(setting.key.split(".")):
                tree = {part: tree}
            Path("type.yaml").write_text(json.dumps(tree), encoding="utf-8")
            assert setting.key in refused(capsys, command, "--config", "type.yaml"), value
            tried += 1
    assert tried > 50


REPEATED = b"".join(b"%c: &%c [%s]\n" % (97 + i, 97 + i, b",".join([b"*%c" % (96 + i)] * 9)) for i in range(1, 9))
FILES: dict[str, tuple[bytes, str]] = {
    "a list": (b"- a\n- b", "expected a mapping of settings, got list"),
    "empty": (b"", "expected a mapping"),
    "null": (b"null", "expected a mapping"),
    "a number": (b"5", "expected a mapping"),
    "a text": (b"hello", "expected a mapping"),
    "comments alone": (b"# seed: 1\n", "expected a mapping"),
    "binary": (bytes(range(256)), "not valid YAML"),
    "UTF-16": ("seed: 1".encode("utf-16"), "not valid YAML"),
    "Latin-1": (b"run_dir: caf\xe9", "not valid YAML"),
    "open bracket": (b"sft: [1", "not valid YAML"),
    "open brace": (b"sft: {steps: 1", "not valid YAML"),
    "open quote": (b"run_dir: 'x", "not valid YAML"),
    "two colons": (b"a: b: c", "not valid YAML"),
    "a tab": (b"sft:\n\tsteps: 3", "not valid YAML"),
    "wrong indent": (b"sft:\n  steps: 3\n lr: 3", "not valid YAML"),
    "two documents": (b"seed: 1\n---\nseed: 2", "not valid YAML"),
    "a Python object": (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    "an unknown tag": (b"seed: !nonsense 3", "not valid YAML"),
    "an unknown anchor": (b"seed: *nothing", "not valid YAML"),
    "NUL": (b"run_dir: a\x00b", "not valid YAML"),
    "an escaped NUL": (b'run_dir: "a\\0b"', "run_dir must be text"),
    "half a surrogate": (b'run_dir: "\\ud800"', "run_dir must be text"),
    "a control character": (b"a\x1bb: 3", "not valid YAML"),
    "deep lists": (b"seed: " + b"[" * 5000 + b"]" * 5000, "not valid YAML"),
    "deep mappings": (b"{a: " * 3000 + b"1" + b"}" * 3000, "not valid YAML"),
    "repeated anchors": (b"a: &a [x]\n" + REPEATED, "unknown key"),
    "a list in itself": (b"data: {train: &a [*a]}", "data.train"),
    "a mapping in itself": (b"data: &a {train: *a}", "not valid YAML"),
    "a number of 5000 digits": (b"seed: " + b"9" * 5000, "not valid YAML"),
    "a path of 5000 letters": (b"data: {train: rows.jsonl}\nrun_dir: " + b"x" * 5000, "too long"),
    "a key twice": (b"seed: 1\nseed: 1", "seed is set twice"),
    "a section twice": (b"sft: {steps: 1}\nsft: {steps: 2}", "sft is set twice"),
    "a column twice": (b"data: {columns: {gold: a, gold: b}}", "data.columns.gold is set twice"),
    "an unknown section": (b"stf: {steps: 3}", "unknown key 'stf.steps'. Did you mean sft.steps?"),
    "an unknown key": (b"sft: {optimizer: {warmup_stepz: 3}}", "Did you mean sft.optimizer.warmup_steps?"),
    "an unknown dotted key": (b"sft.stepz: 3", "Did you mean sft.steps?"),
    "an empty key": (b"'': 3", "unknown key ''"),
    "a number as key": (b"1: 2", "unknown key '1'"),
    "a number as inner key": (b"sft: {1: 2}", "unknown key 'sft.1'"),
    "null as key": (b"null: 3", "unknown key 'null'"),
    "a truth value as key": (b"true: 3", "unknown key 'true'"),
    "a date as key": (b"2020-01-01: 3", "unknown key '2020-01-01'"),
    "a list as key": (b"? [1, 2]\n: 3", "not valid YAML"),
    "a mapping as key": (b"? {a: 1}\n: 3", "not valid YAML"),
    "a number as section": (b"sft: 3", "sft is a section"),
    "a list as section": (b"sft: [steps]", "sft is a section"),
    "null as section": (b"sft: null", "sft is a section"),
    "a number as inner section": (b"sft: {optimizer: 3}", "sft.optimizer is a section"),
    "a truth value as number": (b"seed: true", "seed"),
    "a date as number": (b"seed: 2020-01-01", "seed"),
    "a fraction as whole number": (b"seed: 1.5", "seed"),
    "octal": (b"seed: 0o17", "seed"),
    "a number as text": (b"run_dir: 5", "run_dir"),
    "a truth value as text": (b"run_dir: true", "run_dir"),
    "a number as truth value": (b"data: {packing: 3}", "data.packing"),
    "a word as truth value": (b"data: {packing: maybe}", "data.packing"),
    "an unknown choice": (b"data: {format: html}", "data.format"),
    "a number as choice": (b"data: {format: 3}", "data.format"),
    "numbers as files": (b"data: {train: [3]}", "data.train"),
    "null in a list": (b"data: {train: [null]}", "data.train"),
    "a number as column": (b"data: {columns: {gold: 3}}", "data.columns"),
    "infinite": (b"sft: {optimizer: {learning_rate: .inf}}", "sft.optimizer.learning_rate must be a finite number"),
    "not a number": (b"sft: {optimizer: {b2: .nan}}", "sft.optimizer.b2 must be a finite number"),
    "a moment of Adam above 1": (b"sft: {optimizer: {b1: 1.5}}", "sft.optimizer.b1 must"),
}


@pytest.mark.parametrize("kind", FILES)
def test_wrong_config_files(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, says = FILES[kind]
    Path("wrong.yaml").write_bytes(data)
    assert says in refused(capsys, "sft", "--config", "wrong.yaml")


NO_FILES = ("missing", "text/x/y", "empty", "broken", "loop", "pipe", "socket", "/dev/null", "/dev/full", "/dev/zero")
NO_FILES += ("x" * 300, "a\0b", "\udcff", " ", "/proc/self/mem")
NO_FOLDERS = ("text", *NO_FILES[1:2], *NO_FILES[3:-1])
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--config": (("sft", "--config"), NO_FILES),
    "data.train": (("sft", "--config", "c.yaml", "--data.train"), NO_FILES),
    "data.test": ((*SFT, "--data.test"), NO_FILES),
    "data.train, streamed": (("sft", "--config", "c.yaml", "--data.streaming", "true", "--data.train"), NO_FILES),
    "student.path": ((*PRETRAINED, "--student.path"), ("missing", "empty", *NO_FOLDERS)),
    "tokenizer.path": ((*SFT, "--tokenizer.path"), ("./missing", "empty", "text", "pipe", "a\0b", " ", "x" * 300)),
    "run_dir": ((*SFT, "--data.seq_len", "2", "--run_dir"),
                ("text", "text/x/y", "loop", "pipe", "/dev/null", "x" * 300)),
    "checkpoint.folder": ((*SFT, "--data.test_rows", "2", "--sft.steps", "1", "--checkpoint.folder"),
                          ("text", "text/x/y", "loop", "pipe", "/dev/null", "x" * 300)),
    "grpo.init_from": ((*GRPO, "--grpo.init_from"), ("missing", "empty", *NO_FOLDERS)),
    "grpo.ghosts.teacher": ((*GRPO, "--grpo.ghosts.source", "teacher_model", "--grpo.ghosts.teacher"), NO_FOLDERS),
    "eval --run_dir": (("eval", "--run_dir"), ("missing", "empty", *NO_FOLDERS)),
    "eval --model": (("eval", "--data.test", "rows.jsonl", "--model"), ("missing", "empty", *NO_FOLDERS)),
    "export --run_dir": (("export", "--out", "exported", "--run_dir"), ("missing", "empty", *NO_FOLDERS)),
    "gold --student": (("gold", "--ghosts", "rows.jsonl", "--out", "edit.jsonl", "--student"), NO_FILES),
    "gold --edited": (("gold", "--out", "edit.jsonl", "--edited"), NO_FILES),
    "generate --questions": (("generate", "--teacher.path", "model", "--out", "generated", "--questions"), NO_FILES),
    "teacher.path": (("generate", "--questions", "rows.jsonl", "--out", "generated", "--teacher.path"), NO_FOLDERS),
    "verify.test_sets": ((*GENERATE, "--verify.test_sets"), NO_FILES),
    "generate --out": (("generate", "--questions", "rows.jsonl", "--teacher.path", "model", "--out"),
                       ("text", "text/x/y", "loop", "pipe", "/dev/null", "x" * 300)),
    "plan --out": (("plan", "--topology", "h100:8", "--out"),
                   ("empty", "text/x/y", "pipe", "/dev/null", "/dev/full", "x" * 300, "a\0b")),
    "bench --json": ((*BENCH, "--json"), ("empty", "text/x/y", "pipe", "/dev/null", "x" * 300)),
}  # fmt: skip


@pytest.mark.parametrize(("place", "path"), [(place, path) for place in PLACES for path in PLACES[place][1]], ids=str)
def test_wrong_paths(place: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where a folder is expected, and the reverse; links, pipes and devices; names that cannot be."""
    if path == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            Path(path).unlink(missing_ok=True)
            listener.bind(path)
            refused(capsys, *PLACES[place][0], path)
    else:
        refused(capsys, *PLACES[place][0], path)
    assert Path("pipe").is_fifo() and Path("/dev/null").is_char_device() and Path("text").read_text() == "a text"


def edit(name: str, **fields: Any) -> Callable[[Path], object]:
    """Return what sets fields of a JSON file, or removes those that are `...`."""

    def apply(model: Path) -> None:
        tree = json.loads((model / name).read_text(encoding="utf-8")) | fields
        (model / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return apply


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(data)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what puts another thing in the place of a file."""

    def apply(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return apply


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:size])


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(model: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = load_file(model / "model.safetensors")
        change(found)
        save_file(found, model / "model.safetensors")

    return apply


WEIGHTS, INDEX, EMBEDDING = "model.safetensors", "model.safetensors.index.json", "model.embed_tokens.weight"
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = (*NEEDED, "head_dim", "vocab_size")
STUDENTS: dict[str, Callable[[Path], object]] = {
    "no config.json": replace("config.json", lambda path: None),
    **{f"no {name} in config.json": edit("config.json", **{name: ...}) for name in ("model_type", *SIZES[:1])},
    **{f"{name} {value!r:.20}": edit("config.json", **{name: value})
       for name in SIZES for value in ("abc", -1, 0, [1], 1.5, 10**30)},
    **{f"{name} {value!r}": edit("config.json", **{name: value})
       for name in ("rope_theta", "rms_norm_eps") for value in ("abc", -1, [1], {"a": 1}, None)},
    **{f"model_type {value!r}": edit("config.json", model_type=value) for value in (None, "nonsense", 3, ["llama"])},
    **{f"rope_scaling {value!r}": edit("config.json", rope_scaling=value)
       for value in (3, "x", [1], {"rope_type": "x"})},
    "hidden_act": edit("config.json", hidden_act="nonsense"),
    "quantized": edit("config.json", quantization_config={"quant_method": "gptq"}),
    "an embedding too small for the tokenizer": edit("config.json", vocab_size=10),
    **{f"{name} is {kind}": replace(name, make)
       for name in ("config.json", WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
       for kind, make in {"a pipe": os.mkfifo, "empty": lambda path: path.write_bytes(b""),
                          "binary": lambda path: path.write_bytes(bytes(range(256))),
                          "a list": lambda path: path.write_bytes(b"[]")}.items()},
    "config.json is a folder": replace("config.json", lambda path: path.mkdir()),
    "config.json is deep": write("config.json", b"[" * 100_000),
    "config.json is UTF-16": write("config.json", "{}".encode("utf-16")),
    "config.json is empty inside": write("config.json", b"{}"),
    "config.json has a number of 5000 digits": write("config.json", b'{"a": ' + b"9" * 5000 + b"}"),
    "no weights": replace(WEIGHTS, lambda path: None),
    "weights without their end": lambda model: cut(WEIGHTS, (model / WEIGHTS).stat().st_size - 50)(model),
    "weights without most of their head": cut(WEIGHTS, 50),
    "weights with a huge head": write(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"),
    "weights without one": tensors(lambda found: found.pop("model.layers.0.self_attn.q_proj.weight")),
    "weights with a surplus": tensors(lambda found: found.update({"x": found[EMBEDDING].copy()})),
    "weights of another shape": tensors(lambda found: found.update({EMBEDDING: found[EMBEDDING][:-1].copy()})),
    "weights of another type": tensors(lambda found: found.update({EMBEDDING: found[EMBEDDING].astype("int32")})),
    **{f"index {text}": lambda model, text=text: ((model / WEIGHTS).unlink(), (model / INDEX).write_text(text))
       for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "b"}}',
                    '{"weight_map": {"a": "../../etc/passwd"}}', "[" * 9000)},
    "no tokenizer": lambda model: [path.unlink() for path in model.glob("tokenizer*")],
    "a tokenizer without content": write("tokenizer.json", b"{}"),
    "a chat template as pipe": replace("chat_template.jinja", os.mkfifo),
    "a chat template with an error": write("chat_template.jinja", b"{% for"),
    "an empty folder": lambda model: [path.unlink() for path in model.iterdir()],
}  # fmt: skip


@pytest.mark.parametrize("kind", STUDENTS)
def test_broken_students(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    shutil.copytree("model", student)
    STUDENTS[kind](student)
    chat = ["--data.format", "chat", "--data.test_rows", "1", "--sft.steps", "1", "--run_dir", str(tmp_path / "run")]
    refused(capsys, *PRETRAINED, "--student.path", str(student), *chat)


GOOD = b'{"question": "1+1?", "rationale": "two", "answer": "2"}\n'
DATA: dict[str, tuple[str, bytes]] = {
    "empty": ("x.jsonl", b""),
    "blank lines": ("x.jsonl", b"\n\n \n"),
    "half a line": ("x.jsonl", GOOD + GOOD[:20]),
    "binary": ("x.jsonl", bytes(range(256))),
    "Latin-1": ("x.jsonl", GOOD.replace(b"two", b"\xe9")),
    "half a UTF-16": ("x.jsonl", GOOD.decode().encode("utf-16")[:-1]),
    "lists": ("x.jsonl", b"[1]\n[2]\n"),
    "numbers": ("x.jsonl", b"1\n2\n"),
    "null": ("x.jsonl", b"null\n"),
    "no columns": ("x.jsonl", b"{}\n{}\n"),
    "unknown columns": ("x.jsonl", b'{"a": 1}\n'),
    "a number as question": ("x.jsonl", b'{"question": 3, "rationale": "a", "answer": "b"}\n'),
    "a list as answer": ("x.jsonl", b'{"question": "a", "rationale": "a", "answer": ["b"]}\n'),
    "an empty question": ("x.jsonl", b'{"question": "", "rationale": "a", "answer": "b"}\n'),
    "deep": ("x.jsonl", b"[" * 100_000),
    "a number of 5000 digits": ("x.jsonl", b'{"question": ' + b"9" * 5000 + b"}\n"),
    "one row": ("x.jsonl", GOOD),
    "the same row": ("x.jsonl", GOOD * 5),
    "an open array": ("x.json", b'[{"question": "a"'),
    "an object without rows": ("x.json", b'{"rows": 3}'),
    "a header alone": ("x.csv", b"question,rationale,answer\n"),
    "too many cells": ("x.csv", b"question,rationale,answer\na,b,c,d\n"),
    "an open quote": ("x.csv", b'question,rationale,answer\na,b,"c\n'),
    "a column twice": ("x.csv", b"question,question,answer\na,b,c\n"),
    "not gzip": ("x.jsonl.gz", GOOD),
    "half a gzip": ("x.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"),
    "not bzip2": ("x.jsonl.bz2", GOOD),
    "not xz": ("x.jsonl.xz", GOOD),
    "not zstandard": ("x.jsonl.zst", GOOD),
    "not parquet": ("x.parquet", GOOD),
    "an empty parquet": ("x.parquet", b""),
    "an unknown kind": ("x.xlsx", GOOD),
    "no kind": ("x", GOOD),
}


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("kind", DATA)
def test_broken_data(kind: str, streaming: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, data = DATA[kind]
    (tmp_path / name).write_bytes(data)
    rows = ["--data.train", str(tmp_path / name), "--data.streaming", streaming, "--run_dir", str(tmp_path / "run")]
    refused(capsys, "sft", "--config", "c.yaml", *rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("sft", "--sft.stepz", "3"), (*SFT, "--run_dir", "text"), (*BENCH, "--batch", "0")]
)
def test_the_same_in_a_process_of_its_own(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cotgrpo.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cotgrpo: ") and done.stderr.count("\n") == 1
