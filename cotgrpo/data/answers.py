"""What a reply answers, and whether two answers are the same: numbers as numbers, formulas as formulas, else text.

Everything here takes whatever a model writes, however long or broken: a bad reply raises nothing, it just does not match.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from fractions import Fraction

LONGEST_NUMBER = 1000
"""Characters. A student that loops writes numbers without end, and Python reads them in quadratic time."""
LONGEST_FORMULA = 200
"""Characters given to Math-Verify."""
FORMULA_SECONDS = 5
LARGEST_POWER = 100_000
"""Bound of the product of all exponents in a formula."""
MOST_TERMS = 2000
"""Bound of the terms that a sum of a formula's letters can have, raised to that product and written out."""
MOST_DIVISIONS = 6
"""Nested, the work doubles with each."""

MINUS = "\N{MINUS SIGN}"
UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9])\.[0-9]++)(?:[eE][+-]?[0-9]{1,3}(?![\w.]))?"
"""`1,000.5`, `42`, `.5`, `1e-3`; commas only where they group thousands (99 groups at most: a bound keeps the search linear)."""
MIXED = r"[0-9]++ [0-9]++/[0-9]++(?![0-9/])"
SIGNED = rf"(?:(?<![\w.)\]}}%$])[-+{MINUS}]\$?|\$[-{MINUS}])?(?:{MIXED}|(?<!/){UNSIGNED}/{UNSIGNED}(?!/)|{UNSIGNED})(?: ?\\?%)?"
"""Also `3/4` and `1 3/4`. A sign counts where it cannot be a minus between two terms: `5-3` ends in 3, `= -3` and `-$3` in -3."""
NUMBER_IN_TEXT = re.compile(SIGNED)
WHOLE_NUMBER = re.compile(
    rf"(?P<sign>[-+] ?)?(?P<whole>[0-9]++ (?=[0-9]++/))?(?P<top>{UNSIGNED})(?:/(?P<bottom>{UNSIGNED}))?(?P<percent> ?%)?"
)
LATEX_FRACTION = re.compile(r"\\[dtc]?frac *\{([0-9]+)\} *\{([0-9]+)\}")
CURRENCY = re.compile(r"^([-+]?)\s*\\?[$€£]\s*|\s*\\?[$€£]$")
BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
LEADING_NUMBER = re.compile(rf"[$€£]?{SIGNED}(?![.)][ \t]+\S)")
"""What begins an answer; `1. Add them` and `2) So` are headings."""
HASHES = re.compile(r"####[ \t]*+([^\n#]*[^\s#])")

WORD = re.compile(r"[^\W\d_]{3,}")
FUNCTION = re.compile(
    r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|exp|sqrt|max|min|mod|inf|abs|det|gcd|lcm",
    re.IGNORECASE,
)
EXPONENT = re.compile(r"\^\s*\{?\s*[-+]?([0-9]+)")
UNBOUNDED = re.compile(
    r"\^\s*\{[^{}]*(?:[0-9)}]\s*\^|!)"  # a number's power, or a factorial, as an exponent
    r"|[0-9]{3}\s*!|[)}!]\s*!"  # large factorials
    r"|binom.*[0-9]{4}|\\(?:int|iint|oint|sum|prod|lim)(?![a-z])"
)
"""What can take hours or all memory in one call, which no timeout stops."""


def extract_answer(text: str) -> str | None:
    r"""The final answer in a reply, as it is written there: the last `\boxed{...}`, else what follows `####` in its line, else the last number.

    Of several `####` the first that a number follows counts, as in GSM8K's own evaluation: what a student writes after its answer, such as
    a next question with an answer of its own, does not change it. Where a number follows none, the last counts, since others may be headings.

    Args:
        text: a reply, or any text. Boxes may hold braces (`\boxed{\frac{1}{2}}`); a box that is empty or never closed does not count.
            Numbers may have a sign, thousands in commas, decimals, `$`, `%`, or be fractions (`3/4`, `1 3/4`); a period that ends the
            sentence is left out.

    Returns:
        The answer without surrounding space, or None where there is no box, no `####` and no number.

    Example:
        >>> extract_answer("48/2 = 24 clips in May, so 48 + 24 = 72 clips in all.")
        '72'
        >>> extract_answer("First I had \\boxed{3}. It is \\boxed{\\frac{1}{2}}, I am 90% sure.")
        '\\frac{1}{2}'
        >>> extract_answer("They cost 5 times $250.10.\n#### 1,250.50")
        '1,250.50'
        >>> extract_answer("#### Add them\n5 + 7 = 12\n#### 12\n\nQuestion: Tom has 99 apples.\n#### 99")
        '12'
    """
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    marked = HASHES.findall(text)
    found = marked or NUMBER_IN_TEXT.findall(text)
    return next(filter(begins_with_number, marked), found[-1]) if found else None


def begins_with_number(text: str) -> bool:
    """Whether a text begins with a number that can be an answer, and not with that of a heading (`1. Add them`)."""
    return LEADING_NUMBER.match(text) is not None


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed and not empty holds. One pass, whatever the text; `\{` is no brace."""
    opened: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for token in BRACES.finditer(text):
        if token[1] or token[0] == "{":
            opened.append((token.end(), bool(token[1])))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and text[start : token.start()].strip() and (best is None or start > best[0]):
                best = start, token.start()
    return None if best is None else text[slice(*best)].strip()


def answers_match(predicted: str | None, gold: str) -> bool:
    r"""Whether two answers say the same.

    The same text matches, case, spaces, surrounding `$` and a last period aside. Two numbers match when they are equal, exactly:
    `1,000` and `1000.0`, `0.5` and `1/2`; 0.33 is not 1/3. A currency sign is no part of a number. A percent sign on one side alone is
    read both ways, so `25%` matches 25 and 0.25. Other formulas are left to Math-Verify, which finds `(x+1)^2` and `x^2+2x+1` equal;
    where it is not installed (`pip install "cotgrpo[math]"`), or they are too large to be worked out, they match as text or not at all.

    Args:
        predicted: a reply's answer, as `extract_answer` gives it; None (no answer) matches nothing.
        gold: the right answer.

    Example:
        >>> answers_match("$1,000", "1000.0"), answers_match("1/2", "0.5"), answers_match("Paris.", "paris")
        (True, True, True)
        >>> answers_match("41", "42"), answers_match(None, "42")
        (False, False)
    """
    if predicted is None:
        return False
    left, right = bare_text(predicted), bare_text(gold)
    if left == right:
        return left != ""
    if left.casefold() == right.casefold():
        return "\\" not in left + right  # there, case tells things apart, which Math-Verify forgets: \Delta, \delta
    left_values, right_values = numbers(left), numbers(right)
    if left_values and right_values:
        if len(left_values) == len(right_values):
            return left_values[0] == right_values[0]
        return not set(left_values).isdisjoint(right_values)
    if may_be_formula(left) and may_be_formula(right) and has_symbols(left + right):
        check = math_verify()
        return check is not None and check(left, right)
    return False


def numbers(text: str) -> tuple[Fraction, ...]:
    """The number that the whole text is, exactly: `(x,)`, or for a percentage `(x, x / 100)`; `()` where it is none."""
    if len(text) > LONGEST_NUMBER:
        return ()
    plain = LATEX_FRACTION.sub(r" \1/\2", text.replace("{,}", ",").replace("\\!", "").replace("\\,", ""))
    plain = CURRENCY.sub(r"\1", " ".join(plain.split())).replace("\\%", "%")
    match = WHOLE_NUMBER.fullmatch(plain)
    if match is None:
        return ()
    top, bottom = (Fraction((match[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if bottom == 0 or (match["whole"] and top >= bottom):
        return ()
    value = int(match["whole"] or 0) + top / bottom
    value = -value if (match["sign"] or "").startswith("-") else value
    return (value, value / 100) if match["percent"] else (value,)


def bare_text(text: str) -> str:
    r"""Single spaces, and nothing around the answer: no `$...$`, `\(...\)`, `\text{}`, quotes or last period; a choice `(A)` is `A`."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", " ".join(text.replace(MINUS, "-").split()))
    text = re.sub(r"^\$(.*)\$$", r"\1", text.strip()).strip().removesuffix(".").strip("\"'`* ")
    return re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\{([^{}\\]*)\}$|^\(([A-Za-z])\)$", r"\1\2", text).strip()


def may_be_formula(text: str) -> bool:
    """Whether the text can be mathematics and no prose, and is small enough to be worked out."""
    if not text or len(text) > LONGEST_FORMULA or UNBOUNDED.search(text):
        return False
    symbols = re.sub(r"\\(?:text|mathrm)\{[^{}]*\}|\\[A-Za-z]+", "", text)
    power, letters = math.prod(int(n) or 1 for n in EXPONENT.findall(text)), len(set(re.findall("[A-Za-z]", symbols)))
    if power > LARGEST_POWER or math.comb(power + letters, letters) > MOST_TERMS:
        return False
    if text.count("/") + text.count("frac") > MOST_DIVISIONS:
        return False
    return all(FUNCTION.fullmatch(word) for word in WORD.findall(symbols))


def has_symbols(text: str) -> bool:
    """Whether there is anything that words lack. Without this, `on` and `no` are two equal products of letters."""
    return re.search(r"[0-9\\^_+*/=<>()\[\]{}|-]", text) is not None


@functools.cache
def math_verify() -> Callable[[str, str], bool] | None:
    """`check(predicted, gold)` by Math-Verify, or None where it, or the parser that its `antlr4` extras bring, is not installed."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        return None

    def check(predicted: str, gold: str) -> bool:
        # Its timeouts are signals, which only the main thread of a POSIX process can set; elsewhere `may_be_formula` is the bound.
        can_signal = os.name == "posix" and threading.current_thread() is threading.main_thread()
        seconds = FORMULA_SECONDS if can_signal else None
        gold_parsed, predicted_parsed = (
            parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=seconds)
            for text in (gold, predicted)
        )
        return bool(verify(gold_parsed, predicted_parsed, timeout_seconds=seconds))

    # It warns, once, where timeouts are off: here that is on purpose.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
    return check
