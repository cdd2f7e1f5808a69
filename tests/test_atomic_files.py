"""A file is the old one or the new one, and never a part of either."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotgrpo.atomic_files import read_json, whole_file, write_json, write_text


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
