"""Text for a terminal: every line that is printed passes through here.

Paths, rows and texts of servers may hold the terminal's control sequences, rich's markup and marks that reverse the
direction of writing. They are printed as what they are.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible, and the direction of writing
    "\ud800-\udfff\U000e0000-\U000e007f]"  # surrogates, and invisible tags
)


def clean(text: str) -> str:
    r"""Return the text with every control character and invisible character as its escape.

    Example:
        >>> clean("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return CONTROL.sub(lambda letter: letter[0].encode("unicode_escape").decode("ascii"), text)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is: without markup, without colours of its own, not wrapped."""
    from rich.text import Text

    console.print(Text(clean(text), style=style), highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print one line on stderr."""
    line = " ".join(clean(text).split())
    try:
        print(f"cotgrpo: {line}", file=sys.stderr)
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        print(f"cotgrpo: {line.encode('ascii', 'backslashreplace').decode('ascii')}", file=sys.stderr)
