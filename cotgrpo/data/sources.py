"""Raw rows of JSONL and Parquet files and hub data sets, each with its place."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet")


class DataError(ValueError):
    """Data that cannot be used; the message names the place, what was expected and the fix."""


def as_list(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one or several sources as a list. Raises DataError for an empty one."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise DataError("No data: expected at least one file or hub id.")
    return names


def raw_rows(names: Sequence[str | Path], split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", row) for every row; for a line that is not JSON, the `DataError` in place of the row."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)[:5])
            raise DataError(
                f"{path} is a directory: expected .jsonl or .parquet files, or a hub id. "
                f"Name the files in it ({inside or 'it has none'})."
            )
        if path.is_file():
            if path.suffix in (".jsonl", ".json"):
                yield from jsonl_rows(path)
            elif path.suffix == ".parquet":
                # [ and * in its name are not a pattern.
                files = glob.escape(str(path))
                yield from numbered(str(path), load_dataset(path, "parquet", data_files=files, split="train"))
            else:
                raise DataError(
                    f"{path}: unknown kind of file {path.suffix!r}: expected .jsonl or .parquet; convert it."
                )
        elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(name)):
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " Check the path."
            raise DataError(f"{path}: no such file.{hint}")
        else:
            yield from hub_rows(str(name), split or "train")


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of "org/name", "org/name:config", or another name that `datasets.load_dataset` takes."""
    hub_id, _, config = name.partition(":")
    yield from numbered(
        name, load_dataset(f"{name} is not a file, and as a data set", hub_id, config or None, split=split)
    )


def load_dataset(name: str | Path, *args: str | None, **kwargs: str) -> Iterable[Any]:
    """Call `datasets.load_dataset`, streamed, without a cache. A failure becomes a `DataError` about `name`."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:  # the library raises many kinds: network, file system, arrow, its own
        raise DataError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}). Check the name and the format."
        ) from error


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ("name:row number", row), counted from 1; an exception of the reader becomes a `DataError`."""
    iterator = iter(rows)
    for number in range(1, 2**63):
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"{name}:{number}: cannot be read ({type(error).__name__}: {error}). Is the file complete?"
            ) from error
        yield f"{name}:{number}", row


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a JSONL file as in `raw_rows`; blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:  # a byte order mark
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield f"{path}:{number}", parse_json_line(line.rstrip(), f"{path}:{number}")


def parse_json_line(line: bytes, place: str) -> Any:
    """Return the JSON value in a line, or a `DataError`."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
        return DataError(f"{place}: not UTF-8 ({byte}). Save the file as UTF-8.")
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets as deep
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(f"{place}: not valid JSON ({detail}). Expected one JSON object a line; fix or remove it.")
