"""Decontamination: find texts that share an n-gram of words with a test set.

Brown et al. 2020 (arXiv:2005.14165, appendix C) use 13 words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case, without punctuation and white space."""
    return WORD.findall(text.casefold())


def ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of n words."""
    return (tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


class TestQuestions:
    """The n-grams of test questions.

    Args:
        questions: texts. A text of fewer than n words matches only the same words and no others.
        n: words in an n-gram, >= 1.

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
        self.short: set[tuple[str, ...]] = set()
        for tokens in map(words, questions):
            if len(tokens) < n:
                self.short.add(tuple(tokens))
            else:
                self.known.update(ngrams(tokens, n))

    def overlap(self, text: str) -> str | None:
        """Return the first words that the text shares with a test question, or None."""
        tokens = words(text)
        whole = tuple(tokens)
        if whole and whole in self.short:
            return " ".join(whole)
        return next((" ".join(found) for found in ngrams(tokens, self.n) if found in self.known), None)
