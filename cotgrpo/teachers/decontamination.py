"""Decontamination: find texts that share an n-gram of words with a test set, in any language.

Brown et al. 2020 (arXiv:2005.14165, appendix C) use 13 words. Chinese, Japanese, Thai, Lao, Khmer and Burmese have no
spaces between words, so each character is a token there. An ideograph counts as a word; of kana and of the other
letters, two do. So 13 words are 13 ideographs, or 26 letters of Thai.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

IDEOGRAPHS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
HALF_WORDS = (
    "\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001b000-\U0001b16f"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u0e01-\u0e30\u0e32-\u0e33\u0e40-\u0e46"  # Thai
    "\u0e80-\u0eb0\u0eb2-\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065-\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Burmese
    "\ua9e0-\ua9ef\ua9fa-\ua9ff\uaa60-\uaa7a"
    "\u1950-\u19ab\u1a20-\u1a54\uaa80-\uaac2"  # Tai scripts
)
"""Letters of scripts without spaces between words, without their marks, as ranges of a character class."""
IS_ALONE = re.compile(f"[{IDEOGRAPHS}{HALF_WORDS}]")
IS_HALF = re.compile(f"[{HALF_WORDS}]")
ASCII_WORD = re.compile(r"[0-9]+(?:\.[0-9]+)+(?![A-Za-z0-9])|[A-Za-z0-9]+")
OPERATOR = re.compile(r"[-+*/^<>=\u00b7\u00d7\u00f7\u2010-\u2014\u2212\u22c5\u2264\u2265](?=\s*[\d(])")
SAME_OPERATORS = str.maketrans("\u00b7\u00d7\u00f7\u2010\u2011\u2012\u2013\u2014\u2212\u22c5", "**/------*")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@functools.cache
def marks_and_formats() -> tuple[str, str]:
    """Return the combining marks (vowel signs, accents) and the invisible format characters, as character classes."""
    found: dict[str, list[str]] = {"M": [], "C": []}
    for code in itertools.chain(range(0x20000), range(0xE0000, 0xE0200)):  # the planes between hold none
        category = unicodedata.category(chr(code))
        if category[0] == "M":
            found["M"].append(chr(code))
        elif category == "Cf":
            found["C"].append(chr(code))
    marks, formats = ("".join(map(re.escape, found[kind])) for kind in "MC")
    return marks, formats


@functools.cache
def word_pattern() -> re.Pattern[str]:
    r"""Return the pattern of a word: a number, a letter of a script without spaces, or a run of letters and digits.

    A combining mark belongs to its letter, which `\w` alone breaks in two: in Hindi, most words.
    """
    marks, _ = marks_and_formats()
    alone = IDEOGRAPHS + HALF_WORDS
    return re.compile(rf"\d+(?:\.\d+)+(?!\w)|[{alone}][{marks}]*|(?:[^\W_{alone}]++[{marks}]*+)+")


def words(text: str) -> list[str]:
    """Return the words of a text, without punctuation, white space and case.

    Full-width and other forms of a letter or digit are equal (NFKC), as are digits of all scripts. `1,000` is 1000.

    Example:
        >>> words("Ｔｏｍ has 1,000 apples.")
        ['tom', 'has', '1000', 'apples']
        >>> words("答案是１２元")
        ['答', '案', '是', '12', '元']
    """
    if text.isascii():
        return ASCII_WORD.findall(THOUSANDS.sub("", text.casefold()))
    _, formats = marks_and_formats()
    text = re.sub(f"[{formats}]", "", unicodedata.normalize("NFKC", text))
    text = re.sub(r"[^\D0-9]", lambda digit: str(unicodedata.digit(digit[0])), text)
    return word_pattern().findall(unicodedata.normalize("NFKC", THOUSANDS.sub("", text.casefold())))


def operators(text: str) -> tuple[str, ...]:
    """Return the operators before numbers in a text.

    Example:
        >>> operators("What is 3 + 4 \u00d7 5?")
        ('+', '*')
    """
    plain = unicodedata.normalize("NFKC", text)
    return tuple(found[0].translate(SAME_OPERATORS) for found in OPERATOR.finditer(plain))


def ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of n words."""
    return (tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def counted_runs(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield, from every token on, the shortest run that counts n words; nothing if all tokens count fewer."""
    counts = [1 if IS_HALF.match(token) else 2 for token in tokens]
    total = end = 0
    for start, count in enumerate(counts):
        while total < 2 * n and end < len(counts):
            total += counts[end]
            end += 1
        if total < 2 * n:
            return
        yield tuple(tokens[start:end])
        total -= count


def join_words(tokens: Sequence[str]) -> str:
    """Return words as a text, without blanks next to letters of scripts that have none."""
    text = "".join(tokens[:1])
    for left, right in itertools.pairwise(tokens):
        text += right if IS_ALONE.match(left) or IS_ALONE.match(right) else f" {right}"
    return text


class TestQuestions:
    """The n-grams of test questions.

    Args:
        questions: texts. A text of fewer than n words matches only the same words and operators (`3 + 4`), and no
            others.
        n: words in an n-gram, >= 1. In a script without spaces, an ideograph is a word, and so are two other letters.

    Attributes:
        fingerprint: a hash of the questions and n.

    Example:
        >>> test = TestQuestions(["How many apples does Tom have left?"], n=4)
        >>> test.overlap("So, how many apples does Ann have?")
        'how many apples does'
        >>> test.overlap("How many pears does Tom have?") is None
        True
    """

    __test__ = False  # for pytest: this class holds no tests

    def __init__(self, questions: Iterable[str], n: int) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        self.n = n
        self.known: set[tuple[str, ...]] = set()
        self.short: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
        digest = hashlib.sha256(str(n).encode())
        for text in questions:
            digest.update(text.encode("utf-8", "replace") + b"\0")
            tokens = words(text)
            runs = set(counted_runs(tokens, n))
            self.known.update(runs)
            if not runs:
                self.short.add((tuple(tokens), operators(text)))
        self.fingerprint = digest.hexdigest()

    def overlap(self, text: str) -> str | None:
        """Return the first words that the text shares with a test question, or None."""
        tokens = words(text)
        whole = tuple(tokens)
        if whole and (whole, operators(text)) in self.short:
            return join_words(whole)
        return next((join_words(found) for found in counted_runs(tokens, self.n) if found in self.known), None)
