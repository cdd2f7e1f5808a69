"""Make the batches of a stage: packed text, or the student's own replies with a live ghost.

GRPO is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from cotgrpo.config import (
    Cached,
    Config,
    ConfigError,
    Ghosts,
    LiveGhosts,
    PrivilegedSelf,
    RolloutServerSettings,
    SelfReply,
    TeacherForced,
    Teachers,
    VerifiedReward,
)
from cotgrpo.training.batch_sources.context import BatchContext
from cotgrpo.training.batch_sources.engine import make_engine
from cotgrpo.training.batch_sources.live import live_batches, several_teachers
from cotgrpo.training.batch_sources.own_replies import group_relative_batches, self_reply_batches
from cotgrpo.training.batch_sources.prompts import StreamedPrompts as StreamedPrompts
from cotgrpo.training.batch_sources.teacher_models import live_teacher_of as live_teacher_of
from cotgrpo.training.batch_sources.text import cached_batches, own_rows, text_batches
from cotgrpo.training.inputs import QUIET, StageInputs
from cotgrpo.training.loop import BatchSource
from cotgrpo.training.steps import StageName
from cotgrpo.training.weights import StageWeights


def make_stage_batches(
    stage: StageName,
    config: Config,
    inputs: StageInputs,
    weights: StageWeights,
    folder: Path,
    console: Console = QUIET,
) -> BatchSource:
    """Return what a stage learns from.

    Args:
        stage: "sft" or "grpo".
        config: the settings.
        inputs: rows and student.
        weights: the student's before the first step.
        folder: of the stage, for completions and replies.
        console: where the progress goes.

    Raises:
        ConfigError: ghosts that need the training rows in memory, with `data.streaming`.
    """
    ghosts = TeacherForced() if stage == "sft" else config.grpo.ghosts
    check_streaming(config, ghosts)
    at = BatchContext(config, inputs, weights, folder, console)
    if isinstance(ghosts, LiveGhosts | VerifiedReward):
        return on_policy_batches(ghosts, at)
    if isinstance(ghosts, Cached):
        return cached_batches(ghosts, at)
    if isinstance(ghosts, SelfReply):
        return self_reply_batches(ghosts, at)
    batch_size = getattr(config, stage).batch_size
    return text_batches(config, inputs, batch_size, own_rows(inputs.model, batch_size), console)


def on_policy_batches(ghosts: LiveGhosts | VerifiedReward, at: BatchContext) -> BatchSource:
    """Return batches of the student's own replies. An engine writes them if the settings name one."""
    engine = make_engine(ghosts, at) if isinstance(at.config.grpo.rollouts, RolloutServerSettings) else None
    at = dataclasses.replace(at, engine=engine)
    if isinstance(ghosts, Teachers) and ghosts.teachers:
        several = several_teachers(ghosts, at)
        for source in several.sources.values():
            source.engine = engine
        return several
    batches = live_batches(ghosts, at) if isinstance(ghosts, LiveGhosts) else group_relative_batches(ghosts, at)
    batches.engine = engine
    return batches


def check_streaming(config: Config, ghosts: Ghosts) -> None:
    """Raise ConfigError if the rows are streamed, and these ghosts need all of their questions in memory."""
    if config.data.streaming and isinstance(ghosts, PrivilegedSelf | SelfReply | Cached):
        raise ConfigError(
            f"grpo.ghosts.source {ghosts.source} needs the questions of all training rows in memory, which "
            "data.streaming leaves on disk. Set data.streaming to false, with fewer rows in data.train, or choose "
            "another source."
        )
