"""The index of options is what the parsers say, and is not used where it may be old."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotgrpo.commands.parsers import COMMANDS, make_parser
from cotgrpo.config.files import option_names
from cotgrpo.help import index
from cotgrpo.help.pages import find_unknown_option

AGAIN = "run `python -m cotgrpo.help.index` and commit cotgrpo/help/index.json"


def test_the_index_is_up_to_date() -> None:
    assert index.INDEX.read_text(encoding="utf-8") == index.index_text(), AGAIN


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"bench"}))
def test_it_holds_every_option_of_a_command(name: str) -> None:
    known = {f"--{each}" for each in option_names(make_parser(name))} - {"--help", "--version"}
    assert {flag for flag in index.read_index()[name].flags if flag.startswith("--")} == known


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("@frozen\nclass A:\n    b: int = 1\n", "@frozen\nclass A:\n    b: int = 2\n", True),
        ("class A:\n    b: int\n\n    c: str\n", "class A:\n    b: int\n\n    c: bool\n", True),
        ("class A:\n    b: int\n", "class B:\n    b: int\n", True),
        ("class A:\n    b: int\n\nX = 1\n", "class A:\n    b: int\n\nX = 2\n", False),
        ("class A:\n    b: int\n", "import os\n\nclass A:\n    b: int\n", False),
        ("class A:\n    b: int\n\n    def f(self): ...\n", "class A:\n    b: int\n\n    def g(self): ...\n", False),
        ("class A:\n    b: int\n\ndef f(): ...\n", "class A:\n    b: int\n\ndef g(): ...\n", False),
    ],
)
def test_the_checksum_is_of_the_classes_named(
    before: str, after: str, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PACKAGE", tmp_path)
    (tmp_path / "x.py").write_text(before, encoding="utf-8")
    first, whole = index.checksum({"x.py": ["A"]}), index.checksum({"x.py": []})
    (tmp_path / "x.py").write_text(after, encoding="utf-8")
    assert (index.checksum({"x.py": ["A"]}) != first) == changes
    assert index.checksum({"x.py": []}) != whole


def test_an_old_index_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that it lacks is known all the same."""
    stored = json.loads(index.INDEX.read_text(encoding="utf-8"))
    stored["commands"]["sft"]["groups"] = []
    old = tmp_path / "index.json"
    monkeypatch.setattr(index, "INDEX", old)
    old.write_text(json.dumps(stored | {"checksum": stored["checksum"] + 1}), encoding="utf-8")
    index.stored_index.cache_clear()
    try:
        assert index.stored_index() is None and "--sft.steps" in index.read_index()["sft"].flags
        assert find_unknown_option("sft", ["--sft.stepz", "3"]) is None
    finally:
        index.stored_index.cache_clear()
