"""Correct ghosts by hand: write the student's replies and the ghosts into a file to edit, and read it back.

With --student and --ghosts, the command writes both side by side to --out, one question a line. Edit rationale and
answer there, or empty both to drop the row. With --edited, it writes the edited rows to --out as triples to train on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cotgrpo.atomic_files import whole_file
from cotgrpo.config import ConfigError
from cotgrpo.config.files import Options
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import read_triples, write_triples
from cotgrpo.teachers.editing import holds_triples, read_edited, read_student_replies, write_pairs
from cotgrpo.terminal import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the files, and which rows to write."""
    add = parser.add_argument
    add(
        "--student",
        type=str,
        metavar="FILE",
        help="eval.json of `cotgrpo eval`, or replies.jsonl of `cotgrpo generate`",
    )
    add(
        "--ghosts",
        type=str,
        metavar="TRIPLES",
        help="the teacher's triples for the same questions: files of rows, as data.train",
    )
    add(
        "--columns",
        type=dict[str, str],
        default={},
        metavar="{FIELD: COLUMN,...}",
        help="columns of --ghosts under other names, as data.columns of a run",
    )
    add("--row_function", type=str, default="", metavar="MODULE:FUNCTION", help="as data.row_function of a run")
    add("--edited", type=str, metavar="FILE", help="the file that was edited")
    add("--out", type=str, metavar="FILE", help="a new file")
    add(
        "--rows",
        type=Literal["all", "wrong", "edited"],
        default="all",
        metavar="{all,wrong,edited}",
        help="wrong: only those with a wrong answer of the student; edited: only those changed by hand (default: all)",
    )


def run(options: Options, console: Console) -> None:
    """Write the file to edit, or the triples."""
    given = options.values
    student, ghosts, edited, out, rows = given.student, given.ghosts, given.edited, given.out, given.rows
    if out is None or (edited is None) == (student is None) or (student is None) != (ghosts is None):
        raise ConfigError("gold needs --student, --ghosts and --out, or --edited and --out. See cotgrpo gold --help.")
    choices = ("all", "wrong") if edited is None else ("all", "edited")
    if rows not in choices:
        raise ConfigError(f"--rows must be {' or '.join(choices)}, got {rows!r}.")
    if edited is not None:
        if Path(out).exists() and not holds_triples(Path(out)):
            raise DataError(f"{out} exists and may hold edits. Choose another --out, or remove it.")
        triples, report = read_edited(Path(edited), rows=rows)
        with whole_file(Path(out)) as temporary:
            write_triples(temporary, triples)
    else:
        replies = read_student_replies(Path(student))
        triples, read = read_triples(ghosts, columns=given.columns, row_function=given.row_function)
        say(console, f"ghosts: {read}")
        report = write_pairs(Path(out), triples, replies, rows=rows)
    say(console, f"{report}\nwritten: {out}")
