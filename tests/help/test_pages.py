"""The help: short and whole, in 80 columns, without JAX; options that do not exist; completion."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from cotgrpo.cli import COMMANDS, main
from cotgrpo.help.index import read_index
from cotgrpo.help.pages import SHELLS
from cotgrpo.help.short import EXAMPLES, LINES, LINES_OF_COMMANDS, MATTER_MOST, NAMES_ELSEWHERE, NEEDED

HEAVY = ("jax", "flax", "optax", "transformers", "numpy", "jsonargparse", "yaml", "cotgrpo.config")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


LIGHT = (
    *([name, flag] for name in COMMANDS for flag in ("--help", "--help-all")),
    *([], ["-h"], ["help"], ["help", "sft"], ["--version"], ["evl"], ["sft", "--stepz", "1"], ["bench", "stepp"]),
    *(["bench", "step", "--help"], ["bench", "step", "--batsch", "1"], ["plan", "--lr=3", "--topology", "h100:8"]),
)
CODE = """
import sys
from cotgrpo.cli import main

def code(arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
"""


def test_help_and_wrong_options_import_little() -> None:
    """An old index is not used, and the parsers are built: see tests/help/test_index.py."""
    program = (
        f"{CODE}\nprint([code(arguments) for arguments in {LIGHT}]); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    codes, imported = done.stdout.splitlines()[-2:]
    assert imported == "[]" and codes.count("0") == len(LIGHT) - 5 and codes.count("2") == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_a_short_help_has_a_line_for_each_setting_that_matters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--help")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(example in text for example in EXAMPLES[name])
    assert name == "bench" or "--help-all" in text
    keys = MATTER_MOST.get(name, ())
    assert len(keys) <= 20 and len(set(keys)) == len(keys)
    options = {flag: option for option in read_index()[name].options for flag in option.flags}
    lines = [line for line in text.partition("settings that matter most")[2].splitlines()[1:] if line[:4] == "  --"]
    assert len(lines) == len(keys)
    for key, line in zip(keys, lines, strict=True):
        own = LINES_OF_COMMANDS.get((name, key)) or LINES[key]
        flag, text_of_line = line.split(maxsplit=1)
        assert flag == f"--{key}" and text_of_line.startswith(own)
        default = "needed" if key in NEEDED.get(name, ()) else options[flag].default
        assert text_of_line == own + (f" [{default}]" if default not in ("", "[]") else "")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_whole_help_has_every_option_by_section(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--help-all")
    command = read_index()[name]
    assert set(re.findall(r"^  (--[\w.]+)", text, re.MULTILINE)) >= {o.flags[0] for o in command.options if o.flags}
    assert all(f"\n{group.title}:\n" in text for group in command.groups)
    assert "SUPPRESS" not in text and "None" not in text
    assert len(text.splitlines()) >= len(shown(capsys, name, "--help").splitlines())


def test_the_tables_name_settings_that_exist() -> None:
    used = {key for keys in MATTER_MOST.values() for key in keys}
    assert set(LINES) == used and set(EXAMPLES) == set(COMMANDS)
    assert {key for name, key in LINES_OF_COMMANDS if key in MATTER_MOST[name]} <= used
    for ours in NAMES_ELSEWHERE.values():
        assert f"--{ours.format(stage='sft')}" in read_index()["sft"].flags


def test_the_overview_names_each_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert all(len(line) < 80 for line in text.splitlines())
    assert all(re.search(rf"^    {name} +{re.escape(line)}$", text, re.MULTILINE) for name, line in COMMANDS.items())


def test_help_of_a_command_in_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "help", "sft") == shown(capsys, "sft", "--help") == shown(capsys, "sft", "-h")
    assert "--layers" in shown(capsys, "bench", "compile", "--help")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["sft", "--sft.stepz", "3"], "Did you mean --sft.steps?"),
        (["sft", "--sft.stepz=3"], "Did you mean --sft.steps?"),
        (["sft", "--hlep"], "Did you mean --help?"),
        (["sft", "--learning-rate", "1"], "Did you mean --sft.optimizer.learning_rate?"),
        (["grpo", "--learning_rate", "1"], "Did you mean --grpo.optimizer.learning_rate?"),
        (["sft", "--model_name_or_path", "x"], "Did you mean --student.path?"),
        (["grpo", "--max-steps", "5"], "Did you mean --grpo.steps?"),
        (["sft", "--nothing_like_it", "5"], "See --help-all for all settings."),
        (["bench", "step", "--batsch", "3"], "Did you mean --batch?"),
        (["bench", "stepp"], "Did you mean step?"),
        (["evaluate"], "Did you mean eval?"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(arguments) == 2
    except SystemExit as end:  # of `bench`
        assert end.code == 2 and arguments[0] == "bench"
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    text = shown(capsys, "--print-completion", shell)
    assert text == shown(capsys, f"--print-completion={shell}")
    assert all(name in text for name in COMMANDS)
    for option in ("sft.optimizer.learning_rate", "topology", "teacher_forced", "print-completion"):
        assert option in text, option


@pytest.mark.parametrize("shell", ["", "nonsense", "BASH"])
def test_completion_of_an_unknown_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", *filter(None, [shell])]) == 2
    assert "needs one of bash, zsh, fish" in capsys.readouterr().err


def test_bash_completes_with_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    script = shown(capsys, "--print-completion", "bash")
    name = re.findall(r"^complete .*-F (\w+) cotgrpo$", script, re.MULTILINE)[-1]
    for words, expected in (
        (["cotgrpo", "gr"], "grpo"),
        (["cotgrpo", "sft", "--sft.st"], "--sft.steps"),
        (["cotgrpo", "sft", "--data.format", "ch"], "chat"),
        (["cotgrpo", "bench", "compile", "--lay"], "--layers"),
    ):
        typed = " ".join(words)
        program = (
            f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{typed}'; "
            f"COMP_POINT={len(typed)}; {name} cotgrpo {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), (typed, done.stdout, done.stderr)
