"""A user's own layout: the settings `data.columns` and `data.row_function`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from cotgrpo.data.layouts.columns import OWN_NAMES, dig, map_columns
from cotgrpo.data.own.loading import OwnCodeError, call, load_function, path_problem
from cotgrpo.data.sources import DataError


def columns_problem(columns: Mapping[str, str]) -> str:
    """Return what is wrong with the setting `columns`; empty if nothing is."""
    for ours, theirs in columns.items():
        if ours not in OWN_NAMES:
            near = difflib.get_close_matches(ours, OWN_NAMES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            return f"columns maps {ours!r}: expected one of {', '.join(OWN_NAMES)}.{hint}"
        if not theirs.strip():
            return f"columns.{ours} is empty: expected the name of a column."
    return ""


def row_function_problem(name: str) -> str:
    """Return what is wrong with the setting `row_function`; empty if nothing is."""
    return path_problem(name, "row_function")


class OwnLayout:
    """Applies `data.row_function` and then `data.columns` to rows, and remembers which columns were seen.

    Args:
        columns: our names of fields -> columns of the rows; a dot leads into an object.
        row_function: "package.module:function"; empty: none.

    Raises:
        DataError: an unknown field, or a function that cannot be loaded.
    """

    def __init__(self, columns: Mapping[str, str] | None, row_function: str) -> None:
        self.columns = dict(columns or {})
        problem = columns_problem(self.columns) or row_function_problem(row_function)
        if problem:
            raise DataError(f"data.{problem}")
        self.name = row_function
        self.function = load_function(row_function, "data.row_function", ("row",)) if row_function else None
        self.unseen = dict(self.columns)
        self.had: list[str] = []

    def apply(self, row: Mapping[str, object], place: str) -> Mapping[str, object] | None:
        """Return the row in a known layout, or None if the function leaves it out.

        Raises:
            DataError: the function failed, or returned something else.
        """
        if self.function is not None:
            made = call(self.function, self.name, "data.row_function", place, dict(row))
            if made is not None and not isinstance(made, Mapping):
                raise OwnCodeError(
                    f"{place}: data.row_function {self.name} must return a row (a dict) or None, got "
                    f"{type(made).__name__}."
                )
            if made is None:
                return None
            row = made
        if not self.columns:
            return row
        self.had = self.had or [str(name) for name in row]
        self.unseen = {ours: theirs for ours, theirs in self.unseen.items() if dig(row, theirs) is None}
        return map_columns(row, self.columns)

    def check_columns(self, optional: tuple[str, ...] = ()) -> None:
        """Raise DataError if no row had a column that the setting names, except for the optional fields."""
        missing = [(ours, theirs) for ours, theirs in self.unseen.items() if ours not in optional]
        if missing and self.had:
            (ours, theirs), has = missing[0], ", ".join(self.had)
            near = difflib.get_close_matches(theirs, self.had, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"data.columns.{ours}: no row has a column {theirs!r}; the first has {has}.{hint}")
