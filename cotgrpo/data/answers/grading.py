"""Grade replies: find the answer in a reply and compare it with the right one, as number, formula or text.

Every function takes any text that a model may write, however long or broken. A bad reply does not match; it raises no
error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
import threading
from fractions import Fraction

LONGEST_NUMBER = 1000
"""Characters. A student in a loop writes endless numbers, and Python parses them in quadratic time."""
LONGEST_FORMULA = 200
"""Characters given to Math-Verify."""
FORMULA_SECONDS = 5
LARGEST_POWER = 100_000
"""Bound of the product of all exponents in a formula."""
MOST_TERMS = 2000
"""Bound of the terms in the expansion of (sum of a formula's letters) ^ (that product)."""
MOST_DIVISIONS = 6
"""Each level of nesting doubles the work."""

MINUS = "\N{MINUS SIGN}"
UNSIGNED = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9])\.[0-9]++)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![\w.]))?"
)
"""`1,000.5`, `42`, `.5`, `1e-3`. Commas must group thousands; the bound of 99 groups keeps the search linear."""
MIXED = r"[0-9]++ [0-9]++/[0-9]++(?![0-9/])"
SIGNED = (
    rf"(?:(?<![\w.)\]}}%$])[-+{MINUS}]\$?|\$[-{MINUS}])?"
    rf"(?:{MIXED}|(?<!/){UNSIGNED}/{UNSIGNED}(?!/)|{UNSIGNED})(?: ?\\?%)?"
)
"""Also `3/4` and `1 3/4`. A minus between two terms is not a sign: `5-3` ends in 3, `= -3` and `-$3` in -3."""
NUMBER_IN_TEXT = re.compile(SIGNED)
WHOLE_NUMBER = re.compile(
    rf"(?P<sign>[-+] ?)?(?P<whole>[0-9]++ (?=[0-9]++/))?"
    rf"(?P<top>{UNSIGNED})(?:/(?P<bottom>{UNSIGNED}))?(?P<percent> ?%)?"
)
LATEX_FRACTION = re.compile(r"\\[dtc]?frac *\{([0-9]+)\} *\{([0-9]+)\}")
CURRENCY = re.compile(r"^([-+]?)\s*\\?[$€£]\s*|\s*\\?[$€£]$")
BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
LEADING_NUMBER = re.compile(rf"[$€£]?{SIGNED}(?![.)][ \t]+\S)")
"""The start of an answer; `1. Add them` and `2) So` are headings."""
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
"""Formulas that can take hours or all memory in one call, which no timeout stops."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """The result of comparing a reply with the right answer.

    Attributes:
        correct: whether the reply's answer is the right one.
        answer: the answer that was compared last, or None if the reply has none.
        why: the reason in a few words, for reports.
    """

    correct: bool
    answer: str | None
    why: str


def grade(reply: str | None, gold: str) -> Grade:
    """Compare a reply with the right answer. Everything in the package that asks whether a reply is right asks here.

    A reply is right if it matches `gold` as it is, or if the answer extracted from it does.

    Args:
        reply: a whole reply, or the part that a template takes for the answer; None: the reply has no answer.
        gold: the right answer.

    Example:
        >>> grade("The answer is 42.", "42")
        Grade(correct=True, answer='42', why='the extracted answer matches')
        >>> grade("41", "42").why, grade(None, "42").why
        ("'41', expected '42'", 'no answer')
    """
    if reply is None:
        return Grade(False, None, "no answer")
    if answers_match(reply, gold):
        return Grade(True, reply, "the answer matches")
    extracted = extract_answer(reply)
    if answers_match(extracted, gold):
        return Grade(True, extracted, "the extracted answer matches")
    return Grade(False, extracted, f"{extracted or reply!r:.80}, expected {gold!r:.80}")


def extract_answer(text: str) -> str | None:
    r"""Return the final answer in a reply, as written there.

    That is the last `\boxed{...}`; without a box, the text after `####` on its line; else the last number.

    Of several `####`, the first one followed by a number counts, as in GSM8K's own evaluation: text after the answer,
    such as a next question, does not change it. If no `####` has a number, the last one counts, since earlier ones may
    be headings.

    Args:
        text: a reply, or any text. A box may contain braces (`\boxed{\frac{1}{2}}`). Empty and unclosed boxes do not
            count. A number may have a sign, thousands separated by commas, decimals, `$` or `%`, or be a fraction
            (`3/4`, `1 3/4`). A period that ends the sentence is left out.

    Returns:
        The answer without surrounding space, or None without any box, `####` or number.

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
    """Return whether a text begins with a number that can be an answer, unlike the heading `1. Add them`."""
    return LEADING_NUMBER.match(text) is not None


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` that is closed and not empty, in one pass; `\{` does not count."""
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
    r"""Return whether two answers are the same.

    Equal texts match; case, spaces, surrounding `$` and a final period are ignored. Equal numbers match exactly:
    `1,000` and `1000.0`, `0.5` and `1/2`, but not 0.33 and 1/3. A currency sign is ignored. A percent sign on one side
    alone is read both ways, so `25%` matches 25 and 0.25. Math-Verify compares other formulas, such as `(x+1)^2` and
    `x^2+2x+1`. Formulas too large to evaluate match as text only.

    Args:
        predicted: a reply's answer, as `extract_answer` returns it; None (no answer) matches nothing.
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
        return "\\" not in left + right  # case matters in LaTeX, and Math-Verify ignores it: \Delta, \delta
    left_values, right_values = numbers(left), numbers(right)
    if left_values and right_values:
        if len(left_values) == len(right_values):
            return left_values[0] == right_values[0]
        return not set(left_values).isdisjoint(right_values)
    return may_be_formula(left) and may_be_formula(right) and has_symbols(left + right) and formulas_match(left, right)


def numbers(text: str) -> tuple[Fraction, ...]:
    """Return the exact value of a text that is a number: `(x,)`, for a percentage `(x, x / 100)`; else `()`."""
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
    r"""Strip `$...$`, `\(...\)`, `\text{}`, quotes, the final period and extra spaces; a choice `(A)` becomes `A`."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", " ".join(text.replace(MINUS, "-").split()))
    text = re.sub(r"^\$(.*)\$$", r"\1", text.strip()).strip().removesuffix(".").strip("\"'`* ")
    return re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\{([^{}\\]*)\}$|^\(([A-Za-z])\)$", r"\1\2", text).strip()


def may_be_formula(text: str) -> bool:
    """Return whether the text can be mathematics instead of prose, and is small enough to evaluate."""
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
    """Return whether the text holds a symbol that words lack: as formulas, `on` and `no` are equal products."""
    return re.search(r"[0-9\\^_+*/=<>()\[\]{}|-]", text) is not None


def formulas_match(predicted: str, gold: str) -> bool:
    """Return whether Math-Verify finds two formulas equal."""
    from math_verify import LatexExtractionConfig, parse, verify

    quiet_math_verify()
    # Its timeouts are signals, and only the main thread of a POSIX process can set those. Elsewhere `may_be_formula`
    # bounds the work.
    can_signal = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = FORMULA_SECONDS if can_signal else None
    gold_parsed, predicted_parsed = (
        parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=seconds)
        for text in (gold, predicted)
    )
    return bool(verify(gold_parsed, predicted_parsed, timeout_seconds=seconds))


@functools.cache
def quiet_math_verify() -> None:
    """Drop Math-Verify's warning that timeouts are off, which is on purpose here."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
