"""Stop on-policy training that starts to destroy the student, and name the signs and the remedies."""

from __future__ import annotations

import math
from pathlib import Path

from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.training.hooks import Hook, Row, TrainingStopped

ENTROPY_FLOOR = 0.1
"""Nats. Below this a doubled entropy does not count: a new learning rate alone can cause it."""
SAMPLED_FALL, GREEDY_SLACK = 0.1, 0.02
"""Accuracy that sampled replies may lose while greedy replies lose less than the slack."""


class CollapseDetector(Hook):
    """Reads each row of the log. After a resume it reads the earlier rows first.

    Two signs stop a run:

    - The entropy of the student's next token exceeds `entropy_growth` times that of the first row, in two consecutive
      rows. The distribution is being flattened, as by an objective without a proper fixed point.
    - Sampled replies become less accurate while greedy replies stay as accurate as before. The likeliest token is still
      right, and the probability of all others grows.

    A fall of the sampled accuracy within two standard errors is chance.

    Args:
        folder: of the stage, with its `metrics.jsonl`.
        entropy_growth: above 1, or None to ignore the entropy.
        replies: sampled in a step; None: so many that there is no chance.
    """

    def __init__(self, folder: Path, entropy_growth: float | None, replies: int | None = None) -> None:
        self.folder, self.entropy_growth, self.replies = folder, entropy_growth, replies
        self.evaluated_step = 0
        self.first_entropy: float | None = None
        self.high_rows = 0
        self.calm_step = self.best_step = 0  # the newest step before the entropy rose, and before accuracy fell
        self.sampled: list[float] = []  # of the rows since the last evaluation
        self.best_sampled = self.best_greedy = 0.0
        self.started = False

    def on_row(self, step: int, row: Row) -> None:
        """Check the next row. Raises TrainingStopped."""
        if not self.started:
            self.started = True
            for earlier in read_metrics(self.folder):
                if earlier["step"] < step:
                    self.check(earlier["step"], earlier)
        self.check(step, row)

    def good_until(self) -> int | None:
        """Return the step of the last row before the entropy rose, or None if the last row is not high."""
        return self.calm_step if self.high_rows else None

    def check(self, step: int, row: Row) -> None:
        """Check one row for both signs."""
        entropy, sampled = row.get("train/entropy"), row.get("train/accuracy")
        if entropy is not None and self.entropy_growth is not None:
            self.check_entropy(step, entropy, self.entropy_growth)
        if sampled is not None:
            self.sampled.append(sampled)
        if row.get("eval/accuracy") is not None and self.sampled:
            self.check_accuracy(step, sum(self.sampled) / len(self.sampled), row["eval/accuracy"])
            self.sampled, self.evaluated_step = [], step

    def check_entropy(self, step: int, entropy: float, growth: float) -> None:
        """Raise TrainingStopped if the entropy is too high for the second time in a row."""
        if self.first_entropy is None:
            self.first_entropy = entropy
        high = entropy > growth * max(self.first_entropy, ENTROPY_FLOOR)
        self.high_rows = self.high_rows + 1 if high else 0
        self.calm_step = self.calm_step if high else step
        if self.high_rows >= 2:
            raise TrainingStopped(
                f"The student's entropy is {entropy:.3f} nats at step {step}, more than {growth:g} times the initial "
                f"{self.first_entropy:.3f}: its distribution is being flattened. Lower the learning rate, raise "
                "objective.nll_weight and lower objective.pair_weight, or set grpo.max_entropy_growth to null to "
                "continue.",
                good_until=self.calm_step,
            )

    def check_accuracy(self, step: int, sampled: float, greedy: float) -> None:
        """Raise TrainingStopped if sampled replies are worse than before, and greedy ones are not."""
        mean, fall = (sampled + self.best_sampled) / 2, SAMPLED_FALL
        if self.replies is not None:
            count = self.replies * (step - self.evaluated_step)
            fall = max(fall, 2 * math.sqrt(2 * mean * (1 - mean) / count))
        if sampled < self.best_sampled - fall and greedy >= self.best_greedy - GREEDY_SLACK:
            raise TrainingStopped(
                f"Sampled replies are {sampled:.1%} right up to step {step}, and were {self.best_sampled:.1%} right "
                f"before. Greedy replies stay at {greedy:.1%}: probability leaks from the right tokens to all others. "
                "Lower the learning rate, raise objective.nll_weight and lower objective.pair_weight, or stay near "
                "the start with grpo.reference_kl.",
                good_until=self.best_step,
            )
        if sampled >= self.best_sampled:
            self.best_step = step
        self.best_sampled, self.best_greedy = max(self.best_sampled, sampled), max(self.best_greedy, greedy)
