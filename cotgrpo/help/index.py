"""The index of all options: what the help needs to know, in a file next to this one.

Reading it takes milliseconds, but building the parsers imports JAX. `python -m cotgrpo.help.index` writes it again,
after a setting has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
INDEX = Path(__file__).with_name("index.json")
HELP = ("-h", "--help")
END = r"^    (?:def|@)|^[^\s)]|\Z"
"""Where the fields of a class end: at its first method, or after it."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, or the name of a part of a command.

    Attributes:
        flags: as they are typed; none: a positional argument.
        metavar: how the help writes its value; empty: it has none.
        help: what it does, with its default; empty: the help does not show it.
    """

    flags: tuple[str, ...]
    metavar: str
    help: str

    @property
    def default(self) -> str:
        """The default as the help writes it, or an empty text."""
        found = re.search(r"\(default: (.*)\)$", self.help, re.DOTALL)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Options under one title."""

    title: str
    description: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, such as "sft", or a part of one, such as "bench step".

    Attributes:
        description: paragraphs.
        groups: the options that its help shows.
        hidden: flags that are accepted too.
    """

    description: str
    groups: tuple[Group, ...]
    hidden: tuple[str, ...]

    @property
    def options(self) -> list[Option]:
        """The options of all groups."""
        return [option for group in self.groups for option in group.options]

    @property
    def flags(self) -> list[str]:
        """Every flag that is accepted, those that the help shows first."""
        return [*(flag for option in self.options for flag in option.flags), *self.hidden]


@functools.cache
def stored_index() -> dict[str, Command] | None:
    """Return every command by name, from the file; None if settings have changed since it was written."""
    stored = json.loads(INDEX.read_text(encoding="utf-8"))
    if stored["checksum"] != checksum(stored["sources"]):
        return None
    return {name: command_of(tree) for name, tree in stored["commands"].items()}


def read_index() -> dict[str, Command]:
    """Return every command by name. If the file is old, build the parsers, which imports JAX."""
    return stored_index() or make_commands()


def command_of(tree: Mapping[str, Any]) -> Command:
    """Return a command from its JSON."""
    groups = [
        Group(title, description, tuple(Option(tuple(flags), metavar, help) for flags, metavar, help in options))
        for title, description, options in tree["groups"]
    ]
    return Command(tree["description"], tuple(groups), tuple(tree["hidden"]))


def checksum(sources: Mapping[str, Iterable[str]]) -> int:
    """Return a checksum of the fields and docstrings of classes, by file; of the whole file if no class is named."""
    crc = 0
    for file, classes in sources.items():
        path = PACKAGE / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        bodies = [re.search(rf"^class {name}\b.*?(?={END})", text, re.MULTILINE | re.DOTALL) for name in classes]
        for part in [body[0] if body else "" for body in bodies] or [text]:
            crc = zlib.crc32(part.encode(), crc)
    return crc


@functools.cache
def make_commands() -> dict[str, Command]:
    """Return every command, from the parsers themselves."""
    from cotgrpo.bench.command import make_parser as make_bench_parser
    from cotgrpo.commands.parsers import COMMANDS, make_parser

    commands: dict[str, Command] = {}
    for name in COMMANDS:
        if name == "bench":
            commands |= dict(commands_in("bench", make_bench_parser()))
        else:
            commands |= dict(commands_in(name, subparsers(make_parser(name))[name]))
    return commands


def commands_in(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Command]]:
    """Yield a command and its parts."""
    groups, hidden = [], list[str]()
    for group in parser._action_groups:
        options = list[Option]()
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                options += [Option((), part.dest, part.help or "") for part in action._get_subactions()]
            elif action.help == argparse.SUPPRESS:
                hidden += action.option_strings
            elif tuple(action.option_strings) != HELP:
                options.append(option_of(parser, action))
                hidden += [flag for flag in action.option_strings if flag.endswith("+")]
        if options:
            title = (group.title or "").replace("positional arguments", "arguments")
            groups.append(Group(title, group.description or "", tuple(options)))
    description = (parser.description or "").strip()
    yield name, Command(description, tuple(groups), tuple(hidden))
    for part, own in subparsers(parser).items():
        yield from commands_in(f"{name} {part}", own)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's commands or parts, by name."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: own for choices in found for name, own in choices.items()}


def option_of(parser: argparse.ArgumentParser, action: argparse.Action) -> Option:
    """Return an option as the help shows it. The form of a list's option that appends, with a plus, is left out."""
    formatter = parser._get_formatter()
    named = bool(action.option_strings)
    default = formatter._get_default_metavar_for_optional if named else formatter._get_default_metavar_for_positional
    metavar = formatter._format_args(action, default(action)) if action.nargs != 0 else ""
    flags = tuple(flag for flag in action.option_strings if not flag.endswith("+"))
    help = formatter._expand_help(action) if action.help else ""
    return Option(flags, metavar, help.replace(f"{PACKAGE.parent}/", ""))  # wherever the package is installed


def sources_of_settings() -> dict[str, list[str]]:
    """Return the classes that define settings, by file, and the files that define other options."""
    import inspect

    from cotgrpo.config import Config, GenerateConfig
    from cotgrpo.config.sections import classes_in

    sources: dict[str, list[str]] = {}
    for cls in sorted({*classes_in(Config()), *classes_in(GenerateConfig())}, key=lambda cls: cls.__qualname__):
        file = Path(inspect.getfile(cls)).relative_to(PACKAGE).as_posix()
        sources.setdefault(file, []).append(cls.__name__)
    sources |= {f"commands/{file.name}": [] for file in sorted((PACKAGE / "commands").glob("*.py"))}
    return dict(sorted(sources.items())) | {"bench/command.py": [], "bench/parts.py": []}


def index_text() -> str:
    """Return what the file of the index should hold: an option a line."""
    sources = sources_of_settings()
    commands = []
    for name, command in make_commands().items():
        groups = []
        for group in command.groups:
            options = ",\n".join(json.dumps([o.flags, o.metavar, o.help], ensure_ascii=False) for o in group.options)
            groups.append(f"[{json.dumps(group.title)}, {json.dumps(group.description)}, [\n{options}]]")
        tree = f'"description": {json.dumps(command.description)}, "hidden": {json.dumps(command.hidden)}'
        commands.append(f'{json.dumps(name)}: {{{tree}, "groups": [{", ".join(groups)}]}}')
    head = f'"checksum": {checksum(sources)},\n"sources": {json.dumps(sources)}'
    whole = ",\n".join(commands)
    return f'{{{head},\n"commands": {{\n{whole}}}}}\n'


def main() -> None:
    """Write the index."""
    from cotgrpo.atomic_files import write_text

    write_text(INDEX, index_text())


if __name__ == "__main__":
    main()
