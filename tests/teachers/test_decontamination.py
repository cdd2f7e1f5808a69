"""N-grams shared with a test set."""

from __future__ import annotations

import pytest

from cotgrpo.teachers.decontamination import TestQuestions


def test_decontamination() -> None:
    test = TestQuestions(["The quick, brown fox jumps!", "Hi there"], n=4)
    assert test.overlap("Say THE quick brown fox.") == "the quick brown fox"
    assert test.overlap("quick brown fox leaps") is None and test.overlap("Hi there, you") is None
    assert test.overlap("hi THERE!") == "hi there" and test.overlap("") is None
    with pytest.raises(ValueError, match="at least 1"):
        TestQuestions([], 0)
