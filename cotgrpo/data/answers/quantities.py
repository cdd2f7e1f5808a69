"""Quantities: a number with the unit, currency, variable or word of caution that may stand around it."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from cotgrpo.data.answers.numerals import (
    LONGEST_NUMBER,
    MINUS_WORD,
    MULTIPLIER,
    NUMERAL_ZH,
    UNSIGNED,
    WORDS,
    english_numeral,
    numbers,
)
from cotgrpo.data.answers.units import Unit, known_units, parse_unit, units_agree

CURRENCY = r"(?:US\$|HK\$|R\$|A\$|C\$|[$€£¥₹₽₩₺₫฿]|USD|EUR|GBP|RMB|CNY|JPY|INR|Rs\.?)"
PREFIX = re.compile(
    r"(?:→|⇒|=>|->|\\approx|\\simeq|\\sim|~|=|:|≃|≅"
    r"|(?:is )?(?:about|approximately|approx\.?|around|roughly|exactly|only)\b"
    r"|equals?\b|(?:大约|大概|约|約)(?:是|为|等于)?|(?:共计|总计|合计|一共|总共|共)(?:是|为|有)?|等于|是|为|около|примерно|etwa)\s*",
    re.IGNORECASE,
)
CURRENCY_FIRST = re.compile(rf"(?P<sign>[-+]?)\s*(?P<unit>\\?{CURRENCY})\s*(?P<rest>[-+]?[0-9.].*)", re.DOTALL)
PRICE = re.compile(rf"^\\?({CURRENCY}) ?([0-9][0-9.,]*) ?(?:/|per |an? |每) ?(?=[^\W\d_])")
"""`$10 per hour`, which is 10 $/hour."""
TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|bold|bm|boldsymbol)"
    r" *\{([^{}\\]*(?:\\[$%][^{}\\]*)*)\}"
)
DEGREES = re.compile(r"\^ *\{? *(?:\\circ|°|\\degree) *\}?|\\degree|°")
SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad|~")
NUMBER = (
    rf"[-+]? ?(?:[0-9]++ [0-9]++/[0-9]++"
    rf"|(?:{UNSIGNED}) ?(?:\\times|\\cdot|\*|x) ?10(?:\^|\*\*)\{{?[-+]?[0-9]{{1,3}}\}}?"
    rf"|[0-9]{{1,3}}(?: [0-9]{{3}}){{1,9}}(?![0-9])(?:[.,][0-9]+)?"
    rf"|(?:{UNSIGNED})(?:/(?:{UNSIGNED}))?)(?:{MULTIPLIER})?(?: ?%)?"
)
NUMBER_FIRST = re.compile(rf"(?P<number>{NUMBER})(?P<space> ?)(?P<unit>.*)", re.DOTALL)
NUMERAL_FIRST = re.compile(rf"(?P<number>{NUMERAL_ZH.pattern})(?P<space>)(?P<unit>.*)", re.DOTALL)
HALF_MORE = re.compile("(?<=[一二两三四五六七八九十])个半")
PARENTHESIZED_UNIT = re.compile(r"(?<=[0-9]) ?\(([^\W\d_a-zA-Z]{1,6}|[a-z]{1,3}(?:\^\{?[23]\}?)?)\)$")
"""`12（个）`, `12 (cm)`: how Chinese solutions write the unit."""
COPULA = re.compile(r" ?(?:입니다|이에요|예요|이다|です|である|だ|है|हैं|होगा|होगी|होंगे)[.]?$")
"""What ends a sentence in languages with the verb last."""
RATIO = re.compile(r"[0-9.]{1,12}(?: ?(?::|\bto\b|比) ?[0-9.]{1,12}){1,5}")
BASES = {word: str(value) for word, value in WORDS.items() if 2 <= value <= 16}
BASE = re.compile(rf"\(?(?P<digits>[0-9A-F]+)\)?_\{{?(?P<base>[0-9]{{1,2}}|{'|'.join(BASES)})\}}?")
PERCENT = re.compile(r" ?(?:percent(?:age)?(?: points?)?|per cent|pct\.?|процент(?:ов|а)?|por ciento|Prozent)$")
PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([^\W\d_]{1,12})\.?,?\s*(?:and\b\s*|零)?")
CHINESE_MINUTES = {
    ("time", "分"): Unit("time", Fraction(60), ""),
    ("money:yuan", "分"): Unit("money:yuan", Fraction(1, 100), ""),
}
"""分 after another unit; alone it may also be a point of an exam."""
MOST_PARTS = 4
LONGEST_QUANTITY = 200
MOST_NUMERAL_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Attributes:
        values: as `numbers` returns them: two for a percentage.
        unit: None without one.
    """

    values: tuple[Fraction, ...]
    unit: Unit | None = None


def without_commands(text: str) -> str:
    r"""Return LaTeX text without the commands that only change its look: `\text{}`, `\left`, spaces, `\circ`."""
    text = re.sub(r"\\(?:left|right|big|Big|displaystyle|limits)(?![a-z])", "", text)
    text = re.sub(r"\\text *\{,\}", ",", text)
    for _ in range(3):  # nested ones
        text = TEXT_COMMAND.sub(r" \1 ", text)
    text = re.sub(r"° *([CF])(?![A-Za-z])", r"°\1", DEGREES.sub("° ", text))
    text = SPACING.sub(" ", text.replace("\\$", "$").replace("\\%", "%").replace("{,}", ","))
    return " ".join(text.split())


def parse_quantity(text: str) -> Quantity | None:
    r"""Return the quantity that a text is, or None if it is anything else.

    Args:
        text: in ASCII as far as it can be (`characters.plain`), without a final period.

    Example:
        >>> parse_quantity("12").values, parse_quantity(r"10 \text{ cm}").unit.dimension, parse_quantity("2x")
        ((Fraction(12, 1),), 'length', None)
    """
    if len(text) > LONGEST_NUMBER:
        return None
    found = numbers(text)
    if found:
        return Quantity(found)
    if len(text) > LONGEST_QUANTITY:
        return None
    text = without_commands(text)
    prefix = PREFIX.match(text)
    text = text[prefix.end() :].strip() if prefix is not None else text
    text = MINUS_WORD.sub("-", text)
    text = HALF_MORE.sub("点五", PARENTHESIZED_UNIT.sub(r"\1", PERCENT.sub("%", text)))
    found = numbers(text)
    if found:
        return Quantity(found)
    text = PRICE.sub(r"\2 \1/", text)
    first = CURRENCY_FIRST.fullmatch(text)
    if first is not None:
        inner = parse_quantity(first["sign"] + first["rest"])
        currency = known_units().get(first["unit"].strip("\\").rstrip("."))
        if inner is None or (inner.unit is not None and currency is not None and inner.unit != currency):
            return inner
        return Quantity(inner.values, currency)
    return number_and_unit(text) or compound(text)


def compound(text: str) -> Quantity | None:
    """Return the sum of a quantity in several units of one dimension: `2 hours 30 minutes`, `5 ft 6 in`, `3元5角`."""
    parts = [match.groups() for match in PART.finditer(text)]
    first = known_units().get(parts[0][1]) if parts else None
    if first is None or first.worth is None or not 2 <= len(parts) <= MOST_PARTS or PART.sub("", text).strip():
        return None
    total = Fraction(0)
    for number, name in parts:
        unit = known_units().get(name) or CHINESE_MINUTES.get((first.dimension, name))
        if unit is None or unit.worth is None or unit.dimension != first.dimension:
            return None
        total += Fraction(number) * unit.worth
    return Quantity((total / first.worth,), first)


def number_and_unit(text: str) -> Quantity | None:
    """Return the quantity in a text of a number and then a unit."""
    for pattern in (NUMBER_FIRST, NUMERAL_FIRST):
        match = pattern.fullmatch(text)
        if match is None:
            continue
        values = numbers(match["number"].strip())
        rest = COPULA.sub("", match["unit"].strip(" ."))
        if not values or not rest:
            return Quantity(values) if values else None
        currency = re.fullmatch(CURRENCY, rest)
        if currency is not None:
            return Quantity(values, known_units().get(rest.rstrip(".")))
        unit = parse_unit(rest, attached=not match["space"] and not match["number"].endswith("%"))
        if unit is None and "%" in match["number"]:
            of = re.fullmatch(r"of .{1,40}|more|less|off|discount|的.{1,10}", rest)
            return Quantity(values) if of is not None else None
        return None if unit is None else Quantity(values, unit)
    words = text.split()
    for count in range(min(len(words), MOST_NUMERAL_WORDS), 0, -1):
        value = english_numeral(" ".join(words[:count]))
        if value is not None:
            unit = parse_unit(" ".join(words[count:]))
            return Quantity((value,), unit) if unit is not None or count == len(words) else None
    return None


def quantities_equal(left: Quantity, right: Quantity) -> bool:
    """Return whether two quantities are equal. A unit on one side alone is ignored; two units must agree."""
    if len(left.values) != len(right.values) and (left.unit or right.unit) is not None:
        return False  # a percentage, and a quantity with a unit
    if left.unit is not None and right.unit is not None:
        if not units_agree(left.unit, right.unit):
            return False
        if left.unit.worth is not None and right.unit.worth is not None:
            return left.values[0] * left.unit.worth == right.values[0] * right.unit.worth
    if len(left.values) == len(right.values):
        return left.values[0] == right.values[0]
    return not set(left.values).isdisjoint(right.values)


def ratio(text: str) -> str | None:
    """Return a ratio such as `3 : 4` or `3 to 4` as 3:4; None if the text is none."""
    return re.sub(" ?(?::|to|比) ?", ":", text) if RATIO.fullmatch(text) else None


def number_in_base(text: str) -> tuple[str, int | None] | None:
    r"""Return digits and base of `101_2`, and None for the base of plain digits; None for any other text."""
    match = BASE.fullmatch(without_commands(text).replace(" ", ""))
    if match is not None:
        return match["digits"].lstrip("0"), int(BASES.get(match["base"], match["base"]))
    return (text.lstrip("0"), None) if re.fullmatch("[0-9]{1,100}", text) else None
