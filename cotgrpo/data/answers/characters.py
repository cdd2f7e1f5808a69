"""Characters of other scripts as ASCII: full-width and other digits, signs, brackets, punctuation, and math letters."""

from __future__ import annotations

import re
import unicodedata

FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
ONE_TO_ONE = str.maketrans(
    {
        **{"\u3000": " ", "\u00a0": " ", "\u202f": " ", "\u2007": " ", "\u2009": " ", "\u205f": " ", "\ufeff": " "},
        **dict.fromkeys("\u2212\ufe63\u2010\u2011\u2012\u2013\u2796", "-"),  # minus signs, hyphens and the en dash
        **{"\u2795": "+", "\u066a": "%", "\ufe6a": "%", "\u066b": ".", "\u066c": ",", "\u060c": ",", "\u061b": ";"},
        **{"\u3002": ".", "\uff61": ".", "\u3001": ",", "\u0964": ".", "\u061f": "?", "\u2236": ":", "\ufe55": ":"},
        **dict.fromkeys("\u201c\u201d\u201e\u300c\u300d\u300e\u300f\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2018\u2019", "'"),
        **{"\u3010": "[", "\u3011": "]", "\u3014": "(", "\u3015": ")", "\u2044": "/", "\u2215": "/"},
        **{"\uffe5": "\u00a5", "\uffe1": "\u00a3", "\uffe6": "\u20a9", "\uffe0": "\u00a2"},
    }
) | {code: letter for code, letter in FULL_WIDTH.items()}
"""Characters of one meaning. Each becomes one character, so places in the text stay."""
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufe0e\ufe0f]")
"""Zero-width characters and marks of the direction of writing."""
GROUP_SPACE = re.compile("(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")
"""A space that cannot break groups thousands: 10\u202f000."""
PICTURE = re.compile("[\U0001f300-\U0001faff\u2600-\u2794\u2797-\u27bf\u2234\u2235]")
"""Emoji, ticks, and "therefore"."""
OTHER_DIGIT = re.compile(r"(?![0-9])\d")
POWER = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
MATH_LETTER = re.compile("[\U0001d400-\U0001d7cd\u210e\u2124\u211d]")
ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|([0-9]+|[A-Za-z]))")
SYMBOLS = {
    **{"\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00d7": r"\times ", "\u00f7": "/", "\u00b7": r"\cdot "},
    **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u222a": r"\cup "},
    **{"\u2229": r"\cap ", "\u00b1": r"\pm ", "\u2208": r"\in ", "\u03b8": r"\theta ", "\u2103": "\u00b0C"},
    **{"\u2109": "\u00b0F", "\u339d": "cm", "\u339c": "mm", "\u339e": "km", "\u338f": "kg", "\u33a1": "m^2"},
}
SYMBOL = re.compile("|".join(map(re.escape, SYMBOLS)))


def same_length(text: str) -> str:
    """Return the text with ASCII digits, signs and punctuation; every character keeps its place.

    Example:
        >>> same_length("\uff0d\uff13\u3002")
        '-3.'
    """
    if text.isascii():
        return text
    text = PICTURE.sub(" ", text.translate(ONE_TO_ONE))
    return OTHER_DIGIT.sub(lambda digit: str(unicodedata.digit(digit[0])), text)


def plain(text: str) -> str:
    r"""Return the text in ASCII as far as it has the same meaning: also `½` as 1/2, `x²` as `x^{2}`.

    Mathematical symbols become LaTeX commands, and invisible characters are left out.
    """
    if text.isascii():
        return text
    text = same_length(GROUP_SPACE.sub("", INVISIBLE.sub("", text)))
    text = VULGAR.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("\u2044", "/") + " ", text)
    text = POWER.sub(lambda digits: f"^{{{same_length(unicodedata.normalize('NFKC', digits[0]))}}}", text)
    text = MATH_LETTER.sub(lambda letter: unicodedata.normalize("NFKC", letter[0]), text)
    text = ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    return SYMBOL.sub(lambda symbol: SYMBOLS[symbol[0]], text)
