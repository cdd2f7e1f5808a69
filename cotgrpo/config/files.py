"""Settings read from YAML files and from dotted options, and saved next to the run.

    cotgrpo sft --config run.yaml --sft.optimizer.learning_rate 1e-3

An unknown key is an error that suggests the nearest valid one. A value of the wrong type names the key.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cotgrpo.atomic_files import read_text, write_text
from cotgrpo.config.old_names import translate
from cotgrpo.config.sections import (
    ConfigError,
    DataclassInstance,
    Given,
    Setting,
    attribute_docs,
    build,
    settings_in,
    tree_of,
)
from cotgrpo.config.settings import Config
from cotgrpo.terminal import complain
from cotgrpo.terminal import did_you_mean as nearest

if TYPE_CHECKING:
    import yaml
    from jsonargparse import ArgumentParser, Namespace

Settings = TypeVar("Settings", bound="DataclassInstance")
"""A frozen dataclass of settings, each with a default: `Config`, or that of a command with settings of its own."""
DEFAULTS = Config()
METAVARS = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", type(None): "null"}


class ConfigFile(argparse.Action):
    """Add the settings of a YAML file to those given so far."""

    def __init__(
        self, option_strings: list[str], dest: str, default: str, known: Sequence[str], metavar: str, help: str
    ) -> None:
        super().__init__(option_strings, dest, default=default, metavar=metavar, help=help)
        self.known = known

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the file `values`. Its settings override those of earlier options and files."""
        from jsonargparse import ArgumentParser, Namespace

        assert isinstance(parser, ArgumentParser) and isinstance(namespace, Namespace) and isinstance(values, str)
        settings, unset = read_settings(Path(values), self.known, parser)
        for key, value in settings.items():
            namespace[key] = value
        namespace[self.dest] = [*namespace.get(self.dest, []), (settings, unset)]


def add_settings(
    parser: ArgumentParser,
    defaults: DataclassInstance,
    *,
    hidden: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Add `--config FILE` and an option for each setting, grouped by section.

    Args:
        parser: the parser of a command.
        defaults: the settings, with the defaults to show in the help.
        hidden: keys of settings and sections that are accepted and not shown.
        aliases: a second option of some settings, by key.
    """
    settings = list(settings_in(defaults))
    parser.add_argument(
        "--config",
        action=ConfigFile,
        known=[setting.key for setting in settings],
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML file of settings. Options after it override it.",
    )
    titles = section_titles(defaults)
    groups: dict[str, Any] = {}
    for setting in settings:
        key, section = setting.key, setting.section
        shown = not any(f"{key}.".startswith(f"{name}.") for name in hidden)
        if shown and section not in groups:
            groups[section] = parser.add_argument_group(section or "settings", titles.get(section))
        options = [f"--{key}"] + [alias for name, alias in (aliases or {}).items() if name == key]
        (groups[section] if shown else parser).add_argument(
            *options,
            type=setting.type,
            default=argparse.SUPPRESS,
            metavar=metavar(setting.type),
            help=help_of(setting) if shown else argparse.SUPPRESS,
        )


def section_titles(section: DataclassInstance, prefix: str = "") -> dict[str, str]:
    """Return a sentence on each section inside a section, by its key."""
    titles, docs = {}, attribute_docs(type(section))
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        titles[key] = docs.get(field.name, "")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            titles |= section_titles(value, f"{key}.")
    return titles


def help_of(setting: Setting) -> str:
    """Return the line of help of a setting, with its default as YAML writes it."""
    default = setting.default
    if isinstance(default, list | tuple):
        shown = f"[{', '.join(map(str, default))}]"
    elif default is None or isinstance(default, bool):
        shown = "null" if default is None else str(default).lower()
    else:
        shown = repr(default) if default == "" or "\n" in str(default) else str(default)
    return f"{setting.help} (default: {shown})".replace("%", "%%")


def metavar(kind: object) -> str:
    """Return how the help writes a value of a type."""
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if kind in METAVARS:
        return METAVARS[kind]
    if typing.get_origin(kind) in (list, tuple):
        return f"[{metavar(typing.get_args(kind)[0])},...]"
    if typing.get_origin(kind) is dict:
        return "{" + ": ".join(metavar(part) for part in typing.get_args(kind)) + ",...}"
    return "|".join(metavar(part) for part in typing.get_args(kind))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the arguments of a command give.

    Attributes:
        values: value of each option, as parsed. Of the settings, it holds those that were given.
        arguments: what it was parsed from.
    """

    values: Namespace
    arguments: Sequence[str]

    def settings(self, defaults: Settings) -> Settings:
        """Return the settings. Raises ConfigError for one outside its range, or that does not apply."""
        return build(defaults, self.given(defaults))

    def given(self, defaults: DataclassInstance) -> Given:
        """Return which settings were given, and where; `defaults` are all settings of the command."""
        known, files = {setting.key for setting in settings_in(defaults)}, self.values.get("config", [])
        values = {key: value for key, value in self.values.items() if key in known}
        typed = {option[2:].partition("=")[0].rstrip("+") for option in self.arguments if option.startswith("--")}
        sources = dict.fromkeys(values, len(files))
        for number, (settings, unset) in enumerate(files):
            sources |= {key: -1 if key in unset else number for key in settings if key not in typed}
        return Given(values, sources)


def parse_options(parser: ArgumentParser, arguments: Sequence[str]) -> Options:
    """Return what the arguments give, as the parser reads them.

    Raises:
        ConfigError: an unknown option, with the nearest that is known; a value of the wrong type; a file with either.
    """
    try:
        return Options(parser.parse_args(list(arguments)), arguments)
    except argparse.ArgumentError as error:
        text = " ".join(str(error).split())
        unknown = re.search(r"(?i)unrecognized arguments: --([^\s=]+)", text)
        if unknown is None:
            raise ConfigError(text) from error
        key = unknown[1]
        raise ConfigError(f"Unknown option --{key}.{nearest(key, option_names(parser), '--')}") from error


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the options that a parser and its subcommands know, without their dashes."""
    names: list[str] = []
    for action in parser._actions:
        names += [name[2:] for name in action.option_strings if name.startswith("--")]
        if isinstance(action.choices, dict):
            names += [name for command in action.choices.values() for name in option_names(command)]
    return names


@functools.cache
def settings_parser(kind: type[DataclassInstance]) -> ArgumentParser:
    """Return a parser of settings alone."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_settings(parser, kind())
    return parser


def parse_settings(arguments: Sequence[str], defaults: Settings) -> Settings:
    """Return the settings that `--config FILE` and dotted options describe. Later ones override earlier ones.

    Args:
        arguments: options and their values.
        defaults: the settings that count if nothing is given; the result is of their type.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or outside its range.
    """
    return parse_options(settings_parser(type(defaults)), arguments).settings(defaults)


def parse_config(arguments: Sequence[str], *, defaults: Config = DEFAULTS) -> Config:
    """Return the config of a run that the arguments describe, as `parse_settings` reads them."""
    return parse_settings(arguments, defaults)


FIRST_LINE, LAST_LINE = "# The settings of a run, up to the line `# end`.", "# end"
"""Of a saved config. A file that was cut off has the first alone, and may be valid YAML all the same."""


def load_config(path: Path, *, may_be_newer: bool = False) -> Config:
    """Return the config that a run has saved. Raises ConfigError as `parse_settings` does.

    Args:
        path: the file.
        may_be_newer: ignore settings that only a newer version knows, and print them. Training does not go on so.
    """
    if may_be_newer:
        values, unset = given_in(path)
        return build(DEFAULTS, Given(values, {key: -1 if key in unset else 0 for key in values}))
    with saved_by_a_run():
        return parse_config(["--config", str(path)])


def given_in(path: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the settings that a run has saved, by dotted key, and those to ignore if they do not apply.

    Settings that only a newer version knows are left out, and printed.
    """
    known = [setting.key for setting in settings_in(DEFAULTS)]
    with saved_by_a_run():
        return read_settings(path, known, settings_parser(Config), may_be_newer=True)


@functools.cache
def say_ignored(path: Path, keys: tuple[str, ...]) -> None:
    """Print once that a saved config has settings that this version does not know."""
    complain(f"{path} is of a newer version. Ignored, since this version does not know them: {', '.join(keys)}.")


def save_config(config: DataclassInstance, path: Path) -> None:
    """Write all settings that apply as YAML, by an atomic write."""
    import yaml

    text = yaml.safe_dump(tree_of(config), sort_keys=False, allow_unicode=True)
    write_text(path, f"{FIRST_LINE}\n{text}{LAST_LINE}\n")


class UnreadableFile(ConfigError):
    """Raised for a file of settings that is missing, cut off or no YAML. `what` is the message without the advice."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what} {advice}".strip())
        self.what = what


@contextlib.contextmanager
def saved_by_a_run() -> Iterator[None]:
    """Say what to do about the file of a run that cannot be read."""
    try:
        yield
    except UnreadableFile as error:
        raise ConfigError(
            f"{error.what} It holds the settings of a run: put it back, or move it away and run the command that wrote "
            "it again, with the same settings, which writes a new one."
        ) from error


def read_settings(
    path: Path, known: Sequence[str], parser: ArgumentParser, *, may_be_newer: bool = False
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the settings in a YAML file by dotted key, and those to ignore if they do not apply.

    Args:
        path: the file.
        known: the dotted keys.
        parser: of these settings.
        may_be_newer: leave unknown keys out, and print them.

    Raises:
        ConfigError: a file that cannot be read or is not a mapping, an unknown key, a value of the wrong type.
    """
    return checked_settings(read_mapping(path), known, parser, f"{path}: ", may_be_newer=path if may_be_newer else None)


def checked_settings(
    tree: Mapping[str, Any],
    known: Sequence[str],
    parser: ArgumentParser,
    where: str = "",
    *,
    may_be_newer: Path | None = None,
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the settings in nested mappings by dotted key, and those to ignore if they do not apply.

    Args:
        tree: the mappings.
        known: the dotted keys.
        parser: of these settings.
        where: names the mappings, in front of messages.
        may_be_newer: the file they come from, if unknown keys are to be left out and printed.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    settings, unset = translate(dict(flat(tree, leaves=known)))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    sections |= {section.partition(".")[0] for section in sections}
    for key in [key for key, value in settings.items() if value == {} and key in sections]:
        del settings[key]
    if may_be_newer is not None:
        newer = tuple(key for key in settings if key not in known and key not in sections)
        if newer:
            say_ignored(may_be_newer, newer)
        settings = {key: value for key, value in settings.items() if key not in newer}
    for key, value in settings.items():
        if key in sections:
            raise ConfigError(f"{where}{key} is a section: expected a mapping of its settings, got {value!r}.")
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}.{nearest(key, known)}")
    try:
        parsed = parser.parse_object(settings)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{where}{' '.join(str(error).split())}") from error
    return {key: parsed[key] for key in settings}, unset


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError if there is none."""
    import yaml

    try:
        text = read_text(path)
        check_keys_once(yaml.compose(text, yaml.SafeLoader), path)
        tree = yaml.safe_load(text)
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror}).", "Check the path of --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise UnreadableFile(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if text.startswith(FIRST_LINE) and f"\n{LAST_LINE}" not in text:
        raise UnreadableFile(f"{path}: the end is missing.")
    if not isinstance(tree, dict):
        raise UnreadableFile(f"{path}: expected a mapping of settings, got {type(tree).__name__}.")
    return tree


def check_keys_once(node: yaml.Node | None, path: Path, prefix: str = "") -> None:
    """Raise ConfigError for a key that a mapping of a YAML file has twice: YAML would take the last one."""
    import yaml

    seen: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        name = f"{prefix}{key.value}" if isinstance(key.value, str) else prefix
        if isinstance(key.value, str) and not key.tag.endswith((":str", ":merge")):
            raise ConfigError(f"{path}: unknown key {name!r} in line {line}: keys are text.")
        if name in seen:
            raise ConfigError(f"{path}: {name} is set twice, in lines {seen[name]} and {line}. Remove one.")
        seen[name] = line
        check_keys_once(value, path, f"{name}.")


def flat(tree: Mapping[str, Any], prefix: str = "", leaves: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield ("a.b", 1) for every leaf of {"a": {"b": 1}}. The values of the keys in `leaves` may be mappings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in leaves:
            yield from flat(value, f"{prefix}{key}.", leaves)
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "key (old there, new now)" for each setting that differs, by dotted key."""
    return [f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in now if before.get(key) != now[key]]
