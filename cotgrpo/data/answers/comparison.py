"""Whether two answers are the same: as text, choice, quantity, list or formula."""

from __future__ import annotations

import re

from cotgrpo.data.answers.characters import plain
from cotgrpo.data.answers.formulas import formulas_equal, has_symbols, may_be_formula
from cotgrpo.data.answers.moments import clock_time, date, times_equal
from cotgrpo.data.answers.quantities import (
    number_in_base,
    parse_quantity,
    quantities_equal,
    ratio,
    without_commands,
)
from cotgrpo.data.answers.units import Unit, parse_unit

MOST_ITEMS = 30
LONGEST_LIST = 500
LONGEST_EQUATION = 300
CHOICE = re.compile(
    r"[(\[]?(?P<letter>[A-J])(?:[)\]]|[.):,]+(?=\s|$|[^\x00-\x7f])|[.)\]:]+ ?(?=[\w\\$-]))\s*(?P<rest>.*)", re.DOTALL
)
WRAPPED = re.compile(r"^\\(?:text|textbf|textit|textrm|mathrm|mathbf|boxed|fbox|mbox) *\{([^{}]*)\}$")
"""A whole text in a command that changes only its look."""
CHOICES = re.compile(r"[(\[]?[A-J](?:(?:[\s,;&/()\[\]]|and|和|与)*[A-J])*[)\]]?")
YES_OR_NO_WORD = r"yes|no|true|false|correct|incorrect|是的?|不是|否|对|错|正确|错误|да|нет|sí|si|oui|non|ja|nein"
YES_OR_NO = re.compile(
    rf"[*_\"']*({YES_OR_NO_WORD})\b[*_\"']*(?:[.,;:!]| (?!(?:and|or|/|&) ?(?:{YES_OR_NO_WORD})\b))", re.IGNORECASE
)
BOOLEAN = re.compile(YES_OR_NO_WORD, re.IGNORECASE)
LEFT_SIDE = re.compile(
    r"\s*(?P<name>(?:\\?[A-Za-z]+|[^\W\d_]{1,12})(?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z])|:=)\s*(?P<right>.+)",
    re.DOTALL,
)
WORDS_SIDE = re.compile(r"(?P<name>[A-Za-z][A-Za-z ]{1,40}|[^\W\d_]{1,12})\s*[=:]\s*(?P<right>.+)", re.DOTALL)
SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*(?:\band\b|\bor\b|和|或)?|\band\b|\bor\b|和|或|与|以及|\bи\b|\bund\b|\bet\b"
    r"|(?<=[0-9] )y(?= [-0-9]))\s*"  # elsewhere y is a variable
)
RESIDUE = re.compile(
    r"(?:[a-z] ?(?:\\equiv|=) ?)?(?P<value>[^=\\]{1,40}?)"
    r" ?(?:\\pmod|\(?(?:\\b)?mod)(?![a-z]) ?\{?(?P<modulus>[0-9a-z]+)\}?\)?"
)
LAST_NAME = re.compile(r".*(?:\s|[^\x00-\x7f](?=[\x00-\x7f]))", re.DOTALL)
"""Before the name itself: `so x`, `解得x`."""
ONE_SIDED = re.compile(r"(?P<name>[a-z]) *(?P<sign>[<>]|\\[lg]e(?![a-z])) *(?P<bound>[^<>=,;]{1,40})")
ONE_SIDED_REVERSED = re.compile(r"(?P<bound>[^<>=,;a-z]{1,40}?) *(?P<sign>[<>]|\\[lg]e(?![a-z])) *(?P<name>[a-z])")
FORMULA_AND_UNIT = re.compile(r"(?P<formula>.{1,80}(?:\\pi|\}))(?<!\^) *(?P<unit>[^\\{}()=,;\s][^\\()=,;]{0,30})")
"""`16\\pi cm^2`; a unit of one letter there would be a variable."""
BETWEEN = re.compile(r"([^<>=,;]{1,40}?)(<|\\le(?![a-z])) *([a-z]) *(<|\\le(?![a-z]))([^<>=,;]{1,40})")
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def answers_match(predicted: str | None, gold: str) -> bool:
    r"""Return whether two answers are the same. docs/answers.md lists the rules with examples.

    Texts match without regard to case, spaces, quotes, width of the characters and the final period. Numbers match
    exactly: `1,000` and `1000.0`, `0.5` and `1/2`, but not 0.33 and 1/3. A percent sign on one side alone is read both
    ways, so `25%` matches 25 and 0.25. A unit on one side alone is ignored; two units must agree: `5 m` is `500 cm` and
    not `5 cm`. Lists match item by item, in any order unless they stand in brackets. Choices match by their letter.
    Math-Verify compares formulas, such as `(x+1)^2` and `x^2+2x+1`. Formulas too large to evaluate match as text only.

    Args:
        predicted: a reply's answer, as `extract_answer` returns it; None (no answer) matches nothing.
        gold: the right answer.

    Example:
        >>> answers_match("$1,000", "1000.0"), answers_match("1/2", "0.5"), answers_match("Paris.", "paris")
        (True, True, True)
        >>> answers_match("12元", "12"), answers_match("5 cm", "5 m"), answers_match("(C) 42", "C")
        (True, False, True)
        >>> answers_match("41", "42"), answers_match(None, "42")
        (False, False)
    """
    return predicted is not None and bare_match(bare_text(predicted), bare_text(gold), depth=0)


def bare_match(left: str, right: str, depth: int) -> bool:
    """Return whether two bare texts are the same answer; `depth` counts the lists and equations around them."""
    if left == right:
        return left != ""
    if not left or not right:
        return False
    if left.casefold() == right.casefold():
        return "\\" not in left + right  # case matters in LaTeX, and Math-Verify ignores it: \Delta, \delta
    left, right = interval(left), interval(right)
    for compare in (match_choices, match_residues, match_quantities, match_lists, match_equations, match_words):
        verdict = compare(left, right, depth)
        if verdict is not None:
            return verdict
    (bare, unit), (other, other_unit) = formula_and_unit(left), formula_and_unit(right)
    if unit is not None and other_unit is not None and unit != other_unit:
        return False
    both = unit is not None and other_unit is not None
    if both or max(len(left) - len(bare), len(right) - len(other)) > 2:  # one letter on one side may be a variable
        left, right = bare, other
    if compact(left) == compact(right):
        return True
    return may_be_formula(left) and may_be_formula(right) and has_symbols(left + right) and formulas_equal(left, right)


def bare_text(text: str) -> str:
    r"""Return the text in ASCII, without `$...$`, `\(...\)`, `\text{}`, quotes, the final period and extra spaces.

    A choice `(A)` becomes `A`.
    """
    text = " ".join(plain(text).split())
    for _ in range(3):
        before = text
        text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text)
        text = re.sub(r"^\$\$?([^$]*)\$?\$$", r"\1", text.strip()).strip()
        text = re.sub(r"(?<![.\\])\.$|(?<=[^\x00-\x7f])[!?]$|(?<=.)[:;,]$", "", text).strip("\"'`* ")
        text = WRAPPED.sub(r"\1", text).strip()
        text = re.sub(r"^[(\[]?([A-Za-z])[)\]]$", r"\1", text)
        if text == before:
            break
    return text


def formula_and_unit(text: str) -> tuple[str, Unit | None]:
    r"""Return `16\\pi cm^2` as the formula and its unit; other texts as they are, and None."""
    match = FORMULA_AND_UNIT.fullmatch(without_commands(text))
    unit = parse_unit(match["unit"]) if match is not None else None
    return (match["formula"], unit) if match is not None and unit is not None and unit.dimension else (text, None)


def match_choices(left: str, right: str, depth: int) -> bool | None:
    """Compare choices: if one side is a letter, or several, the other may be `C. 42` or `(C) 42`."""
    if depth:
        return None
    sides = [without_commands(side) for side in (left, right)]
    if all(CHOICES.fullmatch(side) for side in sides):
        return set(re.findall("[A-J]", left)) == set(re.findall("[A-J]", right))
    options = [CHOICE.fullmatch(side) for side in sides]
    if options[0] is not None and options[1] is not None:
        return options[0]["letter"] == options[1]["letter"]
    for option, other in ((options[0], sides[1]), (options[1], sides[0])):
        if option is not None and re.fullmatch("[A-J]", other):
            return option["letter"] == other
        if option is not None and bare_match(bare_text(option["rest"]), bare_text(other), depth + 1):
            return True
    return None


def match_quantities(left: str, right: str, depth: int) -> bool | None:
    """Compare numbers with or without units, times of the day, and numbers in another base."""
    del depth
    ratios = ratio(left), ratio(right)
    times = clock_time(left), clock_time(right)
    if times[0] is not None and times[1] is not None:
        return times_equal(times[0], times[1])
    dates = date(left), date(right)
    if dates[0] is not None and dates[1] is not None:
        return dates[0][:2] == dates[1][:2] and (None in (dates[0][2], dates[1][2]) or dates[0][2] == dates[1][2])
    if ratios != (None, None) or times != (None, None):
        return ratios[0] == ratios[1] and None not in ratios
    if "_" in left + right:
        based = number_in_base(left), number_in_base(right)
        if based[0] is not None and based[1] is not None:
            return based[0][0] == based[1][0] and (None in (based[0][1], based[1][1]) or based[0][1] == based[1][1])
    one, other = parse_quantity(left), parse_quantity(right)
    if one is not None and other is not None:
        return quantities_equal(one, other) or decimal_comma(left) == right or decimal_comma(right) == left
    if one is not None or other is not None:
        comma = parse_quantity(decimal_comma(left)), parse_quantity(decimal_comma(right))
        if comma[0] is not None and comma[1] is not None and "." in left + right:
            return quantities_equal(comma[0], comma[1])
    return None


def match_residues(left: str, right: str, depth: int) -> bool | None:
    r"""Compare residues: `x \equiv 7 \pmod{11}` with 7, and with another residue of the same modulus."""
    residues = [RESIDUE.fullmatch(side) for side in (left, right)]
    if residues == [None, None] or depth > 1:
        return None
    moduli = {residue["modulus"] for residue in residues if residue is not None}
    one, other = (
        side if residue is None else residue["value"] for side, residue in zip((left, right), residues, strict=True)
    )
    return len(moduli) == 1 and bare_match(bare_text(one), bare_text(other), depth + 1)


def decimal_comma(text: str) -> str:
    """Return `3,5` as 3.5, as most of Europe writes it; other texts as they are. `1,001` groups thousands."""
    return re.sub(
        r"^([-+]?(?:0(?=,)|[0-9]+(?=,(?![0-9]{3}(?![0-9])))|[0-9]{4,})),([0-9]{1,9})(?![0-9,])", r"\1.\2", text
    )


def match_lists(left: str, right: str, depth: int) -> bool | None:
    """Compare two lists item by item; only those in ( ) or [ ] have an order."""
    if depth > 1:
        return None
    (kind, items), (other_kind, other_items) = split_items(left), split_items(right)
    if len(items) < 2 and len(other_items) < 2:
        return None
    if len(items) < 2 or len(other_items) < 2:
        return False if all(parse_quantity(bare_text(i)) for i in items + other_items) else None
    if not all(item_like(item) for item in items + other_items):
        return None
    if kind and other_kind and kind != other_kind:
        return False
    if len(items) != len(other_items):
        return False
    return match_items(items, other_items, ordered="(" in kind + other_kind or "[" in kind + other_kind, depth=depth)


def match_items(items: list[str], others: list[str], *, ordered: bool, depth: int) -> bool:
    """Return whether the items of two lists match one to one."""
    left = [bare_text(item) for item in items]
    others = [bare_text(item) for item in others]
    if ordered:
        return all(bare_match(*pair, depth + 1) for pair in zip(left, others, strict=True))
    for item in left:
        place = next((i for i, other in enumerate(others) if bare_match(item, other, depth + 1)), None)
        if place is None:
            return False
        del others[place]
    return True


def item_like(item: str) -> bool:
    """Return whether a text is short enough to be an item of a list of answers, and not prose."""
    return len(item) <= 60 and len(item.split()) <= 4


def split_items(text: str) -> tuple[str, list[str]]:
    r"""Return the brackets around a list, such as "()", and its items; "" and the text alone if it is not a list."""
    if len(text) > LONGEST_LIST:
        return "", [text]
    text = re.sub(r"\\([{}])", r"\1", without_commands(text))
    text = re.sub(r"^(?:[A-Za-z]\s*)?\\in(?![a-z])\s*", "", text)
    kind = ""
    if text[:1] in BRACKETS and text[-1:] in (")", "]", "}") and closes_at_end(text):
        kind, text = text[0] + text[-1], text[1:-1]
    if (both := re.fullmatch(r"(?:[A-Za-z]\s*=\s*)?\\pm\s*(.+)", text)) is not None:
        return kind, [both[1], f"-{both[1]}"]
    items, start, level = [], 0, 0
    for place in re.finditer(rf"[(\[{{]|[)\]}}]|{SEPARATOR.pattern}", text):
        if place[0] in BRACKETS:
            level += 1
        elif place[0] in (")", "]", "}"):
            level -= 1
        elif level == 0 and place[0].strip():
            items.append(text[start : place.start()])
            start = place.end()
    items = [item.strip() for item in [*items, text[start:]] if item.strip()]
    return ("", [text]) if not items or len(items) > MOST_ITEMS else (kind, items)


def interval(text: str) -> str:
    r"""Return `-1 < x \le 3` as (-1, 3] and `x > 2` as (2, \infty); other texts as they are."""
    text = re.sub(r"\\([lg])eq(?![a-z])", r"\\\1e", text.replace("<=", r"\le ").replace(">=", r"\ge "))
    parts = [one_interval(part) for part in re.split(r"\s*(?:\bor\b|或)\s*", without_commands(text))]
    if None not in parts:
        return r" \cup ".join(part for part in parts if part is not None)
    return text.replace(r"\varnothing", r"\emptyset")


def one_interval(text: str) -> str | None:
    """Return an inequality of one letter as an interval; None for any other text."""
    if (between := BETWEEN.fullmatch(text)) is not None:
        left, right = "(" if between[2] == "<" else "[", ")" if between[4] == "<" else "]"
        return f"{left}{between[1].strip()}, {between[5].strip()}{right}"
    side = ONE_SIDED.fullmatch(text) or ONE_SIDED_REVERSED.fullmatch(text)
    if side is None:
        return None
    closed, bound = side["sign"].startswith("\\"), side["bound"].strip()
    if (side["sign"] in (">", r"\ge")) == (side.re is ONE_SIDED):
        return rf"{'[' if closed else '('}{bound}, \infty)"
    return rf"(-\infty, {bound}{']' if closed else ')'}"


def closes_at_end(text: str) -> bool:
    """Return whether the bracket that opens a text is the one that its last character closes."""
    level = 0
    for place, letter in enumerate(text):
        level += (letter in "([{") - (letter in ")]}")
        if level == 0:
            return place == len(text) - 1
    return False


def match_equations(left: str, right: str, depth: int) -> bool | None:
    """Compare `x = 42` with 42, and with x = 42."""
    if depth > 2 or len(left) > LONGEST_EQUATION or len(right) > LONGEST_EQUATION:
        return None
    sides = [equation_sides(side) for side in (left, right)]
    if sides[0] is None and sides[1] is None:
        return None
    if sides[0] is not None and sides[1] is not None:
        names = [LAST_NAME.sub("", side[0].casefold()) or side[0] for side in sides if side is not None]
        one, other = (bare_text(side[1]) for side in sides if side is not None)
        if names[0] == names[1] or min(map(len, names)) > 2:
            return bare_match(one, other, depth + 1)
        return False if parse_quantity(one) and parse_quantity(other) else None  # `x = 2y` may be the equation y = x/2
    bare = [side[1] if side is not None else whole for side, whole in zip(sides, (left, right), strict=True)]
    return True if bare_match(bare_text(bare[0]), bare_text(bare[1]), depth + 1) else None


def equation_sides(text: str) -> tuple[str, str] | None:
    """Return a name and what it equals, of `x = 42`, `f(x) = 2x` or `total = 3 + 4 = 7`; None for any other text."""
    match = LEFT_SIDE.fullmatch(text) or WORDS_SIDE.fullmatch(text)
    if match is None:
        return None
    last = match["right"].rpartition("=")[2].strip()
    is_chain = "," not in match["right"] and parse_quantity(last) is not None
    right = last if is_chain else match["right"].strip()
    return match["name"].strip(), right


def match_words(left: str, right: str, depth: int) -> bool | None:
    """Compare yes and no, which may go on: `Yes, he can.`; and words without regard to punctuation."""
    del depth
    if {left, right} == {"是", "是的"}:
        return True
    for one, other in ((left, right), (right, left)):
        if BOOLEAN.fullmatch(other) and (match := YES_OR_NO.match(one)) is not None:
            return match[1].casefold().rstrip("的") == other.casefold().rstrip("的")
    if not has_symbols(left + right):
        words = [re.sub(r"^(?:the|a|an) (?=\w)|[^\w\s]", "", side.casefold()).split() for side in (left, right)]
        return True if words[0] and words[0] == words[1] else None
    return None


def compact(text: str) -> str:
    r"""Return LaTeX text without spaces and with one form of its commands: `\dfrac12` is `\frac{1}{2}`."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", without_commands(text))
    text = re.sub(r"\\frac *([0-9]) *([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt *([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_]) *\{ *([0-9A-Za-z]) *\}", r"\1\2", text)
    text = re.sub(r"\\(begin|end)\{[bp]matrix\}", r"\\\1{matrix}", text)
    return re.sub(r"(?<![0-9]) +| +(?![0-9])", "", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text))
