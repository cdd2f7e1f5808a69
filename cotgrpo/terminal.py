"""Text for a terminal: every line that is printed passes through here.

Paths, rows and texts of servers may hold the terminal's control sequences, rich's markup and marks that reverse the
direction of writing. They are printed as what they are.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible, and the direction of writing
    "\ud800-\udfff\U000e0000-\U000e007f]"  # surrogates, and invisible tags
)

NARROWEST = 40
"""Lines are not wrapped on a terminal of fewer columns."""


def clean(text: str) -> str:
    r"""Return the text with every control character and invisible character as its escape.

    Example:
        >>> clean("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return CONTROL.sub(lambda letter: letter[0].encode("unicode_escape").decode("ascii"), text)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is: without markup and without colours of its own.

    On a terminal, a longer line goes on after a space, so that no number is broken. A log gets the whole line.
    """
    from rich.text import Text

    text = clean(text)
    if console.is_terminal and console.width >= NARROWEST:
        text = "\n".join(wrapped(line, console.width) for line in text.split("\n"))
    console.print(Text(text, style=style), highlight=False, soft_wrap=True)


def wrapped(line: str, width: int) -> str:
    """Return a line in parts of at most `width` letters, without breaking a word. Later parts are indented."""
    if len(line) <= width:
        return line
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
        )
    )


def complain(text: str) -> None:
    """Print one line on stderr."""
    line = " ".join(clean(text).split())
    try:
        print(f"cotgrpo: {line}", file=sys.stderr)
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        print(f"cotgrpo: {line.encode('ascii', 'backslashreplace').decode('ascii')}", file=sys.stderr)


def did_you_mean(key: str, known: Sequence[str], mark: str = "") -> str:
    """Return the nearest known key as a question: by the whole dotted key, or else by its last part."""
    last_parts = [name.rpartition(".")[2] for name in known]
    by_last_part = difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    found = difflib.get_close_matches(key, known, n=1) or [known[last_parts.index(part)] for part in by_last_part]
    return f" Did you mean {mark}{found[0]}?" if found else " See --help-all for all settings."


class LastingStream:
    """A standard stream whose reader may end, or whose disk may fill up: what is then written is lost, and no error.

    Attributes:
        lost: why, or an empty text.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, ""

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self.stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Write to nowhere from here on."""
        self.lost = str(error.strerror)
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_streams_last() -> None:
    """Let this process survive standard streams that are closed, now or later."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file would become such a stream
        pass
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
        setattr(sys, name, LastingStream(stream))
    os.close(descriptor)


def lost_output() -> str:
    """Return why standard output was lost; empty if it was not."""
    return sys.stdout.lost if isinstance(sys.stdout, LastingStream) else ""


def show_cursor() -> None:
    """Show the cursor of a terminal again, which a progress bar hides."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")
