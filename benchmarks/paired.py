"""Compare arms of a study on the same questions: intervals, paired differences and tests.

Verdicts are arrays `[S, Q]` of 0 and 1: a row for each seed, a column for each question. Arms that are compared have
the same questions, and their seeds belong together in order.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cotgrpo.evaluation.estimators import wilson_interval

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        value: the mean over seeds and questions.
        low, high: the interval's ends.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def signed(self) -> str:
        """Return the interval of a difference, with its signs."""
        return f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def bootstrap(values_SQ: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean with the percentile bootstrap's interval, over seeds and questions at once.

    Each resample draws S seeds and Q questions with replacement, independently of each other, and takes the mean of the
    table of both. So the interval holds for other questions and other seeds. With one seed it holds for questions only.

    Args:
        values_SQ: a number for each seed and question: a verdict, or a difference of two verdicts.
        level: the share of resamples between the ends, in (0, 1).
        seed: of the resamples.
    """
    values_SQ = np.asarray(values_SQ, np.float64)
    (seeds, questions), rng = values_SQ.shape, np.random.default_rng(seed)
    count_S = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 1_000):  # so that the table of counts stays small
        part = slice(start, start + 1_000)
        count_Q = rng.multinomial(questions, np.full(questions, 1 / questions), 1_000)
        means[part] = np.einsum("rs,sq,rq->r", count_S[part], values_SQ, count_Q, optimize=True) / (seeds * questions)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values_SQ.mean()), float(low), float(high))


def accuracy(verdicts_SQ: np.ndarray) -> Interval:
    """Return the share of right answers with its 95 % interval.

    It is `bootstrap`. Where all verdicts, and so all resamples, are the same, it is Wilson's interval of the questions.
    """
    verdicts_SQ = np.asarray(verdicts_SQ, np.float64)
    if verdicts_SQ.min() == verdicts_SQ.max():
        value, questions = float(verdicts_SQ.flat[0]), verdicts_SQ.shape[1]
        return Interval(value, *wilson_interval(value * questions, questions))
    return bootstrap(verdicts_SQ)


def difference(ours_SQ: np.ndarray, theirs_SQ: np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean of `ours - theirs`, paired by seed and question, with its bootstrap interval.

    Raises:
        ValueError: the arms have other seeds or questions.
    """
    if np.shape(ours_SQ) != np.shape(theirs_SQ):
        raise ValueError(f"Paired arms need the same shape, got {np.shape(ours_SQ)} and {np.shape(theirs_SQ)}.")
    return bootstrap(np.asarray(ours_SQ, np.float64) - np.asarray(theirs_SQ, np.float64), level)


def sign_flip(values_Q: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p-value of the paired permutation test that the mean is 0.

    Each of `RESAMPLES` resamples gives every difference a random sign. The p-value is the share of means that lie as
    far from 0 as the one that was found, which counts as one of them.
    """
    values_Q = np.asarray(values_Q, np.float64)
    signs_RQ = np.random.default_rng(seed).choice([-1.0, 1.0], (RESAMPLES, len(values_Q)))
    far = np.abs(signs_RQ @ values_Q) >= abs(values_Q.sum()) - 1e-9
    return float((1 + far.sum()) / (1 + RESAMPLES))


def mcnemar(ours_Q: np.ndarray, theirs_Q: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947, doi:10.1007/BF02295996).

        p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c))

    b and c are the numbers of questions that only one of two students answers right. It is a test of two trained
    students, not of two methods: it knows one seed.
    """
    ours, theirs = np.asarray(ours_Q, bool), np.asarray(theirs_Q, bool)
    b, c = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if b == c:
        return 1.0
    return min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))


def as_good(found: Interval, margin: float) -> str:
    """Return what an interval of a difference says: "better", "worse", "as good" within the margin, or "open".

    "As good" is the test of equivalence at 5 % if the interval is that of the level 0.9 (Schuirmann 1987,
    doi:10.1007/BF01068419).
    """
    if found.low > 0 and found.value > margin:
        return "better"
    if found.high < 0 and found.value < -margin:
        return "worse"
    return "as good" if -margin < found.low and found.high < margin else "open"
