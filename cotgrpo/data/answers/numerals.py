"""Numbers in texts: digits, fractions, powers of ten, percentages, and numbers in words (English and Chinese)."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST_NUMBER = 1000
"""Characters. A student in a loop writes endless numbers, and Python parses them in quadratic time."""

UNSIGNED = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,99}+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9])\.[0-9]++)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![\w.]))?"
)
"""`1,000.5`, `42`, `.5`, `1e-3`. Commas must group thousands; the bound of 99 groups keeps the search linear."""
MIXED = r"[0-9]++ [0-9]++/[0-9]++(?![0-9/])"
NOT_BINARY = r"(?<![0-9A-Za-z_\u0370-\u03ff.)\]}%$])(?<![0-9][^\W\da-zA-Z])(?<![0-9][^\W\da-zA-Z]{2})"
"""Before a sign: a minus after a number, a Latin letter, a closing bracket or a number with a unit is a subtraction."""
SIGNED = (
    rf"(?:{NOT_BINARY}[-+]\$?|\$-|负|負|零下|\bnegative )?"
    rf"(?:{MIXED}|(?<!/){UNSIGNED}/{UNSIGNED}(?!/)|{UNSIGNED})(?: ?\\?%)?"
)
"""Also `3/4` and `1 3/4`. A minus between two terms is not a sign: `5-3` ends in 3, `= -3` and `-$3` in -3."""
MULTIPLIERS = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"k": 1000, "M": 10**6, "bn": 10**9, "lakh": 10**5, "crore": 10**7, "\u767e": 100, "\u5343": 1000},
    **{"\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8, "\ub9cc": 10**4, "\uc5b5": 10**8},
    **{"\u767e\u4e07": 10**6, "\u5343\u4e07": 10**7, "\u4e07\u4ebf": 10**12},
    **{"тыс": 1000, "тысяч": 1000, "тысячи": 1000, "млн": 10**6, "миллион": 10**6, "миллиона": 10**6},
    **{"миллионов": 10**6, "млрд": 10**9, "mil": 1000, "mille": 1000, "millones": 10**6, "millions": 10**6},
    **{"Millionen": 10**6, "Million": 10**6, "Tausend": 1000, "thousands": 1000, "dozens": 12, "billions": 10**9},
}
MULTIPLIER = (
    r"(?: ?(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|тысяч[аи]?|тыс|млн|миллион(?:а|ов)?|млрд)\b"
    r"|(?:bn|[kM])(?!\w)| ?(?:百万|千万|万亿|[万萬亿億만억]|百(?!分)|千(?![克米瓦卡焦赫帕伏字])))"
)
"""After a number: `1.5 million`, `1.5万`. Thousand also begins units: 千克 is a kilogram."""
NUMBER_IN_TEXT = re.compile(rf"{SIGNED}(?:{MULTIPLIER})?")
LEADING_NUMBER = re.compile(rf"[$€£¥]?(?:{SIGNED})(?![.)][ \t]+\S)")
"""The start of an answer; `1. Add them` and `2) So` are headings."""
WHOLE_NUMBER = re.compile(
    rf"(?P<sign>[-+] ?)?(?P<whole>[0-9]++ (?=[0-9]++/))?"
    rf"(?P<top>{UNSIGNED})(?:/(?P<bottom>{UNSIGNED}))?(?P<times>{MULTIPLIER})?(?P<percent> ?%)?"
)
POWER_OF_TEN = re.compile(
    rf"(?P<sign>[-+] ?)?(?:(?P<top>{UNSIGNED}) ?(?:\\times|\\cdot|\*|x) ?)?"
    r"10(?:\^|\*\*)\{?(?P<power>[-+]?[0-9]{1,3})\}?"
)
LATEX_FRACTION = re.compile(
    r"(?P<before>[0-9] *)?\\[dtc]?frac *(?:\{ *(?P<top>[-+]?[0-9.,]+) *\}|(?P<t>[0-9])) *"
    r"(?:\{ *(?P<bottom>[0-9.,]+) *\}|(?P<b>[0-9]))(?! ?[0-9])"
)
REPEATING = re.compile(
    r"(?P<sign>-)?(?P<whole>[0-9]{1,9})\.(?P<once>[0-9]{0,20})\\(?:overline|bar|dot) ?\{?(?P<again>[0-9]{1,20})\}?"
)
"""`0.1\\overline{6}`, which is 1/6."""
MINUS_WORD = re.compile(r"^(?:minus|negative|负|負|零下|マイナス|минус|menos|moins) ?(?=[0-9.])", re.IGNORECASE)
OTHER_GROUPS = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<spaces>[0-9]{1,3}(?: [0-9]{3}){1,9})"
    r"|(?P<dots>[0-9]{1,3}(?:(?:\.[0-9]{3}){2,9}|\.[0-9]{3}(?=,)))"
    r"|(?P<quotes>[0-9]{1,3}(?:'[0-9]{3}){1,9})|(?P<indian>[0-9]{1,2}(?:,[0-9]{2}){1,5},[0-9]{3}))"
    r"(?P<decimals>[.,][0-9]{1,9})?"
)
"""Thousands as other countries group them: `10 000`, `1.000.000`, `1'000`, `1,00,000`."""

DIGITS_ZH = {letter: value for value, letter in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
UNITS_ZH = {"十": 10, "百": 100, "千": 1000}
LARGE_ZH = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
NUMERAL_ZH = re.compile("[-负負]?[零〇一二两兩三四五六七八九十百千万萬亿億]{1,30}(?:点[零〇一二三四五六七八九]{1,20})?")
PERCENT_ZH = re.compile(r"百分之(.{1,20})")
FRACTION_ZH = re.compile(r"(?P<sign>[-负負])?(?:(?P<whole>[^又]{1,20})又)?(?P<bottom>[^又]{1,20})分之(?P<top>.{1,20})")
SMALL_NUMBERS = """
zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: value for value, word in enumerate(SMALL_NUMBERS.split())} | {
    word: 10 * ten for ten, word in enumerate(TENS.split(), 2)
}
NEXT_WORD = "|".join([*WORDS, "hundred", "thousand", "million"])
WORDS_IN_TEXT = re.compile(
    rf"\b(?:{'|'.join(list(WORDS)[2:])})(?:[ -](?:and |a )?(?:{NEXT_WORD}))*\b"
    "|[零一二两三四五六七八九]*[十百千万亿][零一二两三四五六七八九十百千万亿]+",
    re.IGNORECASE,
)
"""A number in words. `one` alone is a pronoun more often."""
PARTS = {
    **{"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100},
}
FRACTION_IN_WORDS = re.compile(
    rf"(?:(?P<whole>[a-z -]{{3,40}}) and )?(?P<top>an?|{'|'.join(WORDS)})?[ -]?(?P<bottom>{'|'.join(PARTS)})s?"
)
"""`two thirds`, `two and a half`."""
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}


def numbers(text: str) -> tuple[Fraction, ...]:
    r"""Return the exact value of a text that is a number: `(x,)`, for a percentage `(x, x / 100)`; else `()`.

    Args:
        text: in ASCII as far as it can be: see `characters.plain`.

    Example:
        >>> numbers("1,000.5"), numbers("-1/2"), numbers("25%")
        ((Fraction(2001, 2),), (Fraction(-1, 2),), (Fraction(25, 1), Fraction(1, 4)))
        >>> numbers("1.5 million"), numbers("三百二十"), numbers("2x")
        ((Fraction(1500000, 1),), (Fraction(320, 1),), ())
    """
    if len(text) > LONGEST_NUMBER:
        return ()
    text = LATEX_FRACTION.sub(write_fraction, text.replace("{,}", ",").replace("\\!", "").replace("\\,", ""))
    text = MINUS_WORD.sub("-", " ".join(text.replace("\\%", "%").split()))
    match = WHOLE_NUMBER.fullmatch(text)
    if match is None:
        return other_numbers(text)
    top, bottom = (Fraction((match[part] or "1").replace(",", "")) for part in ("top", "bottom"))
    if bottom == 0 or (match["whole"] and top >= bottom):
        return ()
    value = (int(match["whole"] or 0) + top / bottom) * MULTIPLIERS.get((match["times"] or "").strip(), 1)
    value = -value if (match["sign"] or "").startswith("-") else value
    return (value, value / 100) if match["percent"] else (value,)


def write_fraction(match: re.Match[str]) -> str:
    r"""Return `\frac{1}{2}` as 1/2; after a digit it is the second part of a mixed number."""
    top, bottom = match["top"] or match["t"], match["bottom"] or match["b"]
    return f"{match['before'].strip()} {top}/{bottom}" if match["before"] else f"{top}/{bottom}"


def other_numbers(text: str) -> tuple[Fraction, ...]:
    """Return the value of a power of ten, of other groups of thousands, or of a number in words, as `numbers` does."""
    if (power := POWER_OF_TEN.fullmatch(text)) is not None:
        value = Fraction((power["top"] or "1").replace(",", "")) * Fraction(10) ** int(power["power"])
        return (-value if (power["sign"] or "").startswith("-") else value,)
    if (groups := OTHER_GROUPS.fullmatch(text)) is not None:
        whole = next(groups[kind] for kind in ("spaces", "dots", "quotes", "indian") if groups[kind])
        value = Fraction(re.sub("[^0-9]", "", whole) + (groups["decimals"] or "").replace(",", "."))
        return (-value if groups["sign"] == "-" else value,)
    if (repeating := REPEATING.fullmatch(text)) is not None:
        once, again = repeating["whole"] + repeating["once"], repeating["again"]
        value = Fraction(int(once + again) - int(once), 10 ** len(repeating["once"]) * (10 ** len(again) - 1))
        return (-value if repeating["sign"] else value,)
    if (share := re.fullmatch("([0-9]{1,9}) out of ([1-9][0-9]{0,9})", text)) is not None:
        return (Fraction(int(share[1]), int(share[2])),)
    if (percent := PERCENT_ZH.fullmatch(text)) is not None:
        return tuple(part for value in numbers(percent[1])[:1] for part in (value, value / 100))
    if (fraction := FRACTION_ZH.fullmatch(text)) is not None:
        whole, bottom, top = (numbers(fraction[part] or "0") for part in ("whole", "bottom", "top"))
        if not whole or not bottom or not top or not bottom[0]:
            return ()
        value = whole[0] + top[0] / bottom[0]
        return (-value if fraction["sign"] else value,)
    value_in_words = chinese_numeral(text) if NUMERAL_ZH.fullmatch(text) else english_numeral(text)
    return () if value_in_words is None else (value_in_words,)


def chinese_numeral(text: str) -> Fraction | None:
    """Return the value of a Chinese numeral, such as 三百二十 or 二点五; None if its digits are out of order."""
    sign = -1 if text[0] in "-负負" else 1
    whole, _, decimals = text.lstrip("-负負").partition("点")
    fraction = Fraction("0." + "".join(str(DIGITS_ZH[digit]) for digit in decimals)) if decimals else Fraction(0)
    if all(letter in DIGITS_ZH for letter in whole):
        return sign * (int("".join(str(DIGITS_ZH[letter]) for letter in whole)) + fraction) if whole else None
    total = section = digit = 0
    for letter in whole:
        if letter in DIGITS_ZH:
            if digit:
                return None
            digit = DIGITS_ZH[letter]
        elif letter in UNITS_ZH:
            section += (digit or 1) * UNITS_ZH[letter]
            digit = 0
        else:
            total, section, digit = (total + section + digit) * LARGE_ZH[letter], 0, 0
    return sign * (total + section + digit + fraction)


def english_numeral(text: str) -> Fraction | None:
    """Return the value of an English number in words, such as `twenty-one` or `three hundred and five`."""
    if len(text) > 100 or not text[:1].isalpha():
        return None
    if (fraction := FRACTION_IN_WORDS.fullmatch(text.lower())) is not None:
        return fraction_in_words(fraction)
    sign, words = 1, re.split(r"[\s-]+", text.lower())
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    if words[:2] == ["half", "a"] and words[2:] == ["dozen"]:
        return Fraction(6)
    if words[-1] == "and":
        return None
    words = [word for word in words[:1] if word not in ("a", "an")] + [word for word in words[1:] if word != "and"]
    if words[:1] == ["dozen"]:
        return Fraction(12)
    if not words or not all(word in WORDS or word in SCALES for word in words):
        return None
    total = section = 0
    for word in words:
        if word in WORDS:
            section += WORDS[word]
        elif word == "hundred":
            section = (section or 1) * 100
        else:
            total, section = total + (section or 1) * SCALES[word], 0
    return Fraction(sign * (total + section))


def fraction_in_words(match: re.Match[str]) -> Fraction | None:
    """Return the value of `half`, `two thirds` or `two and a half`; None for the ordinal `third`."""
    whole = english_numeral(match["whole"]) if match["whole"] else Fraction(0)
    if whole is None or (match["top"] is None and match["bottom"] != "half"):
        return None
    return whole + Fraction(WORDS.get(match["top"] or "one", 1), PARTS[match["bottom"]])
