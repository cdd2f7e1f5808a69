"""Record the inputs of a stage, and compare them with what was recorded before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cotgrpo.config import Config
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.identity.changes import Changes, part_changes, version_text
from cotgrpo.identity.fingerprints import start_fingerprint, student_fingerprint, tokenizer_fingerprint, versions
from cotgrpo.identity.known import Known, save_split
from cotgrpo.identity.record import InputsRecord, RowsRecord
from cotgrpo.identity.rows import StageRows
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_record(
    config: Config,
    known: Known,
    rows: StageRows,
    tokenizer: PreTrainedTokenizerBase,
    decoder: DecoderConfig,
    source: ModelFolder | None,
    origin: Path | None,
) -> InputsRecord:
    """Return the record of a stage's inputs. Process 0 reads a pretrained student's weights for it.

    Args:
        config: the settings.
        known: earlier records.
        rows: the stage's rows.
        tokenizer, decoder, source: the student's; `source` is None for one from scratch.
        origin: the folder of the stage that it starts from, or None.
    """
    student, start = on_process_0(
        lambda: [student_fingerprint(config, decoder, source), start_fingerprint(origin, config)]
    )
    before = [] if known.recorded is None else [known.recorded.trained]
    split = rows.held_out.split
    return InputsRecord(
        train=rows.train_record,
        held_out=rows.test_record,
        trained=np.unique(np.concatenate([rows.train_record.questions, *before])),
        tokenizer=tokenizer_fingerprint(tokenizer),
        student=student,
        start=start,
        versions=versions(),
        split=None if split is None else split.to_dict(),
        streamed=rows.stream is not None,
    )


def check_inputs(config: Config, known: Known, rows: StageRows, record: InputsRecord) -> list[str]:
    """Compare the inputs of a stage that trains with the record. Return what to tell the user.

    Raises:
        ConfigError: they have changed in a way that `allow_changed` does not name.
    """
    changes, before = dict(rows.changes), known.recorded
    if before is not None:
        changes |= part_changes(before, record, resumes=known.own is not None)
        if problem := trained_before(rows.test_record, before):
            changes["held_out"] = "; ".join(filter(None, (changes.get("held_out"), problem)))
    if known.conflict is not None and not config.data.test:
        problem = f"{known.conflict} holds other questions out than {known.place}, which this run uses"
        changes["held_out"] = "; ".join(filter(None, (changes.get("held_out"), problem)))
    return told(config, known, rows.notes, changes, record)


def check_measured(config: Config, known: Known, rows: StageRows, record: InputsRecord) -> list[str]:
    """Compare the inputs of a measurement with the record of the student. Return what to tell the user.

    Changed training rows, and held-out rows that the user names, are only told.

    Raises:
        ConfigError: other inputs have changed in a way that `allow_changed` does not name.
    """
    changes, notes, before = dict(rows.changes), list(rows.notes), known.recorded
    if before is not None:
        changes |= part_changes(before, record, resumes=True)
        if text := changes.pop("data", None):
            notes.append(f"{text} since {known.recorded_folder} was trained: they are not measured")
        if problem := trained_before(rows.test_record, before):
            notes.append(problem)
        if before.held_out.settings != rows.test_record.settings:
            notes.append(f"these are not the held-out rows of {known.recorded_folder}")
    return told(config, known, notes, changes, record)


def told(
    config: Config, known: Known, notes: Sequence[str], changes: dict[str, str], record: InputsRecord
) -> list[str]:
    """Return the notes, and what to say of changes that are allowed. Raise ConfigError for others."""
    if "student" in changes and config.student.path is not None:
        changes = {**changes, "student": f"{changes['student']} (student.path {config.student.path})"}
    allowed = Changes(changes, known.recorded_folder, known.own is not None).check(config.allowed_changes)
    other = None if known.recorded is None else version_text(known.recorded.versions, record.versions)
    return [*notes, *allowed, *([other] if other else [])]


def trained_before(test: RowsRecord, before: InputsRecord) -> str | None:
    """Return a sentence on held-out questions that a stage was trained on, or None."""
    known = np.flatnonzero(np.isin(test.questions, before.trained))
    if not len(known):
        return None
    return f"{len(known):,} of {len(test):,} held-out questions were trained on (first: {test.place(int(known[0]))})"


def save_inputs(record: InputsRecord, rows: StageRows, folder: Path) -> None:
    """Write the split of the run, and then the record of the stage in this folder. Process 0 calls it."""
    if rows.held_out.split is not None:
        save_split(rows.held_out.split, folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
