r"""Pool the paired differences of arms of `ablation.py` over the students of several machines.

    python benchmarks/pooled.py --json FILES

Each file holds the runs of one machine. Sums are rounded in another order there, so that the same seeds make other
students. A student's difference is between two arms that start from it, each at its best learning rate. The interval is
Student's t over students. The p-value is that of the sign test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation import at_best_rate
from paired import Interval, as_good
from scipy import stats  # type: ignore[import-untyped]

SFT = "nll, teacher_forced"
TEXT = "nll, teacher_forced, new questions"
GHOSTS = "nll, on_policy, new questions"
PAIRS = [(GHOSTS, SFT), (TEXT, SFT), (GHOSTS, TEXT)]


def differences(files: Sequence[Sequence[dict[str, Any]]], ours: str, theirs: str, steps: int) -> np.ndarray:
    """Return the difference in test accuracy of two arms, one for each student that has both."""
    found = []
    for rows in files:
        by_seed = [{row["seed"]: row["test"] for row in at_best_rate(rows, arm, steps)} for arm in (ours, theirs)]
        found += [by_seed[0][seed] - by_seed[1][seed] for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]
    return np.array(found)


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean with Student's interval. At least two values are needed."""
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def sign_test(values: np.ndarray) -> float:
    """Return the two-sided p-value of the sign test. Differences of 0 do not count."""
    ahead, unequal = int((values > 0).sum()), int((values != 0).sum())
    return float(stats.binomtest(ahead, unequal).pvalue) if unequal else 1.0


def table(files: Sequence[Sequence[dict[str, Any]]], steps: int, margin: float) -> str:
    """Return the table of pairs of arms. "As good" is equivalence within the margin at 5 %."""
    columns = ["arm", "against", "students", "difference, points (95 %)", "(90 %)", "ahead", "p"]
    columns.append(f"at a margin of {100 * margin:g} %")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for ours, theirs in PAIRS:
        values = differences(files, ours, theirs, steps)
        narrow = t_interval(values, 0.9)
        cells = [ours, theirs, str(len(values)), t_interval(values).signed(), narrow.signed()]
        cells += [f"{(values > 0).sum()} of {len(values)}", f"{sign_test(values):.2g}", as_good(narrow, margin)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, nargs="+", required=True, help="files of ablation.py, one for each machine"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--margin", type=float, default=0.01)
    options = parser.parse_args(arguments)
    files = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in options.json]
    print(table(files, options.steps, options.margin))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
