"""Batches of the student's own replies without a ghost of another model: verified rewards, and its own best replies."""

from __future__ import annotations

from cotgrpo.config import SelfReply, VerifiedReward
from cotgrpo.rollouts.group_relative import GroupRelativeBatches
from cotgrpo.rollouts.rollouts import RolloutSettings
from cotgrpo.rollouts.self_replies import SelfReplyBatches, SelfReplySettings
from cotgrpo.training.batch_sources.context import BatchContext
from cotgrpo.training.batch_sources.prompts import rollout_prompts


def group_relative_batches(ghosts: VerifiedReward, at: BatchContext) -> GroupRelativeBatches:
    """Return the batches for the objective group_relative. Raises DataError as `live_batches` does."""
    config = at.config
    return GroupRelativeBatches(
        at.compiled_sampler(ghosts.max_new_tokens, 1.0, ghosts.decode_batch_size),
        at.inputs.template,
        rollout_prompts(ghosts, at),
        RolloutSettings(
            config.grpo.batch_size,
            config.data.seq_len,
            ghosts.max_new_tokens,
            updates_per_rollout=ghosts.updates_per_rollout,
        ),
        seed=config.seed,
        group=ghosts.num_generations,
        prefetch=ghosts.prefetch_rollouts,
        merged=at.weights.adapted,
        completions=at.completions_log(),
        mesh=at.model.mesh,
    )


def self_reply_batches(ghosts: SelfReply, at: BatchContext) -> SelfReplyBatches:
    """Return the batches of a stage that learns from the student's own best replies."""
    config, data = at.config, at.config.data
    settings = SelfReplySettings(
        num_generations=ghosts.num_generations,
        questions=ghosts.questions,
        refresh_every=ghosts.refresh_every,
        batch_size=config.grpo.batch_size,
        seq_len=data.seq_len,
        prompt_columns=data.seq_len - ghosts.max_new_tokens,
        packing=data.packing,
    )
    decode_batch_size = ghosts.decode_batch_size or config.eval.batch_size
    samplers = [at.compiled_sampler(ghosts.max_new_tokens, t, decode_batch_size) for t in ghosts.temperatures]
    return SelfReplyBatches(
        samplers,
        at.inputs.template,
        at.inputs.train_triples,
        settings,
        at.folder / "self_replies",
        config.seed,
        at.weights.adapted,
    )
