"""The record of a stage's inputs, in its folder: `inputs.json`, and the hashes of its rows in `inputs.npz`."""

from __future__ import annotations

import base64
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cotgrpo.atomic_files import find_json_object, whole_file, write_json
from cotgrpo.data.questions import Question, question_text
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.identity.fingerprints import array_hash
from cotgrpo.identity.split import text_hash

FILE, ARRAYS = "inputs.json", "inputs.npz"
NO_ROWS = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class RowsRecord:
    """Rows in the order in which a stage uses them.

    Attributes:
        settings: what decides which rows these are. Only rows of the same settings are compared.
        names: files and data sets.
        hashes: `[rows]` uint64, of everything in the row.
        questions: `[rows]` uint64, `text_hash` of its question; empty if the rows are streamed.
        files, lines: `[rows]` uint32, number of its file, and line from 1.
    """

    settings: dict[str, Any]
    names: tuple[str, ...] = ()
    hashes: np.ndarray = dataclasses.field(default_factory=lambda: NO_ROWS)
    questions: np.ndarray = dataclasses.field(default_factory=lambda: NO_ROWS)
    files: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint32))
    lines: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint32))

    @classmethod
    def of(
        cls, settings: dict[str, Any], hashes: Iterable[int], questions: Iterable[int], places: Sequence[str]
    ) -> RowsRecord:
        """Return the record of rows at these places, "file:line"."""
        split = [place.rpartition(":") for place in places]
        names = {name: number for number, name in enumerate(dict.fromkeys(name for name, _, _ in split))}
        return cls(
            settings,
            tuple(names),
            np.fromiter(hashes, np.uint64),
            np.fromiter(questions, np.uint64),
            np.array([names[name] for name, _, _ in split], np.uint32),
            np.array([int(line) if line.isdigit() else 0 for _, _, line in split], np.uint32),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def place(self, row: int) -> str:
        """Return the place of a row, "file:line"."""
        return f"{self.names[self.files[row]]}:{self.lines[row]}"

    def described(self) -> dict[str, Any]:
        """Return all but the arrays, and their hash."""
        return {
            "settings": self.settings,
            "rows": len(self),
            "digest": array_hash(self.hashes),
            "names": list(self.names),
        }

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays with their names in the file."""
        return {f"{prefix}_{name}": getattr(self, name) for name in ("hashes", "questions", "files", "lines")}

    @classmethod
    def read(cls, described: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str) -> RowsRecord:
        """Return the rows that were described. Raises ValueError if the arrays are others."""
        own = {name: arrays[f"{prefix}_{name}"] for name in ("hashes", "questions", "files", "lines")}
        if array_hash(own["hashes"]) != described["digest"] or len(own["files"]) != described["rows"]:
            raise ValueError("the hashes are those of other rows")
        return cls(dict(described["settings"]), tuple(described["names"]), **own)


@dataclasses.dataclass(frozen=True)
class InputsRecord:
    """The inputs of a stage.

    Attributes:
        train: its training rows; of a stream, all rows, with those that are held out.
        held_out: its held-out rows.
        trained: `[n]` uint64, sorted, `text_hash` of the questions that this stage and those before it are trained on.
        tokenizer, student, start: fingerprints, of parts by name.
        versions: of packages.
        split: the held-out split, as `HeldOutSplit.to_dict` returns it; None if data.test names the rows.
        streamed: whether the training rows are streamed.
    """

    train: RowsRecord
    held_out: RowsRecord
    trained: np.ndarray
    tokenizer: dict[str, str]
    student: dict[str, str]
    start: dict[str, str]
    versions: dict[str, str]
    split: dict[str, Any] | None
    streamed: bool = False

    def with_trained(self, questions: Iterable[Question]) -> InputsRecord:
        """Return the record of a stage that is trained on these questions too."""
        more = np.fromiter((text_hash(question_text(question)) for question in questions), np.uint64)
        return dataclasses.replace(self, trained=np.union1d(self.trained, more))

    def save(self, folder: Path) -> None:
        """Write the record. A reader finds it whole, or none."""
        arrays: dict[str, Any] = self.train.arrays("train") | self.held_out.arrays("held_out")
        with whole_file(folder / ARRAYS) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, trained=self.trained, **arrays)
        parts = ("tokenizer", "student", "start", "versions", "split", "streamed")
        rows = {"train": self.train.described(), "held_out": self.held_out.described()}
        write_json(folder / FILE, rows | {name: getattr(self, name) for name in parts})

    @classmethod
    def load(cls, folder: Path) -> InputsRecord | None:
        """Return the record in a folder, or None if there is none that can be read. Every process gets it."""
        found = on_process_0(lambda: find_parts(folder))
        return None if found is None else cls.build(found[0], base64.b64decode(found[1]))

    @classmethod
    def build(cls, values: dict[str, Any], arrays: bytes) -> InputsRecord:
        """Return the record of these files' contents.

        Raises:
            ValueError: they do not belong together, or are no record.
        """
        try:
            with np.load(io.BytesIO(arrays), allow_pickle=False) as opened:
                found = dict(opened)
            parts = ("tokenizer", "student", "start", "versions")
            return cls(
                train=RowsRecord.read(values["train"], found, "train"),
                held_out=RowsRecord.read(values["held_out"], found, "held_out"),
                trained=found["trained"],
                **{name: dict(values[name]) for name in parts},
                split=values["split"],
                streamed=bool(values["streamed"]),
            )
        except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not a record of inputs: {error!r}") from error


def find_parts(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Return the JSON of a record and its arrays as base64 text; None if they are missing or damaged."""
    values = find_json_object(folder / FILE)
    try:
        arrays = (folder / ARRAYS).read_bytes()
        InputsRecord.build(values or {}, arrays)
    except (OSError, ValueError):
        return None
    assert values is not None
    return values, base64.b64encode(arrays).decode()
