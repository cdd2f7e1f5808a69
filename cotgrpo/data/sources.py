"""Raw rows of files, folders and hub data sets, each with its place."""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import logging
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*FORMATS, *(f"{kind}{packed}" for kind in FORMATS[:-1] for packed in COMPRESSIONS))
"""Ends of the names of files that can be read."""
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Split -> the words for it in names of files and folders."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""JSON files of a folder that hold no rows."""
BLOCK = 1 << 20
"""Characters that are read at a time of a JSON array."""
LONGEST_CELL = 2**31 - 1
"""Characters of a cell of a CSV file."""
ARRAY_START, BETWEEN_ITEMS, ITEM_ENDS = re.compile(r"\s*\[\s*"), re.compile(r"[\s,]*"), re.compile(r"\s*[],]")


HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?(?:@([\w./-]+))?")
"""Owner and name of a data set, and maybe a configuration and a revision."""


class DataError(ValueError):
    """Data that cannot be used; the message names the place, what was expected and the fix."""


def as_list(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return one or several sources as a list. Raises DataError for an empty one."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise DataError("No data: expected at least one file or hub id.")
    return names


def raw_rows(names: Sequence[str | Path], split: str | None, folder_split: str = "train") -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", row) for every row; for a line that is not JSON, the `DataError` in place of the row.

    Args:
        names: files of `FORMATS`, maybe compressed; folders; patterns such as `data/*.jsonl`; or hub ids.
        split: of a folder whose files name splits, of a JSON object of splits, and of a hub id; None: "train".
        folder_split: split of such a folder or object if `split` is None.

    Raises:
        DataError: a file that is missing, empty or cut off, or that cannot be read.
    """
    for name in names:
        for path in files_of(name, split or folder_split if Path(name).is_dir() else split):
            if isinstance(path, Path):
                yield from file_rows(path, split or folder_split)
            else:
                yield from hub_rows(path, split or "train")


def files_of(name: str | Path, split: str | None) -> list[Path | str]:
    """Return the files that a source names, sorted, or its name if that is a hub id.

    Raises:
        DataError: a file that is missing, or a folder or pattern without a data file.
    """
    path = Path(name)
    if path.is_dir():
        return [*of_split(files_in(path), path, split)]
    if path.is_file():
        return [path]
    if glob.has_magic(str(name)):
        found = sorted(Path(match) for match in glob.glob(str(name), recursive=True))
        inside = [file for file in found if file.is_file() and is_data(file)]
        inside += [file for folder in found if folder.is_dir() and "**" not in str(name) for file in files_in(folder)]
        if not inside:
            raise DataError(f"{name}: no file matches this pattern with a name that ends in {', '.join(FORMATS)}.")
        return [*inside]
    if path.name.endswith(SUFFIXES) or not HUB_ID.fullmatch(str(name)):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " Check the path."
        raise DataError(f"{path}: no such file.{hint}")
    return [str(name)]


def is_data(path: Path) -> bool:
    """Return whether a file in a folder can hold rows, by its name."""
    return path.name.lower().endswith(SUFFIXES) and path.name not in NO_ROWS and not path.name.startswith((".", "_"))


def files_in(folder: Path) -> list[Path]:
    """Return the data files in a folder and those below it, sorted. Raises DataError if it has none."""
    below = (path for path in sorted(folder.rglob("*")) if path.is_file() and is_data(path))
    found = [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        arrow = any(folder.rglob("*.arrow"))
        hint = " Save its data set with to_parquet or to_json." if arrow else ""
        raise DataError(f"{folder}: this folder has no file that ends in {', '.join(FORMATS)}.{hint}")
    return found


def of_split(files: list[Path], folder: Path, split: str | None) -> list[Path]:
    """Return the files of a split, as `datasets` finds them by the words in their names; all, if none names a split.

    Raises:
        DataError: the names have other splits only.
    """
    splits = {path: split_in(path.relative_to(folder)) for path in files}
    known = sorted({found for found in splits.values() if found})
    if not known:
        return files
    wanted = next((name for name, words in SPLITS.items() if split in words), split or "train")
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen:
        raise DataError(
            f"{folder}: expected files of the split {wanted!r}, but by their names they are of {', '.join(known)}. "
            "Set the split, or name the files."
        )
    return chosen


def split_in(path: Path) -> str:
    """Return the split that a file's name or else its folders name, or an empty text."""
    for part in (path.name, *reversed(path.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        found = [split for split, names in SPLITS.items() if not words.isdisjoint(names)]
        if found:
            return found[0]
    return ""


def file_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one file as `raw_rows` does."""
    name = path.name.lower()
    packed = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    kind = Path(name.removesuffix(packed)).suffix
    if kind not in FORMATS or (packed and kind == ".parquet"):
        raise DataError(
            f"{path}: unknown kind of file {Path(name).suffix!r}: expected {', '.join(FORMATS)}, or one of them with "
            f"{', '.join(COMPRESSIONS)} (not .parquet). Convert it, or rename it."
        )
    if kind == ".parquet":
        # [ and * in its name are not a pattern.
        files = glob.escape(str(path))
        yield from numbered(str(path), load_dataset(path, "parquet", data_files=files, split="train"))
        return
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: expected rows. Remove it.")
    read: Callable[[Path], Iterator[tuple[str, Any]]] = jsonl_rows
    if kind == ".json":
        read = lambda path: json_rows(path, split)
    elif kind in (".csv", ".tsv"):
        read = lambda path: csv_rows(path, "\t" if kind == ".tsv" else None)
    try:
        yield from read(path)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        broken = f"{path} cannot be read ({type(error).__name__}: {error}). "
        raise DataError(broken + ("Is it complete, and compressed as it says?" if packed else "Check it.")) from error
    except UnicodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Save the file as UTF-8.{guess_encoding(error)}") from error


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    return lzma.open(path) if suffix == ".xz" else open(path, "rb")


def encoding_of(path: Path) -> str:
    """Return "utf-16" or "utf-32" for a file that begins with that byte order mark, else "utf-8-sig"."""
    with open_bytes(path) as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def open_text(path: Path, newline: str | None = "") -> io.TextIOWrapper:
    """Open a file as text, decompressed."""
    return io.TextIOWrapper(cast(BinaryIO, open_bytes(path)), encoding=encoding_of(path), newline=newline)


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a JSONL file as in `raw_rows`; blank lines are skipped."""
    for number, line in enumerate(byte_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", parse_json_line(line.rstrip(), f"{path}:{number}")


def byte_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file in UTF-8, without a byte order mark."""
    if encoding_of(path) != "utf-8-sig":
        with open_text(path, "\n") as text:
            yield from (line.encode("utf-8") for line in text)
        return
    with open_bytes(path) as file:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def parse_json_line(line: bytes, place: str) -> Any:
    """Return the JSON value in a line, or a `DataError`."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
        return DataError(f"{place}: not UTF-8 ({byte}). Save the file as UTF-8.{guess_encoding(error)}")
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets as deep
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(f"{place}: not valid JSON ({detail}). Expected one JSON object a line; fix or remove it.")


def guess_encoding(error: UnicodeError) -> str:
    """Return how to convert a text that is GB18030 and not UTF-8, or an empty text."""
    text = bytes(error.object) if isinstance(error, UnicodeDecodeError) else b""
    around = text[:4096].rpartition(b"\n")[0] if len(text) > 4096 else text
    try:
        decoded = around.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    foreign = [char for char in decoded if ord(char) > 127]
    wide = [char for char in foreign if unicodedata.east_asian_width(char) in "WF"]
    if not foreign or len(wide) < 0.8 * len(foreign):
        return ""
    return f" It may be GB18030 ({''.join(wide[:8])}): iconv -f GB18030 -t UTF-8 converts it."


def json_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a `.json` file: an array of rows, an object a line, or one object around a list of rows."""
    with open_text(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start == "[":
        yield from array_rows(path)
        return
    lines = (line for line in byte_lines(path) if line.strip())
    first, second = next(lines, b"{}"), next(lines, None)
    alone = parse_json_line(first, str(path))
    if second is not None and not isinstance(alone, DataError):
        yield from jsonl_rows(path)
        return
    with open_text(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield from jsonl_rows(path)  # names the line
        return
    rows = rows_in(value, path, split)
    if rows is None:
        yield f"{path}:1", value
    else:
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


def rows_in(value: object, path: Path, split: str | None) -> list[Any] | None:
    """Return the list of rows in an object such as {"data": [...]}; None if the object is a row.

    Raises:
        DataError: it has several lists, and none is that of the split.
    """
    if not isinstance(value, dict):
        return None
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    lists = {key: rows for key, rows in lists.items() if not {"role", "from"} & rows[0].keys()}  # a chat
    if len(lists) < 2:
        return next(iter(lists.values()), None)
    wanted = SPLITS.get(split or "train", (split,))
    chosen = [rows for key, rows in lists.items() if key.lower() in wanted]
    if not chosen:
        raise DataError(
            f"{path}: expected one list of rows, or one of the split {split or 'train'!r}, got {', '.join(lists)}."
        )
    return chosen[0]


def array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON array, each with the line where it begins. A block and an item are in memory."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        text, line, size = file.read(BLOCK), 1, BLOCK
        while text.isspace():
            line, text = line + text.count("\n"), file.read(BLOCK)
        position, gap = 0, ARRAY_START
        while True:
            match = gap.match(text, position)
            after = position if match is None else match.end()
            line += text.count("\n", position, after)
            position, gap = after, BETWEEN_ITEMS
            if text[position : position + 1] == "]":
                break
            try:
                item, end = decoder.raw_decode(text, position)
                # A number may go on in the next block.
                ended = isinstance(item, dict | list | str) or ITEM_ENDS.match(text, end) is not None
            except (ValueError, RecursionError) as error:
                item, end, ended = error, position, isinstance(error, RecursionError)
            if not ended:
                more = file.read(size)
                if more:
                    text, position, size = text[position:] + more, 0, 2 * size  # a long item is parsed only a few times
                    continue
            if isinstance(item, Exception) or not ended:
                raise DataError(f"{path}:{line}: {broken_item(item, text, position)}")
            yield f"{path}:{line}", item
            line += text.count("\n", position, end)
            position, size = end, BLOCK
        if (text[position + 1 :] + file.read(BLOCK)).strip():
            raise DataError(f"{path}:{line}: not valid JSON: there is more after the end of the array. Remove it.")


def broken_item(error: object, text: str, position: int) -> str:
    """Return what is wrong with an item of an array."""
    if not text[position:].strip():
        return "the array never ends. Is the file complete?"
    detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return f"not valid JSON ({detail}) in the array item that begins here. Is the file complete?"


def csv_rows(path: Path, delimiter: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file with a header, each with the line where it begins. Empty cells are None.

    Args:
        path: the file.
        delimiter: None: the one of `,`, `;` and tab that the header has most of.
    """
    csv.field_size_limit(LONGEST_CELL)
    if delimiter is None:
        with open_text(path) as file:
            header = file.readline()
        delimiter = max(",;\t", key=header.count)
    with open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: two columns of the header have one name: {', '.join(names)}. Rename one.")
            line = reader.line_num + 1
            for cells in reader:
                place, line = f"{path}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(names):
                    yield place, DataError(f"{place}: expected {len(names)} cells, got {len(cells)}. Quote the cells.")
                    continue
                yield place, {name: cell_value(name, cell) for name, cell in zip(names, cells, strict=True)}
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}). Is the file complete?") from error


def cell_value(name: str, cell: str) -> str | bool | None:
    """Return the value of a cell: None if it is empty; a flag such as `correct` as a truth value."""
    if not cell:
        return None
    if name.strip().lower() in ("correct", "is_correct") and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    return cell


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of "org/name:config@revision", or another name that `datasets.load_dataset` takes.

    The configuration and the revision (a branch, tag or commit) may be left out.
    """
    found = HUB_ID.fullmatch(name)
    hub_id, config, revision = found.groups() if found else (name, None, None)
    about = f"{name} is not a file, and as a data set"
    yield from numbered(name, load_dataset(about, hub_id, config, split=split, revision=revision))


def load_dataset(name: str | Path, *args: str | None, **kwargs: str | None) -> Iterable[Any]:
    """Call `datasets.load_dataset`, streamed, without a cache. A failure becomes a `DataError` about `name`."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL + 1)  # it prints what it raises as well
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
