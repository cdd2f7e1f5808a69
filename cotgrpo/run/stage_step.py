"""The train step of a stage, made from its config in one place: `sft` and `grpo` run it, and `plan` compiles it for machines that are not there."""

from __future__ import annotations

from typing import Literal

import optax

from cotgrpo.config import Config
from cotgrpo.train_steps import Step, make_grpo_step, make_sft_step
from cotgrpo.types import Student

StageName = Literal["sft", "grpo"]


def stage_step(config: Config, stage: StageName, student: Student, tx: optax.GradientTransformation) -> Step:
    """The pure step of a stage, not jitted; it takes a reference's parameters as its third argument where `needs_reference`."""
    micro_batches = getattr(config, stage).micro_batches
    if stage == "sft":
        return make_sft_step(student, tx, micro_batches=micro_batches)
    reference = student if needs_reference(config, stage) else None
    objective = config.grpo.objective.build()
    return make_grpo_step(student, tx, objective, reference=reference, micro_batches=micro_batches)


def needs_reference(config: Config, stage: StageName) -> bool:
    """Whether the objective keeps near the student before this stage."""
    return stage == "grpo" and getattr(config.grpo.objective.build(), "needs_reference", False)
