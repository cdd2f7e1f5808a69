"""Settings read from a YAML file and from dotted options, and written back beside the run.

    cotgrpo sft --config run.yaml --sft.optimizer.learning_rate 1e-3

An unknown key is an error that suggests the nearest valid one; a value of the wrong type names the key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cotgrpo.atomic_files import write_text
from cotgrpo.config.settings import Config, ConfigError

DEFAULTS = Config()

Settings = TypeVar("Settings")
"""A frozen dataclass of settings, each with a default: `Config`, or that of a command with settings of its own."""


def make_parser(prog: str, defaults: Any = DEFAULTS, description: str | None = None) -> Any:
    """The `jsonargparse` parser of one command: `--config FILE.yaml` and an option for every setting of `defaults`."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of settings; options after it override it")
    parser.add_class_arguments(type(defaults))
    parser.set_defaults(dict(flat(dataclasses.asdict(defaults))))
    return parser


def parse_config(
    arguments: Sequence[str], *, prog: str = "cotgrpo", defaults: Config = DEFAULTS, description: str | None = None
) -> Config:
    """The config that `--config FILE` and dotted options describe, as `parse_settings` reads them."""
    return parse_settings(arguments, defaults, prog=prog, description=description)


def parse_settings(
    arguments: Sequence[str], defaults: Settings, *, prog: str = "cotgrpo", description: str | None = None
) -> Settings:
    """The settings that `--config FILE` and dotted options describe, later ones overriding earlier ones; `description` is for --help.

    They are of the type of `defaults`, which count where nothing is given.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or outside its range.
    """
    known = [key for key, _ in flat(dataclasses.asdict(defaults))]  # type: ignore[call-overload]
    expecting_file = False
    for argument in arguments:
        option, _, value = argument.partition("=")
        if expecting_file or (option == "--config" and value):
            check_file(Path(argument if expecting_file else value), known)
        elif option.startswith("--") and option.rstrip("+")[2:] not in (*known, "config", "help", "print_config"):
            raise ConfigError(f"Unknown option {option}.{nearest(option[2:], known, '--')}")
        expecting_file = option == "--config" and not value
    parser = make_parser(prog, defaults, description)
    try:
        parsed = parser.parse_args(list(arguments))
        parsed.pop("config", None)
        return type(defaults)(**vars(parser.instantiate(parsed)))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def save_config(config: Any, path: Path) -> None:
    """Writes all settings as YAML, whole or not at all."""
    import yaml

    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def load_config(path: Path) -> Config:
    """The config in a YAML file. Raises ConfigError as `parse_config` does."""
    return parse_config(["--config", str(path)])


def check_file(path: Path, known: Sequence[str]) -> None:
    """Raises ConfigError where the file is no YAML mapping or holds a key that does not exist."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path of --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(tree).__name__}.")
    sections = {key.rpartition(".")[0] for key in known} - {""}
    sections |= {section.partition(".")[0] for section in sections}
    for key, value in flat(tree):
        if key in sections and value != {}:
            raise ConfigError(f"{path}: {key} is a section: expected a mapping of its settings, got {value!r}.")
        if key not in known and key not in sections:
            raise ConfigError(f"{path}: unknown key {key!r}.{nearest(key, known)}")


def nearest(key: str, known: Sequence[str], mark: str = "") -> str:
    """The nearest valid key as a question: by the whole dotted key, or else by its last part."""
    last_parts = [name.rpartition(".")[2] for name in known]
    by_last_part = difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    found = difflib.get_close_matches(key, known, n=1) or [known[last_parts.index(part)] for part in by_last_part]
    return f" Did you mean {mark}{found[0]}?" if found else " See --help for all settings."


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", 1) for every leaf of {"a": {"b": 1}}."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
