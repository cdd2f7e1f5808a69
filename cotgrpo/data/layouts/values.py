"""Values of a row: texts, and what the report notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cotgrpo.data.layouts.columns import is_blank
from cotgrpo.data.sources import DataError

Note = tuple[str, str]
"""What is noted in the report of rows, and its place with details."""


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one blank."""
    return " ".join(text.split())


def parse_text(value: object, name: str, place: str, *, numbers: bool = False) -> str:
    """Return a value as stripped text, empty if it is missing.

    Raises:
        DataError: it is not text; with `numbers`, neither text nor a finite number.
    """
    if is_blank(value):
        return ""
    if numbers and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
        value = str(value)
    if not isinstance(value, str):
        inner = next(iter(value), "0") if isinstance(value, Mapping) else 0
        nested = isinstance(value, Mapping | Sequence)
        hint = f", or name a value in it with data.columns, such as {name}.{inner}." if nested else "."
        raise DataError(
            f"{place}: field {name!r} must be text, got {type(value).__name__} {value!r:.40}. Make it a string{hint}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: field {name!r} holds half a surrogate pair. Remove it.") from None
    return value.strip()


def empty(name: str) -> str:
    """Return the complaint about an empty column."""
    return f"field {name!r} is empty. Fill it in or remove the row."
