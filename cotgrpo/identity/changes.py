"""What differs between the inputs of a stage and an earlier record of them, as sentences, and what of it is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cotgrpo.config import ConfigError
from cotgrpo.identity.record import InputsRecord, RowsRecord
from cotgrpo.models.huggingface.pinned import changed_parts


@dataclasses.dataclass(frozen=True)
class RowChanges:
    """How rows differ from those of a record.

    Attributes:
        edited: places of rows, now, whose place or question a row with other values had.
        removed: places, then, of rows that are not there any more.
        added: places of further rows that are new.
    """

    edited: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether a row of the record is not there any more."""
        return bool(self.edited or self.removed)

    def __str__(self) -> str:
        kinds = (
            ("edited", "first: ", self.edited),
            ("removed", "first was ", self.removed),
            ("new", "first: ", self.added),
        )
        return ", ".join(f"{len(places):,} {kind} ({first}{places[0]})" for kind, first, places in kinds if places)


def row_changes(before: RowsRecord, now: RowsRecord, there: np.ndarray) -> RowChanges:
    """Return how rows differ from those of a record.

    Args:
        before: the record.
        now: the rows that could be used now.
        there: `[n]` hashes of all rows that are there, used or not.
    """
    missing = np.flatnonzero(~np.isin(before.hashes, there)).tolist()
    new = np.flatnonzero(~np.isin(now.hashes, before.hashes)).tolist()
    new_places = {now.place(row): row for row in new}
    new_questions = {int(now.questions[row]): row for row in new if len(now.questions)}
    edited: dict[int, str] = {}
    removed = []
    for row in missing:
        place, question = before.place(row), int(before.questions[row]) if len(before.questions) else None
        found = new_questions.get(question, new_places.get(place)) if question is not None else new_places.get(place)
        if found is None or found in edited:
            removed.append(place)
        else:
            edited[found] = now.place(found)
    added = tuple(now.place(row) for row in new if row not in edited)
    return RowChanges(tuple(edited.values()), tuple(removed), added)


@dataclasses.dataclass(frozen=True)
class Changes:
    """Changed inputs.

    Attributes:
        by_kind: a sentence on each kind that changed: data, held_out, tokenizer, student.
        folder: the stage whose record they were compared with.
        resumes: whether that stage goes on; else the next one begins.
    """

    by_kind: Mapping[str, str]
    folder: Path
    resumes: bool

    def check(self, allowed: frozenset[str]) -> list[str]:
        """Return what to say of changes that are allowed.

        Raises:
            ConfigError: others.
        """
        refused = [kind for kind in self.by_kind if kind not in allowed]
        if refused:
            since = "began" if self.resumes else "was trained"
            raise ConfigError(
                f"Inputs have changed since {self.folder} {since}: "
                f"{'; '.join(self.by_kind[kind] for kind in refused)}. Restore what they were, or choose another "
                f"run_dir, or go on with --allow_changed {','.join(refused)}."
            )
        return [f"allowed: {text} since {self.folder} (allow_changed {kind})" for kind, text in self.by_kind.items()]


def part_changes(before: InputsRecord, now: InputsRecord, resumes: bool) -> dict[str, str]:
    """Return a sentence on the tokenizer and on the student, if they have changed."""
    found = {}
    if parts := changed_parts(before.tokenizer, now.tokenizer):
        found["tokenizer"] = f"the tokenizer has another {' and other '.join(parts)}"
    # The seed and the shape of a student from scratch are in its weights. A later stage reads those.
    parts = changed_parts(before.student, now.student) if resumes or "weights" in before.student else []
    if resumes:
        parts += [f"start ({part})" for part in changed_parts(before.start, now.start)]
    if parts:
        found["student"] = f"the student has other {' and '.join(parts)}"
    return found


def version_text(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a sentence on packages of other versions, or None."""
    other = [f"{name} {before[name]} then, {now[name]} now" for name in changed_parts(before, now)]
    return f"other package versions: {'; '.join(other)}" if other else None
