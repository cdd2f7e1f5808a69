"""A YAML file of settings as a tree of keys: what is no mapping or no known key is an error that suggests the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Settings that cannot be used; the message names the key, what was expected and what came."""


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
