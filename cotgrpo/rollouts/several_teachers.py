"""On-policy batches of several live teachers: each batch has one, by its share or by a field of the questions' rows.

GRPO here is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cotgrpo.data.sources import DataError
from cotgrpo.rollouts.rollouts import RolloutPrompt, Rollouts, metric
from cotgrpo.types import GhostBatch, Metrics, Params

OTHERS = "*"
"""Stands for every value of the field that no teacher is named for."""
TEACHERS = 0x7465
"""Mixed into the seed of the draws of teachers."""


class SeveralTeachers:
    """Batches of several teachers. Which of them has batch n is drawn by their shares, from the seed and n.

    All batches are numbered together, so that two teachers of the same questions share one order of them.

    Args:
        sources: the batches of each teacher, by its name. All have the same settings.
        shares: share of the batches of each, above 0. They are divided by their sum.
        seed: of the draws.
    """

    def __init__(self, sources: Mapping[str, Rollouts], shares: Mapping[str, float], *, seed: int) -> None:
        self.sources, self.seed = dict(sources), seed
        total = sum(shares.values())
        self.shares = [shares[name] / total for name in self.sources]
        self.updates_per_rollout = next(iter(self.sources.values())).settings.updates_per_rollout
        self.taken = 0

    def teacher_of(self, number: int) -> str:
        """Return the teacher of batch `number`."""
        rollout = number // self.updates_per_rollout
        drawn = np.random.default_rng([TEACHERS, self.seed, rollout]).choice(len(self.shares), p=self.shares)
        return list(self.sources)[int(drawn)]

    def set_params(self, trained: Params) -> None:
        """Set the trained parameters that draw the next batch."""
        self.sources[self.teacher_of(self.taken)].set_params(trained)

    def __next__(self) -> GhostBatch:
        source = self.sources[self.teacher_of(self.taken)]
        source.taken, self.taken = self.taken, self.taken + 1
        return next(source)

    def observed(self) -> Metrics:
        """Return the metrics of the newest replies, and each teacher's share of the batches."""
        newest = self.teacher_of(self.taken - 1)
        return self.sources[newest].observed() | {f"teacher/{name}": metric(name == newest, 1) for name in self.sources}

    def get_state(self) -> dict[str, Any]:
        """Return the position of every source."""
        return {"taken": self.taken, "sources": {name: source.get_state() for name, source in self.sources.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        self.taken = state["taken"]
        for name, source in self.sources.items():
            source.set_state(state["sources"][name])


def by_field(
    questions: Sequence[RolloutPrompt], field: str, teachers: Mapping[str, str]
) -> dict[str, list[RolloutPrompt]]:
    """Return the questions of each teacher.

    Args:
        questions: what the student replies to.
        field: of their rows.
        teachers: teacher of each value of the field. `OTHERS` is that of all values that are not named.

    Raises:
        DataError: a row without a teacher, or a teacher without a row.
    """
    found: dict[str, list[RolloutPrompt]] = {name: [] for name in dict.fromkeys(teachers.values())}
    for asked in questions:
        value = asked.question.row.get(field)
        name = teachers.get(str(value), teachers.get(OTHERS))
        if name is None:
            place = asked.question.source or f"the question {asked.question.question!r:.60}"
            what = f"no field {field!r}" if value is None else f"{field} {value!r:.40}"
            raise DataError(
                f"{place} has {what}, for which grpo.ghosts.teachers names no teacher: it has {', '.join(teachers)}. "
                f"Add it, or {OTHERS!r} for all others."
            )
        found[name].append(asked)
    for name, rows in found.items():
        if not rows:
            values = [value for value, teacher in teachers.items() if teacher == name]
            raise DataError(f"No question has the {field} {' or '.join(values)} of the teacher {name}. Remove it.")
    return found
