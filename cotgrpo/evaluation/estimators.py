"""Estimators over several replies to a question, pass@k and maj@k, and the intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cotgrpo.data.answers import grade

RESAMPLES = 10_000
"""Bootstrap resamples of the questions."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate that one of k replies is right (Chen et al. 2021, arXiv:2107.03374).

        1 - C(n - c, k) / C(n, k)

    Args:
        n: replies that were drawn.
        c: right ones among them, in [0, n].
        k: in [1, n].

    Example:
        >>> [round(pass_at_k(4, 1, k), 2) for k in (1, 2, 4)]
        [0.25, 0.5, 1.0]
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c} and k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(groups: Sequence[tuple[int, float]], n: int, k: int) -> float:
    """Return the probability that a vote among k of n replies is right, for a random choice of the k.

    It is exact: the mean over all C(n, k) choices. Groups with equally many votes win with equal probability. A reply
    without an answer does not vote. If no reply of the k has an answer, the vote is wrong.

    Args:
        groups: for each answer, its number of replies and the share of them that is right.
        n: all replies, at least as many as in the groups.
        k: in [1, n].

    Example:
        >>> majority_at_k([(2, 1.0), (1, 0.0)], 3, 3), majority_at_k([(1, 1.0), (1, 0.0)], 2, 2)
        (1.0, 0.5)
    """
    voters = sum(votes for votes, _ in groups)
    if not 1 <= k <= n or voters > n:
        raise ValueError(f"majority_at_k needs 1 <= k <= n and at most n votes, got n={n}, k={k} and {voters} votes.")
    total = 0.0
    for winner, (votes, share) in enumerate(groups):
        others = [count for i, (count, _) in enumerate(groups) if i != winner]
        for most in range(1, min(votes, k) + 1) if share else ():
            ways = ways_to_lose(others, n - voters, k - most, most)
            won = sum(count / (ties + 1) for ties, count in enumerate(ways))
            total += share * math.comb(votes, most) * won / math.comb(n, k)
    return min(total, 1.0)


def ways_to_lose(groups: Sequence[int], silent: int, size: int, most: int) -> list[int]:
    """Count the choices of `size` replies in which no group has more than `most`, by how many groups have as many.

    Args:
        groups: replies of each group.
        silent: replies without an answer, of which any number may be chosen.
        size: replies to choose.
        most: at least 1.
    """
    # ways[s][ties]: of s replies from the groups so far. Groups below `most` never reach it: they count as one.
    free = silent + sum(count for count in groups if count < most)
    ways = [[math.comb(free, s)] for s in range(size + 1)]
    for count in (count for count in groups if count >= most):
        found = [[0] * (len(ways[0]) + 1) for _ in range(size + 1)]
        for s, by_ties in enumerate(ways):
            for ties, number in enumerate(by_ties):
                for chosen in range(min(most, size - s) + 1) if number else ():
                    found[s + chosen][ties + (chosen == most)] += number * math.comb(count, chosen)
        ways = found
    return ways[size]


def vote_groups(answers: Sequence[str | None], correct: Sequence[bool]) -> list[tuple[int, float]]:
    """Return the groups of equal answers: how many replies each has, and the share of them that is right.

    Two answers are equal if `grade` takes the second for a right reply, were the first the right answer. An answer
    joins the first group whose first answer it equals. None, no answer, is in no group.
    """
    leaders: list[str] = []
    group_of: dict[str, int] = {}
    members: list[list[bool]] = []
    for answer, right in zip(answers, correct, strict=True):
        if answer is None:
            continue
        if answer not in group_of:
            same = (i for i, leader in enumerate(leaders) if grade(answer, leader).correct)
            group_of[answer] = next(same, len(leaders))
            if group_of[answer] == len(leaders):
                leaders.append(answer)
                members.append([])
        members[group_of[answer]].append(right)
    return [(len(group), sum(group) / len(group)) for group in members]


def wilson_interval(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    p = correct / n

    Args:
        correct: in [0, n].
        n: at least 1.
        z: quantile of the normal distribution; the default is that of a 95 % interval.

    Example:
        >>> [round(x, 3) for x in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    p, share = correct / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + share / (4 * n))
    low, high = (p + share / 2 - half) / (1 + share), (p + share / 2 + half) / (1 + share)
    return max(low, 0.0), min(high, 1.0)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean over questions: the percentile bootstrap (Efron 1979).

    The questions are drawn again, with replacement, `RESAMPLES` times. The interval holds the middle 95 % of the means.
    If all values are the same, every resample is too, which says nothing: then it is Wilson's interval of that share.

    Args:
        values: one for each question, each in [0, 1].
        seed: of the resamples.

    Example:
        >>> bootstrap_interval([0.0, 1.0])
        (0.0, 1.0)
    """
    n, mean = len(values), sum(values) / len(values)
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    if len(distinct) == 1:
        return wilson_interval(float(distinct[0]) * n, n)
    # The number of questions with each value is all that a mean depends on.
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    low, high = np.quantile(drawn @ distinct / n, [0.025, 0.975])
    return max(min(float(low), mean), 0.0), min(max(float(high), mean), 1.0)
