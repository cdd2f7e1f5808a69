"""Text and numbers as a report shows them."""

from __future__ import annotations

import math
import re

from markupsafe import Markup, escape

UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that a browser does not show, or obeys: controls, lone surrogates, overrides of the text's direction."""


def printable(text: str) -> str:
    """Replace each character of `UNSHOWN` by a visible mark."""
    return UNSHOWN.sub(lambda found: mark_of(ord(found[0])), text.replace("\r\n", "\n"))


def mark_of(character: int) -> str:
    """Return the visible mark of a character of `UNSHOWN`: the picture of a control, else U+FFFD."""
    if character < 0x20:
        return chr(0x2400 + character)
    return "\N{SYMBOL FOR SUBSTITUTE FORM TWO}" if 0x80 <= character < 0xA0 else "\N{REPLACEMENT CHARACTER}"


def escape_text(text: str) -> Markup:
    """Return text as HTML or XML shows it: printable, and escaped unless it is markup already."""
    return text if isinstance(text, Markup) else escape(printable(text))


def format_number(value: int | float) -> str:
    """Return at most four significant digits: `0.5`, `12k`, `3e-4`."""
    if not math.isfinite(value):
        return "not finite"
    value = float(f"{value:.4g}")
    shown = f"{value:g}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(size, 1e4) <= abs(value) < 1e12:
            shown = f"{value / size:g}{letter}"
            break
    else:
        if value and not 1e-2 <= abs(value) < 1e12:
            mantissa, exponent = f"{value:.3e}".split("e")
            shown = f"{float(mantissa):g}e{int(exponent)}"
    return shown.replace("-", "\N{MINUS SIGN}")


def format_percent(fraction: int | float) -> str:
    """Return a fraction as a percentage of at most three significant digits: `2.5%`."""
    return format_number(float(f"{100 * fraction:.3g}")) + "%"


def format_duration(seconds: int | float) -> str:
    """Return a time as `1 h 02 min`, `3 min 20 s` or `4.2 s`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
