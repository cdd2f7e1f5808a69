"""Make the train step of a stage, and count the steps. `sft` and `grpo` run it, and `plan` compiles it for others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import optax

from cotgrpo import objectives
from cotgrpo.atomic_files import find_json_object, write_json
from cotgrpo.config import Config, ConfigError, PrivilegedSelf
from cotgrpo.config.own_code import OwnObjective
from cotgrpo.config.sections import LARGEST_INT
from cotgrpo.data.batches import packed_rows
from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.data.template import Example
from cotgrpo.models.lora import make_lora_step
from cotgrpo.optimizers import with_moving_average
from cotgrpo.testing.objectives import check_objective
from cotgrpo.train_steps import Step, make_grpo_step, make_sft_step
from cotgrpo.types import Student

StageName = Literal["sft", "grpo"]
NOT_CARRIED = "which the batch does not carry"
EPOCHS_FILE = "epochs.json"
"""In a stage's folder: the number of steps that followed from its epochs when it began."""
TRIED_CASES = 2
"""Cases of each kind that an objective of the user's own is tried on."""


def stage_title(stage: StageName, config: Config) -> str:
    """Return the name of a stage in what a run prints: that of GRPO says whose contexts it trains on."""
    if stage == "sft":
        return stage
    return f"{stage} {'on-policy' if config.grpo.ghosts.on_policy else 'teacher-forced'}"


def stage_step(
    config: Config,
    stage: StageName,
    student: Student,
    tx: optax.GradientTransformation,
    *,
    tile_size: int | None = None,
    teacher: Student | None = None,
) -> Step:
    """Return the pure step of a stage, without jit: `step(state, batch, *rest)`.

    With LoRA the state holds adapters, and `rest` starts with their frozen base. If `needs_reference`, the reference's
    parameters follow. If `needs_teacher`, the reference is the live `teacher`; None: a model of the student's form.
    `tile_size` is that of `cotgrpo.tiled_loss`; None: its default on JAX's platform here.
    """
    parts: dict[str, Any] = {"micro_batches": getattr(config, stage).micro_batches, "tile_size": tile_size}
    reference = student if needs_reference(config, stage) else None
    if teacher is not None and needs_teacher(config, stage):
        reference = teacher

    def make_step(student: Student) -> Step:
        if stage == "sft":
            return make_sft_step(student, tx, **parts)
        gain = config.grpo.reward_gain
        return make_grpo_step(student, tx, config.grpo.full_objective, reference=reference, reward_gain=gain, **parts)

    lora = config.lora
    return make_step(student) if lora is None else make_lora_step(make_step, student, lora)


def check_own_code(config: Config, stage: StageName) -> None:
    """Load the functions of the user's own that a stage calls, and try the objective, before anything is read.

    An objective that reads extra arrays of a batch (`batch_fields`) is not tried here.

    Raises:
        OwnCodeError: one that cannot be loaded, takes other arguments, or is no objective.
        ConfigError: an objective that does not go with the source of the ghosts.
    """
    _ = config.verify.verifier
    own = config.grpo.objective
    if stage != "grpo" or not isinstance(own, OwnObjective):
        return
    draws = objectives.num_draws(own)
    if config.grpo.ghosts.on_policy and draws > 1:
        raise ConfigError(
            f"grpo.objective.function {own.function} draws {draws} tokens, but grpo.ghosts.source "
            f"{config.grpo.ghosts.source} has one at a context, that of the student's reply. Set its num_draws to 1."
        )
    if not objectives.batch_fields(own):
        try:
            check_objective(own, num_cases=TRIED_CASES)
        except OwnCodeError as error:
            if NOT_CARRIED not in str(error):  # it reads an extra array, which the batches of the stage may have
                raise
        except AssertionError as error:
            found = " ".join(str(error).split())
            raise OwnCodeError(f"grpo.objective.function {own.function} is no objective: {found}") from error


def stage_optimizer(config: Config, stage: StageName) -> optax.GradientTransformation:
    """Return the optimizer of a stage. It averages the parameters too if the student's average is the live ghost."""
    settings, ghosts = getattr(config, stage), config.grpo.ghosts
    tx: optax.GradientTransformation = settings.optimizer.build(settings.steps)
    if stage == "grpo" and isinstance(ghosts, PrivilegedSelf) and ghosts.self == "ema":
        return with_moving_average(tx, ghosts.decay)
    return tx


def needs_reference(config: Config, stage: StageName) -> bool:
    """Return whether the objective reads a frozen model: the student before this stage, or the live teacher."""
    return stage == "grpo" and objectives.needs_reference(config.grpo.full_objective)


def needs_teacher(config: Config, stage: StageName) -> bool:
    """Return whether that model is the live teacher."""
    return stage == "grpo" and objectives.reads_teacher(config.grpo.full_objective)


@dataclasses.dataclass(frozen=True)
class EpochSteps:
    """The steps that follow from a number of epochs: `ceil(epochs * rows / batch_size)`.

    Attributes:
        epochs: passes over the rows.
        rows: packed rows of one pass.
        batch_size: of them in a batch.
        steps: number of updates.
    """

    epochs: float
    rows: int
    batch_size: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.epochs:g} epochs of {self.rows:,} packed rows, {self.batch_size} a batch, are {self.steps:,} steps"
        )


def count_steps(config: Config, stage: StageName, examples: Sequence[Example]) -> EpochSteps | None:
    """Return the steps that follow from a stage's epochs and its tokenized rows; None if it has no epochs.

    Raises:
        ConfigError: more steps than can be counted.
    """
    settings, data = getattr(config, stage), config.data
    if settings.epochs is None:
        return None
    lengths = [len(example.tokens) - 1 for example in examples]
    rows = len(packed_rows(lengths, data.seq_len)) if data.packing else len(lengths)
    steps = math.ceil(settings.epochs * rows / settings.batch_size)
    if steps > LARGEST_INT:
        raise ConfigError(
            f"{stage}.epochs {settings.epochs:g} are {steps:.3g} steps: expected at most {LARGEST_INT:,}."
        )
    return EpochSteps(settings.epochs, rows, settings.batch_size, steps)


def with_steps(config: Config, stage: StageName, counted: EpochSteps | None) -> Config:
    """Return the config with the number of steps that follows from the epochs, if there are any.

    Raises:
        ConfigError: steps that the warm-up or the profile do not fit into.
    """
    if counted is None:
        return config
    settings = dataclasses.replace(getattr(config, stage), steps=counted.steps)
    try:
        settings.optimizer.make_schedule(counted.steps)
    except ValueError as error:
        raise ConfigError(f"{stage}.optimizer.{error}. {counted}.") from error
    profiled = config.profile.range
    if profiled is not None and profiled[1] > counted.steps:
        raise ConfigError(f"profile.steps is {config.profile.steps}, but {counted}.")
    return dataclasses.replace(config, **{stage: settings})


def save_epochs(folder: Path, counted: EpochSteps | None) -> None:
    """Write the number of steps that followed from the epochs of a stage, if there are any, in its folder."""
    if counted is not None:
        write_json(folder / EPOCHS_FILE, dataclasses.asdict(counted))


def recorded_epochs(config: Config, stage: StageName, folder: Path) -> EpochSteps | None:
    """Return what `save_epochs` has written for the same epochs; None if there is nothing that can be read."""
    found, settings = find_json_object(folder / EPOCHS_FILE), getattr(config, stage)
    if found is None or settings.epochs is None:
        return None
    rows, steps = found.get("rows"), found.get("steps")
    same = found.get("epochs") == settings.epochs and found.get("batch_size") == settings.batch_size
    if not same or type(rows) is not int or type(steps) is not int or not 1 <= steps <= LARGEST_INT:
        return None
    return EpochSteps(settings.epochs, rows, settings.batch_size, steps)
