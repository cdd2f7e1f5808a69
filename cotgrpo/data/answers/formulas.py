"""Formulas: which texts are small enough to evaluate, and whether two of them are equal (Math-Verify and a check)."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

LONGEST_FORMULA = 200
"""Characters given to Math-Verify."""
FORMULA_SECONDS = 5
LARGEST_POWER = 100_000
"""Bound of the product of all exponents in a formula."""
MOST_TERMS = 2000
"""Bound of the terms in the expansion of (sum of a formula's letters) ^ (that product)."""
MOST_DIVISIONS = 6
"""Each level of nesting doubles the work."""
REMEMBERED = 65_536
"""Pairs of formulas whose result is kept: a generation judges the same pairs again."""
DIGITS = 60
"""Precision of the check of Math-Verify's verdict, which rounds to 6 decimals."""
EXACT, ROUNDED = 1e-40, 1e-12
"""Largest relative difference of equal values: of exact expressions, and of those with decimals."""

WORD = re.compile(r"[^\W\d_]{3,}")
VOWEL_SIGN = re.compile("[\u0900-\u0fff]")
"""Scripts of India and its neighbours: to Python, their vowel signs end a word."""
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
    return all(FUNCTION.fullmatch(word) for word in WORD.findall(symbols)) and VOWEL_SIGN.search(text) is None


def has_symbols(text: str) -> bool:
    """Return whether the text holds a symbol that words lack: as formulas, `on` and `no` are equal products."""
    return re.search(r"[0-9\\^_+*/=<>()\[\]{}|-]", text) is not None


def formulas_equal(predicted: str, gold: str) -> bool:
    """Return whether two formulas are equal: Math-Verify finds so, and exact evaluation does not object."""
    # Math-Verify's timeouts are signals, and only the main thread of a POSIX process can set those. Elsewhere
    # `may_be_formula` bounds the work.
    can_signal = os.name == "posix" and threading.current_thread() is threading.main_thread()
    return verified(predicted, gold, FORMULA_SECONDS if can_signal else None)


@functools.lru_cache(REMEMBERED)
def verified(predicted: str, gold: str, seconds: int | None) -> bool:
    """Return Math-Verify's verdict on two formulas, checked by `may_be_equal`."""
    from math_verify import LatexExtractionConfig, parse, verify

    quiet_math_verify()
    gold_parsed, predicted_parsed = (
        parse(
            f"${write_powers_of_ten(text)}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=seconds,
        )
        for text in (gold, predicted)
    )
    if not verify(gold_parsed, predicted_parsed, timeout_seconds=seconds):
        return False
    return may_be_equal(gold_parsed[0], predicted_parsed[0])


def write_powers_of_ten(text: str) -> str:
    r"""Return `1.5e-3` as `1.5 \cdot 10^{-3}`; in LaTeX, `e` is a constant."""
    return re.sub(r"(?<![A-Za-z\\])([0-9.]+)[eE]([-+]?[0-9]{1,3})(?![\w.])", r"\1 \\cdot 10^{\2}", text)


def may_be_equal(left: sympy.Basic | str, right: sympy.Basic | str) -> bool:
    """Return False if two expressions have different values, evaluated with `DIGITS` digits at a few points.

    Anything but expressions (a set, an interval, a relation, a matrix) may be equal.
    """
    import sympy

    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return True
    bound = ROUNDED if left.has(sympy.Float) or right.has(sympy.Float) else EXACT
    names = sorted(left.free_symbols | right.free_symbols, key=str)
    for numerator in (3, 7, 11):
        at = {name: sympy.Rational(numerator * (2 * i + 5), 13 + i) for i, name in enumerate(names)}
        try:
            values = [sympy.N(side.subs(at), DIGITS) for side in (left, right)]
            difference = sympy.N(values[0] - values[1], DIGITS)
            size = max(abs(complex(value)) for value in values)
            if size and abs(complex(difference)) > bound * size:
                return False
            if not size and values[0] != values[1]:  # too small for a complex number
                return abs(difference) <= bound * abs(values[0])
        except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError):
            return True  # not a number there, such as infinity
    return True


@functools.cache
def quiet_math_verify() -> None:
    """Drop Math-Verify's warning that timeouts are off, which is on purpose here."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
