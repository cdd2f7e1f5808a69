"""Objects of a caller as files of the run: rows, a tokenizer, a model.

A run reads files, so that it can be resumed, compared with its inputs and exported later, by Python or the command
line. `RUN_DIR/given` keeps what came as an object.
"""

from __future__ import annotations

import datetime
import filecmp
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from cotgrpo.atomic_files import whole_file
from cotgrpo.checkpoints.run_lock import locked
from cotgrpo.config import ConfigError
from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.data.tokenizer import save_tokenizer
from cotgrpo.data.triples import Triple, row_of
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.huggingface.pinned import changed_parts, fingerprint
from cotgrpo.models.huggingface.weights import Pretrained, save_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = "given"
"""The folder of these files, in the run's."""
ROWS = {"data.train": "train.jsonl", "data.test": "test.jsonl", "grpo.ghosts.prompts": "prompts.jsonl"}
MODELS = {"student.path": "student", "grpo.ghosts.teacher": "teacher"}
TOKENIZERS = {"tokenizer.path": "tokenizer"}
"""Settings that may be objects, and the name of each in `GIVEN`."""


def place_of(key: str, value: object, run_dir: Path, prefix: str = "") -> Path | None:
    """Return where the object of a setting will be kept, or None if the value is a plain one."""
    name = None
    if key in ROWS and not is_names(value):
        name = ROWS[key]
    elif key in MODELS and isinstance(value, Pretrained):
        name = MODELS[key]
    elif key in TOKENIZERS and hasattr(value, "save_pretrained"):
        name = TOKENIZERS[key]
    return None if name is None else run_dir / GIVEN / f"{prefix}{name}"


def is_names(value: object) -> bool:
    """Return whether a value is names of files or data sets, and not rows."""
    names = [value] if isinstance(value, str | PurePath) else value
    return isinstance(names, list | tuple) and all(isinstance(name, str | PurePath) for name in names)


def keep(key: str, value: Any, place: Path, run_dir: Path) -> None:
    """Write the object of a setting. What is there already stays as it is if it is the same."""

    def write() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if key in ROWS:
            keep_rows(key, value, place, run_dir)
        else:
            keep_tokenizer(value, place)

    if key in MODELS:
        keep_model(key, value, place)
    else:
        on_process_0(write)


def keep_rows(key: str, rows: Any, place: Path, run_dir: Path) -> None:
    """Write rows as JSON lines. Rows that replace others need a run folder that nobody else uses."""
    fresh = place.with_name(f"{place.name}.new")
    with whole_file(fresh) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows_of(key, rows)):
            file.write(line_of(row, f"{key}: row {number}") + "\n")
    if place.is_file() and filecmp.cmp(fresh, place, shallow=False):
        fresh.unlink()
    elif place.is_file():
        with locked(run_dir):
            os.replace(fresh, place)
    else:
        os.replace(fresh, place)


def rows_of(key: str, rows: Any) -> Iterator[Mapping[str, Any]]:
    """Yield rows of a list, a data set, or a table of pandas or Polars.

    Raises:
        DataError: something else.
    """
    expected = f"{key}: expected rows (dicts, in a list, a datasets.Dataset or a data frame) or names of files"
    if isinstance(rows, Mapping):
        raise DataError(
            f"{expected}, got a {type(rows).__name__} with {', '.join(map(str, list(rows)[:5]))}. Choose one of its "
            "splits, as in data['train'], or make a list of rows."
        )
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    elif hasattr(rows, "to_dicts"):
        rows = rows.to_dicts()
    if not isinstance(rows, Iterable) or isinstance(rows, bytes):
        raise DataError(f"{expected}, got a {type(rows).__name__}.")
    for number, row in enumerate(rows):
        if isinstance(row, Triple):
            row = row_of(row)
        elif isinstance(row, Question):
            row = row.row
        if not isinstance(row, Mapping):
            raise DataError(f"{expected}, but row {number} is a {type(row).__name__}: {row!r:.80}.")
        yield row


def line_of(row: Mapping[str, Any], place: str) -> str:
    """Return a row as one line of JSON. Values that are missing in a data frame (NaN) are null."""
    return json.dumps(plain(row, place), ensure_ascii=False, allow_nan=False)


def plain(value: Any, place: str) -> Any:
    """Return a value that JSON can hold. Raises DataError if there is none."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(inner, f"{place}, {name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, place) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and math.isnan(value):
        return None
    if value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise DataError(f"{place}: expected text, numbers, lists and dicts, got {value!r:.80} ({type(value).__name__}).")


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Write a tokenizer."""
    save_tokenizer(tokenizer, place)


def keep_model(key: str, model: Pretrained, place: Path) -> None:
    """Write a model, unless it is there already.

    Raises:
        ConfigError: another model is there, which the run has started from.
    """
    fresh = place.with_name(f"{place.name}.new")
    on_process_0(lambda: shutil.rmtree(fresh, ignore_errors=True))
    on_process_0(lambda: place.parent.mkdir(parents=True, exist_ok=True))
    save_pretrained(fresh, model.config, model.params, source=model)

    def replace() -> None:
        if not place.is_dir():
            fresh.rename(place)
            return
        changed = changed_parts(fingerprint(open_folder(place)), fingerprint(open_folder(fresh)))
        shutil.rmtree(fresh)
        if changed:
            raise ConfigError(
                f"{key}: the model is not the one that this run was given before, which {place} keeps: it has other "
                f"{' and other '.join(changed)}. Give the same model, or choose another run_dir."
            )

    on_process_0(replace)
