"""The train step of a stage, made from its config in one place: `sft` and `grpo` run it, and `plan` compiles it for machines that are not there."""

from __future__ import annotations

from typing import Any, Literal

import optax

from cotgrpo.config.settings import Config
from cotgrpo.models.lora import make_lora_step
from cotgrpo.train_steps import Step, make_grpo_step, make_sft_step
from cotgrpo.types import Student

StageName = Literal["sft", "grpo"]


def stage_step(
    config: Config,
    stage: StageName,
    student: Student,
    tx: optax.GradientTransformation,
    *,
    tile_size: int | None = None,
) -> Step:
    """The pure step of a stage, not jitted: `step(state, batch, *rest)`.

    The rest are LoRA's frozen base, where LoRA is on and the state holds adapters, and then a reference's parameters where `needs_reference`.
    `tile_size` is the token engine's; None: what suits JAX's platform here.
    """
    parts: dict[str, Any] = {"micro_batches": getattr(config, stage).micro_batches, "tile_size": tile_size}
    reference = student if needs_reference(config, stage) else None

    def make_step(student: Student) -> Step:
        if stage == "sft":
            return make_sft_step(student, tx, **parts)
        return make_grpo_step(student, tx, config.grpo.objective.build(), reference=reference, **parts)

    lora = config.lora.build()
    return make_step(student) if lora is None else make_lora_step(make_step, student, lora)


def needs_reference(config: Config, stage: StageName) -> bool:
    """Whether the objective keeps near the student before this stage."""
    return stage == "grpo" and getattr(config.grpo.objective.build(), "needs_reference", False)
