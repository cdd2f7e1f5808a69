"""What is printed is text: no control sequence, markup or mark of direction reaches the terminal."""

from __future__ import annotations

import io
import re
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from cotgrpo.cli import main
from cotgrpo.terminal import clean, complain, say

HOSTILE = {
    "colour": "a\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "8-bit control": "\x9b31m",
    "clear": "\x1bc\x1b[2J",
    "bell and backspace": "x\x07\x08\x08y",
    "carriage return": "safe\rspoof",
    "right to left": "abc\u202edef\u2066ghi\u2069",
    "zero width": "pass\u200bword\ufeff",
    "line separator": "a\u2028b\u2029c\x85d",
    "tags": "x\U000e0041\U000e0042",
    "surrogate": "half \ud83d",
    "markup": "[red]text[/red] [link=http://x]y[/link] [bold",
    "emoji code": ":smile:",
    "null": "a\0b",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_printed_as_text(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, file = HOSTILE[kind], io.StringIO()
    say(Console(file=file, force_terminal=True, width=20), text)
    complain(text)
    for shown in (file.getvalue(), capsys.readouterr().err):
        letters = shown.rstrip("\n")
        assert not [letter for letter in letters if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert "\n" not in letters
    assert ("[" in text) <= ("[" in shown) and (":smile:" in text) <= (":smile:" in shown)


RESULT = "after grpo: accuracy 99.8% of 500 (95 % interval 98.9% to 100.0%), loss 0.0001 on 1,234,567 rows"
FOLDER = "written: /" + "a-long-folder/" * 9 + "page.html"


@pytest.mark.parametrize("text", [RESULT, f"  {RESULT}", f"{RESULT}\n{RESULT}", FOLDER, "x" * 200, "short", ""])
@pytest.mark.parametrize("width", [40, 57, 80])
def test_a_terminal_breaks_lines_between_words(text: str, width: int) -> None:
    file = io.StringIO()
    say(Console(file=file, force_terminal=True, width=width), text)
    lines = file.getvalue().removesuffix("\n").split("\n")
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)


@pytest.mark.parametrize(("terminal", "width"), [(False, 80), (True, 39)])
def test_a_log_and_a_narrow_terminal_get_whole_lines(terminal: bool, width: int) -> None:
    file = io.StringIO()
    say(Console(file=file, force_terminal=terminal, width=width), RESULT)
    assert file.getvalue() == f"{RESULT}\n"


def test_plain_text_stays() -> None:
    text = "é 中文 😀 (50 %)\n\ttab [x] \\n"
    assert clean(text) == text


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("surrogate", "null")])
def test_no_command_passes_it_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of commands, options, files, folders and settings."""
    text = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    for arguments in (
        [text],
        ["sft", f"--{text}"],
        ["sft", "--config", text],
        ["sft", "--run_dir", "runs/x", "--data.train", text],
        ["sft", "--sft.steps", text],
        ["grpo", "--grpo.objective.name", text],
        ["eval", "--run_dir", text],
        ["export", "--run_dir", text, "--out", text],
        ["generate", "--questions", text, "--out", text],
        ["gold", "--student", text, "--ghosts", text, "--out", text],
        ["plan", "--topology", text],
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        letters = re.sub(r"\n", "", shown.out + shown.err)
        assert not [letter for letter in letters if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
