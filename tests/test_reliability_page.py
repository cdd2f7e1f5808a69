"""docs/reliability.md names tests that exist, and all tests of the kinds that it promises to name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
WHOLE_FILES = (
    "tests/training/test_kills.py",
    "tests/training/test_artefacts.py",
    "tests/training/test_disks.py",
    "tests/test_disk_errors.py",
    "tests/accelerators/test_memory.py",
    "tests/accelerators/test_out_of_memory.py",
    "tests/checkpoints/test_run_lock.py",
)
"""The page names each test in these files."""
OTHER_FILES = ("tests/identity", "tests/training", "tests/commands/test_wrong_commands.py", "tests/distributed")
"""The page names a test of each of these."""


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.fixture(scope="module")
def named() -> dict[str, set[str]]:
    """The tests that the page names, by file."""
    found: dict[str, set[str]] = {}
    for file, name in NAMED.findall((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")):
        found.setdefault(file, set()).add(name)
    return found


def test_the_tests_exist(named: dict[str, set[str]]) -> None:
    assert len(named) > 10
    for file, names in named.items():
        assert (ROOT / file).is_file(), file
        assert names <= names_in(ROOT / file), (file, names - names_in(ROOT / file))


def test_none_of_these_kinds_is_left_out(named: dict[str, set[str]]) -> None:
    for file in WHOLE_FILES:
        assert names_in(ROOT / file) == named.get(file), file
    for place in OTHER_FILES:
        assert any(file.startswith(place) for file in named), place


def test_every_row_has_a_test() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    for row in rows:
        assert NAMED.search(row.rsplit(" | ", 1)[1]), row
    assert "What is not promised" in text
    assert "docs/reliability.md" in (ROOT / "README.md").read_text(encoding="utf-8")
