"""pass@k and maj@k against all choices of k replies, groups of equal answers, and intervals against known values."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from cotgrpo.evaluation.estimators import (
    bootstrap_interval,
    majority_at_k,
    pass_at_k,
    vote_groups,
    wilson_interval,
)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 1), (5, 3), (6, 0), (6, 6), (7, 2)])
def test_pass_at_k_is_the_mean_over_all_choices(n: int, c: int) -> None:
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, chosen)), len(chosen))), abs=1e-15)


def test_pass_at_k_of_many_replies_does_not_lose_digits() -> None:
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(200, 100, 200) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_outside_its_range(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, c, k)


def by_choices(answers: Sequence[str | None], right: Sequence[str], k: int) -> float:
    """maj@k over all choices, each equally likely: the tied answers share the vote."""
    values = []
    for chosen in itertools.combinations(answers, k):
        votes = Counter(answer for answer in chosen if answer is not None)
        most = max(votes.values(), default=0)
        tied = [answer for answer, count in votes.items() if count == most]
        values.append(Fraction(sum(answer in right for answer in tied), len(tied)) if tied else Fraction(0))
    return float(sum(values) / len(values))


@pytest.mark.parametrize(
    "answers",
    [
        ["a"],
        [None],
        ["a", "b"],
        ["a", "b", "b"],
        ["a", "a", "b", "b", "c"],
        ["a", "b", "c", "d", "e", "f"],
        ["a", "a", None, None, None, "b"],
        ["b", "b", "b", "a", "a", "c", "c", None],
        ["a", "a", "a", "b", "b", "b", "c", "c", "d"],
    ],
)
def test_majority_at_k_is_the_mean_over_all_choices(answers: list[str | None]) -> None:
    counts = Counter(answer for answer in answers if answer is not None)
    for right in ([], ["a"], ["a", "c"]):
        groups = [(count, float(answer in right)) for answer, count in counts.items()]
        for k in range(1, len(answers) + 1):
            assert majority_at_k(groups, len(answers), k) == pytest.approx(by_choices(answers, right, k), abs=1e-12)


def test_majority_of_one_is_pass_at_one_and_that_of_many_is_quick() -> None:
    assert majority_at_k([(3, 1.0), (4, 0.0)], 8, 1) == pytest.approx(pass_at_k(8, 3, 1))
    alone = [(1, float(i == 0)) for i in range(128)]
    assert majority_at_k(alone, 128, 64) == pytest.approx(0.5 / 64)
    assert majority_at_k([(2, 0.5)], 2, 2) == 0.5  # a verifier that looks at more than the answer


def test_answers_vote_together_if_they_are_equal() -> None:
    answers = ["1/2", "0.5", None, "2", "0.50", "three", "1/2"]
    right = [True, True, False, False, True, False, True]
    assert vote_groups(answers, right) == [(4, 1.0), (1, 0.0), (1, 0.0)]
    assert vote_groups([None, None], [False, False]) == []


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Two questions: the mean is 0, 1/2 or 1, with probability 1/4, 1/2 and 1/4.
        ([0.0, 1.0], 0.0, 1.0),
        # The number of ones is Binomial(10, 0.8): P(X <= 4) = 0.006, P(X <= 5) = 0.033, P(X = 10) = 0.107.
        ([1.0] * 8 + [0.0] * 2, 0.5, 1.0),
        # Binomial(20, 0.5): P(X <= 5) = 0.0207, P(X <= 6) = 0.0577, and the same from above.
        ([1.0, 0.0] * 10, 0.3, 0.7),
        # Halves: Binomial(20, 0.5) again, between 0.25 and 0.75.
        ([0.25, 0.75] * 10, 0.4, 0.6),
    ],
)
def test_the_bootstrap_interval_is_that_of_the_binomial(values: list[float], low: float, high: float) -> None:
    assert bootstrap_interval(values) == pytest.approx((low, high), abs=1e-12)


def test_the_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(400).tolist()
    half = 1.96 * np.std(values) / 20
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert bootstrap_interval(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.003)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_values_that_are_all_the_same_have_an_interval(share: float) -> None:
    """Every resample is the same then: an interval of no width would say that nothing is unsure."""
    low, high = bootstrap_interval([share] * 10)
    assert (low, high) == wilson_interval(10 * share, 10) and high - low > 0.2
