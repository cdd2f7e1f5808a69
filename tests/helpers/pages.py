"""The code blocks of the pages, and a runner of what they say: Python as one script, commands one after the other."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cotgrpo.cli import main
from cotgrpo.config import parse_config

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "README.zh.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("vllm serve", "lm_eval run")
"""Programs that are not cotgrpo's: an engine, in whose place a test has its own server, and an evaluation that needs
PyTorch (tests/evaluation/test_lm_eval.py runs it where it is installed)."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: its path in the repository.
        language: "" for output that a page shows.
        code: the text.
    """

    page: str
    language: str
    code: str

    @property
    def first(self) -> str:
        """The first line, by which the tables name it."""
        return self.code.partition("\n")[0]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, language, code) for language, code in FENCE.findall(text)]


def documented_metrics() -> set[str]:
    """The names in the tables of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`((?:train|eval)/[\w/]+)`", cell)}


def commands_of(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without comments."""
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        for command in re.split(r"\s+&&\s+", line):
            if words := shlex.split(command, comments=True):
                yield words


@dataclasses.dataclass
class Runner:
    """Runs blocks in the current folder.

    Attributes:
        replace: texts of the page, and what stands in their place: a hub id, a server's address.
        more: gives the options that are added to a command of cotgrpo, to shrink it.
        names: the variables of the Python blocks.
        ran: the commands that were run.
    """

    replace: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more: Callable[[list[str]], list[str]] = lambda words: []
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    ran: list[list[str]] = dataclasses.field(default_factory=list)

    def run(self, block: Block) -> None:
        """Run a block by its language."""
        code = block.code
        for old, new in self.replace.items():
            code = code.replace(old, new)
        kinds: dict[str, Callable[[str, str], None]] = {
            "py": self.python,
            "python": self.python,
            "yaml": self.settings,
            "sh": self.shell,
            "bash": self.shell,
        }
        kinds[block.language](code, block.page)

    def python(self, code: str, page: str) -> None:
        """Run Python in the variables of the page. A block that begins with a file's name becomes that file."""
        if file := re.match(r"# (\w+\.py)\b", code):
            Path(file[1]).write_text(code, encoding="utf-8")
        exec(compile(code, page, "exec"), self.names)

    def settings(self, code: str, page: str) -> None:
        """Read a part of a config file. It stays as `page.yaml`."""
        assert yaml.safe_load(code), page
        Path("page.yaml").write_text(code, encoding="utf-8")
        parse_config(["--config", "page.yaml"])

    def shell(self, code: str, page: str) -> None:
        """Run each command of cotgrpo in this process. Its exit code is 0."""
        for words in commands_of(code):
            while "=" in words[0]:  # a variable of an engine
                words.pop(0)
            if shlex.join(words).startswith(ELSEWHERE):
                continue
            assert words[0] == "cotgrpo", f"{page}: only commands of cotgrpo can be run: {words}"
            command = [*words[1:], *self.more(words[1:])]
            try:
                code_of = main(command)
            except SystemExit as ended:  # of --help
                code_of = ended.code if isinstance(ended.code, int) else 0
            assert code_of == 0, f"{page}: {command} ended with {code_of}"
            self.ran.append(command)
