"""A file is the old one or the new one, and never a part of either."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cotgrpo.atomic_files import find_json_object, read_json, whole_file, write_json, write_text


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"text": "\u00fc \u2028 \U0001f600", "list": [1, 0.5, None, True]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_text(path, "old\n")
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair \ud800")
    assert path.read_text() == "old\n"
    # What a killed process left is no hindrance, and files that differ in their ending do not meet.
    write_text(tmp_path / "rows.txt", "other\n")
    write_text(path, "new\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "rows.txt"] and path.read_text() == "new\n"


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1]", "null", "\0", '"text"', "[" * 100_000, "\xff"])
def test_a_json_file_that_can_be_made_again(tmp_path: Path, text: str) -> None:
    """Missing, cut off and of another kind are one: there is nothing to use."""
    path = tmp_path / "before.json"
    assert find_json_object(path) is None
    path.write_text(text, encoding="latin-1")
    assert find_json_object(path) is None
    write_json(path, {"a": 1})
    assert find_json_object(path) == {"a": 1}


def test_what_is_written_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data before the name, and the name before the block ends."""
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    write_text(tmp_path / "a.txt", "text")
    assert order == [str(tmp_path / "a.txt.tmp"), "replace", str(tmp_path)]
