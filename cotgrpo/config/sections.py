"""Sections of settings: frozen dataclasses, built from the settings that were given, and turned back into a tree.

A field of a section holds a value or another section. Two helpers declare sections that depend on a setting of theirs:

    objective: Objective = choice("name", {"pair": Pair, "nll": Nll}, Pair())    # one dataclass of several
    lora: LoraConfig | None = optional("rank", LoraConfig)                       # None if lora.rank is 0

A section may have a method `not_applicable()`, which returns the settings without effect, given the others.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object

Section = TypeVar("Section", bound="DataclassInstance")

LARGEST_INT, LARGEST_SEED, LARGEST_FLOAT = 2**31 - 1, 2**32 - 1, 3.4e38
"""Of a setting: what an int32 array, the seed of a random key and a float32 array can hold."""


class ConfigError(ValueError):
    """Settings that cannot be used. The message has the key, what was expected and what was given."""


def at_least(least: int, section: DataclassInstance, *names: str) -> None:
    """Raise ConfigError if a setting is smaller than `least`."""
    for name in names:
        expect(getattr(section, name) >= least, section, name, f"at least {least}")


def expect(holds: bool, section: DataclassInstance, name: str, expected: str) -> None:
    """Raise ConfigError unless a condition on a setting holds; `expected` describes it."""
    if not holds:
        value = getattr(section, name)
        raise ConfigError(f"{type(section).__name__}.{name} must be {expected}, got {value!r}.")


class NotApplicable(NamedTuple):
    """Settings that have no effect.

    Attributes:
        names: the settings, in the section.
        switch: the setting of the section that decides it, with dots.
        reason: completes the sentence "KEY does not apply to ...".
    """

    names: tuple[str, ...] = ()
    switch: str = ""
    reason: str = ""


class Setting(NamedTuple):
    """One setting as the command line shows it.

    Attributes:
        key: the dotted key.
        type: the annotated type.
        default: the value if it is not given.
        help: one sentence.
        section: the key of its section; empty for the outermost.
    """

    key: str
    type: Any
    default: Any
    help: str
    section: str


@dataclasses.dataclass(frozen=True)
class Given:
    """The settings that were given, and where.

    Attributes:
        values: value of each dotted key.
        sources: number of each key's last source. Files count from 0, the command line comes last. -1 marks the
            defaults that saved configs used to hold, whether they applied or not.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: dict[str, int] = dataclasses.field(default_factory=dict)

    def over(self, values: Mapping[str, Any], defaults: frozenset[str] = frozenset()) -> Given:
        """Return these settings on top of others from one earlier source; `defaults` are keys of the source -1."""
        sources = {key: -1 if key in defaults else 0 for key in values}
        later = {key: source + (source >= 0) for key, source in self.sources.items()}
        return Given({**values, **self.values}, sources | later)

    def check_applies(self, key: str, switch: str, reason: str) -> None:
        """Raise ConfigError if a key was given that does not apply.

        A later source that sets `switch` makes another choice. What earlier sources gave for theirs is left out.
        """
        if key in self.values and self.sources[key] >= self.sources.get(switch, 0):
            raise ConfigError(f"{key} does not apply to {reason}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One dataclass of several, chosen by the setting `switch`."""

    switch: str
    alternatives: Mapping[str, type[DataclassInstance]]

    def name(self, value: DataclassInstance) -> str:
        """Return the name of the alternative that a section is."""
        for name, alternative in self.alternatives.items():
            if type(value) is alternative:
                return name
        known = ", ".join(alternative.__name__ for alternative in self.alternatives.values())
        raise ConfigError(f"Settings cannot name a {type(value).__name__}: expected one of {known}.")

    def settings(self, value: DataclassInstance, key: str, help: str) -> Iterator[Setting]:
        """Yield the switch and the settings of all alternatives."""
        yield Setting(f"{key}.{self.switch}", Literal[tuple(self.alternatives)], self.name(value), help, key)
        found: dict[str, tuple[Setting, list[str]]] = {}
        for name, alternative in self.alternatives.items():
            for setting in settings_in(value if type(value) is alternative else alternative, f"{key}."):
                found.setdefault(setting.key, (setting, []))[1].append(name)
        for setting, names in found.values():
            yield setting._replace(help=f"{', '.join(names)}: {setting.help}")

    def build(self, value: DataclassInstance, given: Given, key: str) -> Any:
        """Return the chosen alternative with what was given."""
        name = given.values.get(f"{key}.{self.switch}", self.name(value))
        if name is None:
            raise ConfigError(f"{key}.{self.switch} must have a value, got null. Leave it out for its default.")
        alternative = self.alternatives[name]
        names = [field.name for field in dataclasses.fields(alternative)]
        for other in given.values:
            section, _, last = other.rpartition(".")
            if section == key and last not in (self.switch, *names):
                takes = f"takes {', '.join(names)}" if names else "takes no options"
                kind = f"the {key.rpartition('.')[2]} {name!r}"
                try:
                    given.check_applies(other, f"{key}.{self.switch}", f"{kind}, which {takes}.")
                except ConfigError:
                    self.check_range(key, last, given.values[other])
                    raise
        own = {field: given.values[f"{key}.{field}"] for field in names if f"{key}.{field}" in given.values}
        if type(value) is alternative:
            own = shallow(value) | own
        built = construct(alternative, own, f"{key}.")
        unused = not_applicable(built)
        for name in unused.names:
            given.check_applies(f"{key}.{name}", f"{key}.{unused.switch}", unused.reason)
        return construct(alternative, {k: v for k, v in own.items() if k not in unused.names}, f"{key}.")

    def check_range(self, key: str, name: str, value: Any) -> None:
        """Raise ConfigError if no alternative takes this value of a setting. It may not apply for another reason."""
        owners = [c for c in self.alternatives.values() if name in (field.name for field in dataclasses.fields(c))]
        problems = []
        for owner in owners:
            try:
                construct(owner, {name: value}, f"{key}.")
            except ConfigError as error:
                problems += [error] * str(error).startswith(f"{key}.{name} ")
        if problems and len(problems) == len(owners):
            raise problems[0]

    def tree(self, value: DataclassInstance) -> dict[str, Any]:
        """Return the alternative's name and its settings."""
        return {self.switch: self.name(value)} | tree_of(value)


@dataclasses.dataclass(frozen=True)
class OptionalSection:
    """A section that is None if its setting `switch` is 0."""

    switch: str
    section: type[DataclassInstance]

    def settings(self, value: DataclassInstance | None, key: str, help: str) -> Iterator[Setting]:
        """Yield the section's settings; without a value the switch is 0 by default."""
        for setting in settings_in(self.section if value is None else value, f"{key}."):
            off = value is None and setting.key == f"{key}.{self.switch}"
            yield setting._replace(default=0, help=f"{setting.help} 0: off.") if off else setting

    def build(self, value: DataclassInstance | None, given: Given, key: str) -> Any:
        """Return the section with what was given, or None."""
        switch = f"{key}.{self.switch}"
        own = {field.name: f"{key}.{field.name}" for field in dataclasses.fields(self.section)}
        own = {name: given.values[full] for name, full in own.items() if full in given.values}
        if own.get(self.switch, 0) is None:
            raise ConfigError(f"{switch} must have a value, got null. 0 turns the section off.")
        if not own.get(self.switch, 0 if value is None else getattr(value, self.switch)):
            for name in own:
                if name != self.switch:
                    given.check_applies(f"{key}.{name}", switch, f"a run with {switch} 0. Remove it, or set {switch}.")
            return None
        return construct(self.section, ({} if value is None else shallow(value)) | own, f"{key}.")

    def tree(self, value: DataclassInstance | None) -> dict[str, Any]:
        """Return the section's settings, or its switch at 0."""
        return {self.switch: 0} if value is None else tree_of(value)


def choice(switch: str, alternatives: Mapping[str, type[DataclassInstance]], default: DataclassInstance) -> Any:
    """Return a dataclass field that holds one of several sections, chosen by the setting `switch`."""
    return dataclasses.field(default=default, metadata={"dependent": Choice(switch, alternatives)})


def optional(switch: str, section: type[DataclassInstance]) -> Any:
    """Return a dataclass field that holds a section, or None if its setting `switch` is 0."""
    return dataclasses.field(default=None, metadata={"dependent": OptionalSection(switch, section)})


def dependent(field: dataclasses.Field[Any]) -> Choice | OptionalSection | None:
    """Return how a field's section depends on its switch, if it does."""
    return field.metadata.get("dependent")


def settings_in(section: DataclassInstance | type[DataclassInstance], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a section and of those inside it. The defaults are the section's values."""
    cls = section if isinstance(section, type) else type(section)
    types, docs = typing.get_type_hints(cls), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        key, help = f"{prefix}{field.name}", docs.get(field.name, "")
        value = default_of(field) if isinstance(section, type) else getattr(section, field.name)
        kind = dependent(field)
        if kind is not None:
            yield from kind.settings(value, key, help)
        elif dataclasses.is_dataclass(value):
            yield from settings_in(value, f"{key}.")
        else:
            yield Setting(key, types[field.name], value, help, prefix.rstrip("."))


def classes_in(section: DataclassInstance) -> Iterator[type]:
    """Yield the classes of a section and of those inside it, of all alternatives, and their bases."""
    yield from (cls for cls in type(section).__mro__ if dataclasses.is_dataclass(cls))
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), dependent(field)
        if isinstance(kind, Choice):
            for cls in kind.alternatives.values():
                yield from (base for base in cls.__mro__ if dataclasses.is_dataclass(base))
        elif isinstance(kind, OptionalSection):
            yield kind.section
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from classes_in(value)


def build(default: Section, given: Given, prefix: str = "") -> Section:
    """Return a section with the settings that were given; the others are those of `default`.

    Raises:
        ConfigError: a value outside its range, or a setting that does not apply.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        key, value = f"{prefix}{field.name}", getattr(default, field.name)
        kind = dependent(field)
        if kind is not None:
            values[field.name] = kind.build(value, given, key)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            values[field.name] = build(value, given, f"{key}.")
        else:
            values[field.name] = given.values.get(key, value)
    built = construct(type(default), values, prefix)
    unused = not_applicable(built)
    for name in unused.names:
        given.check_applies(f"{prefix}{name}", f"{prefix}{unused.switch}", unused.reason)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(default) if field.name in unused.names}
    return construct(type(default), values | defaults, prefix) if defaults else built


def construct(cls: type[Section], values: dict[str, Any], prefix: str) -> Section:
    """Return a section of these values; an error names the setting by its dotted key."""
    types = typing.get_type_hints(cls)
    for name, value in values.items():
        if value is None and type(None) not in typing.get_args(types[name]):
            raise ConfigError(f"{prefix}{name} must have a value, got null. Leave it out for its default.")
        check_number(value, f"{prefix}{name}")
        check_text(value, f"{prefix}{name}")
    try:
        return cls(**values)
    except ValueError as error:
        names = "|".join(field.name for field in dataclasses.fields(cls)) or "$"
        raise ConfigError(re.sub(rf"^([A-Z]\w*\.)?(?=({names})\b)", prefix, str(error))) from error


def check_number(value: object, key: str) -> None:
    """Raise ConfigError for a number that no setting takes: one that is not finite, or too large for an array."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}.")
    largest = LARGEST_SEED if key.endswith("seed") else LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
    if isinstance(value, int | float) and abs(value) > largest:
        shown = f"{largest:,}" if isinstance(largest, int) else f"{largest:g}"
        raise ConfigError(f"{key} must be at most {shown}, got {value:.3g}.")
    if isinstance(value, list | tuple):
        for item in value:
            check_number(item, key)


def check_text(value: object, key: str) -> None:
    """Raise ConfigError for a text that no file can hold, nor its name: one with NUL, or with bytes besides UTF-8."""
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(f"{key} must be text in UTF-8 without NUL characters, got {value!r:.80}.")
    if isinstance(value, list | tuple | dict):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            check_text(item, key)


def not_applicable(section: DataclassInstance) -> NotApplicable:
    """Return the settings of a section that have no effect, given the others."""
    found: NotApplicable = section.not_applicable() if hasattr(section, "not_applicable") else NotApplicable()
    return found


def tree_of(section: DataclassInstance) -> dict[str, Any]:
    """Return a section as nested mappings, without settings that do not apply: what a YAML file holds of it."""
    tree: dict[str, Any] = {}
    unused = not_applicable(section).names
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), dependent(field)
        if field.name in unused:
            continue
        if kind is not None:
            tree[field.name] = kind.tree(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            tree[field.name] = tree_of(value)
        else:
            tree[field.name] = list(value) if isinstance(value, tuple) else value
    return tree


def shallow(section: DataclassInstance) -> dict[str, Any]:
    """Return the values of a section's fields by name."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


@functools.cache
def attribute_docs(cls: type) -> dict[str, str]:
    """Return the first sentence on each attribute in the docstrings of a class and its bases."""
    import docstring_parser

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for param in docstring_parser.parse(
            inspect.cleandoc(base.__doc__ or ""), docstring_parser.DocstringStyle.GOOGLE
        ).params:
            text = " ".join((param.description or "").split())
            docs[param.arg_name] = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    return docs
