"""Load what "package.module:name" names, and call it so that an error names it, the row, and the line of code."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from cotgrpo.data.sources import DataError

PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STANDARD = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})
GIVEN: dict[str, object] = {}
"""Objects of this process that have no path of their own, by the path that `path_of` made up for them."""
LONGEST_ERROR = 300
"""Characters of an error of the user's code that a message shows."""


class OwnCodeError(DataError):
    """Raised if code of the user's own cannot be loaded, fails, or returns something that cannot be used."""


def path_problem(name: str, setting: str) -> str:
    """Return what is wrong with the form of a Python path; empty if nothing is, or if there is none."""
    module, colon, function = name.partition(":")
    if name and not (colon and module.strip() and function.strip()):
        return f"{setting} must be package.module:function, got {name!r}."
    return ""


def path_of(given: object) -> str:
    """Return a path that `load_object` finds an object by, for settings: its own, if it has one, else one made up.

    An object without a path of its own, such as a lambda, is found in this process only.
    """
    name = given if isinstance(given, str) else name_of(given)
    if isinstance(given, str) or (hasattr(given, "__qualname__") and resolved(name) is given):
        return name
    for path, known in GIVEN.items():
        if known is given:
            return path
    made = f"{name}_{sum(path.startswith(name) for path in GIVEN)}"
    GIVEN[made] = given
    return made


def resolved(name: str) -> object:
    """Return what a path names among the modules that are imported, or None."""
    module, _, attribute = name.partition(":")
    found: object = sys.modules.get(module)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return found


def load_object(name: str, setting: str) -> object:
    """Return what "package.module:name" names. Modules of the working directory count.

    Raises:
        OwnCodeError: the module cannot be imported, or has no such name.
    """
    if problem := path_problem(name, setting):
        raise OwnCodeError(problem)
    if name in GIVEN:
        return GIVEN[name]
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found: object = importlib.import_module(module.strip())
        for part in attribute.strip().split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise OwnCodeError(
            f"{setting}: {name} cannot be loaded {describe(error)}. Expected a module that Python finds from here, "
            "and a function in it."
        ) from error
    return found


def load_function(name: str, setting: str, arguments: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return the function "package.module:function".

    Args:
        name: its path.
        setting: the setting that names it, for errors.
        arguments: names of what it is called with; empty: its signature is not checked.

    Raises:
        OwnCodeError: it cannot be loaded, is not a function, or takes other arguments.
    """
    found = load_object(name, setting)
    if not callable(found):
        raise OwnCodeError(f"{setting}: {name} must be a function, got a {type(found).__name__}.")
    if arguments:
        check_signature(found, name, setting, arguments)
    return found


def check_signature(function: Callable[..., Any], name: str, setting: str, arguments: tuple[str, ...]) -> None:
    """Raise OwnCodeError unless a function can be called with as many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=signature.empty)
        raise OwnCodeError(
            f"{setting}: {name} must take ({', '.join(arguments)}), got a function of {signature}."
        ) from None


def name_of(given: object) -> str:
    """Return the Python path of an object, or of its type, for messages."""
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{getattr(named, '__module__', '?')}:{getattr(named, '__qualname__', '?')}"


def call(function: Callable[..., Any], name: str, setting: str, place: str, *arguments: Any) -> Any:
    """Return what a function of the user's own returns.

    Args:
        function: what is called.
        name: its path.
        setting: the setting that names it.
        place: the row, or what else the call is about.
        *arguments: of the call.

    Raises:
        OwnCodeError: the function failed.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise OwnCodeError(f"{place}: {setting} {name} failed {describe(error)}. Fix it.") from error


def describe(error: BaseException) -> str:
    """Return an error in one line: "(TYPE: TEXT) at FILE:LINE", the newest line of the user's code that led to it."""
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text[:LONGEST_ERROR]}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"({shown}) at {error.filename}:{error.lineno}"
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith(("<", PACKAGE + os.sep))]
    installed = [frame for frame in frames if frame.filename.startswith(LIBRARIES) or "site-packages" in frame.filename]
    own = [f for f in frames if f not in installed and not f.filename.startswith(STANDARD)] or installed
    return f"({shown}) at {own[-1].filename}:{own[-1].lineno}" if own else f"({shown})"
