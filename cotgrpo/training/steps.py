"""Make the train step of a stage. `sft` and `grpo` run it, and `plan` compiles it for other machines."""

from __future__ import annotations

from typing import Any, Literal

import optax

from cotgrpo import objectives
from cotgrpo.config import Config
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
    """Return the pure step of a stage, without jit: `step(state, batch, *rest)`.

    With LoRA the state holds adapters, and `rest` starts with their frozen base. If `needs_reference`, the reference's
    parameters follow. `tile_size` is that of `cotgrpo.tiled_loss`; None: its default on JAX's platform here.
    """
    parts: dict[str, Any] = {"micro_batches": getattr(config, stage).micro_batches, "tile_size": tile_size}
    reference = student if needs_reference(config, stage) else None

    def make_step(student: Student) -> Step:
        if stage == "sft":
            return make_sft_step(student, tx, **parts)
        gain = config.grpo.reward_gain
        return make_grpo_step(student, tx, config.grpo.full_objective, reference=reference, reward_gain=gain, **parts)

    lora = config.lora
    return make_step(student) if lora is None else make_lora_step(make_step, student, lora)


def needs_reference(config: Config, stage: StageName) -> bool:
    """Return whether the objective reads the student as it was before this stage."""
    return stage == "grpo" and objectives.needs_reference(config.grpo.full_objective)
