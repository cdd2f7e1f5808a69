"""Stops on-policy training that has begun to destroy the student, with a message that says what was seen and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.training.loop import TrainingStopped

ENTROPY_FLOOR = 0.1
"""Nats. A student that is surer than this is not flattened by becoming half as sure: a new learning rate alone does that."""
SAMPLED_FALL, GREEDY_SLACK = 0.1, 0.02
"""Accuracy that sampled replies may lose while greedy ones lose less than the slack."""


class CollapseDetector:
    """Reads each row of the log. A resumed run is judged by all its rows, those before it too.

    Two things stop a run. The entropy of the student's next token is, in two rows one after the other, more than `entropy_growth` times that of the first row:
    the distribution is being flattened, as an objective without a proper fixed point does. Or the sampled replies answer worse than they did, while
    the greedy ones do as well as ever: the likeliest token is still right, and all the others grow.

    Args:
        folder: of the stage, with its `metrics.jsonl`.
        entropy_growth: above 1, or None: entropy stops nothing.
    """

    def __init__(self, folder: Path, entropy_growth: float | None) -> None:
        self.folder, self.entropy_growth = folder, entropy_growth
        self.first_entropy: float | None = None
        self.high_rows = 0
        self.sampled: list[float] = []  # of the rows since the last evaluation
        self.best_sampled = self.best_greedy = 0.0
        self.started = False

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes the next row of the log. Raises TrainingStopped."""
        if not self.started:
            self.started = True
            for earlier in read_metrics(self.folder):
                if earlier["step"] < row["step"]:
                    self.see(earlier)
        self.see(row)

    def see(self, row: dict[str, Any]) -> None:
        entropy, sampled = row.get("train/entropy"), row.get("train/accuracy")
        if entropy is not None and self.entropy_growth is not None:
            self.see_entropy(row["step"], entropy, self.entropy_growth)
        if sampled is not None:
            self.sampled.append(sampled)
        if row.get("eval/accuracy") is not None and self.sampled:
            self.see_accuracy(row["step"], sum(self.sampled) / len(self.sampled), row["eval/accuracy"])
            self.sampled = []

    def see_entropy(self, step: int, entropy: float, growth: float) -> None:
        if self.first_entropy is None:
            self.first_entropy = entropy
        high = entropy > growth * max(self.first_entropy, ENTROPY_FLOOR)
        self.high_rows = self.high_rows + 1 if high else 0
        if self.high_rows >= 2:
            raise TrainingStopped(
                f"The student's entropy is {entropy:.3f} nats at step {step}, more than {growth:g} times the {self.first_entropy:.3f} it began with: its "
                "distribution is being flattened. Lower the learning rate, give objective.nll_weight more and objective.pair_weight less, or set "
                "grpo.max_entropy_growth to null to go on all the same. Earlier checkpoints are intact."
            )

    def see_accuracy(self, step: int, sampled: float, greedy: float) -> None:
        if sampled < self.best_sampled - SAMPLED_FALL and greedy >= self.best_greedy - GREEDY_SLACK:
            raise TrainingStopped(
                f"Sampled replies answer {sampled:.1%} right up to step {step}, and {self.best_sampled:.1%} at best before, while greedy ones hold at "
                f"{greedy:.1%}: probability leaks from the right tokens to all others. Lower the learning rate, give objective.nll_weight more and "
                "objective.pair_weight less, or keep near the start with objective.reference_kl. Earlier checkpoints are intact."
            )
        self.best_sampled, self.best_greedy = max(self.best_sampled, sampled), max(self.best_greedy, greedy)
