"""On-policy batches: the student writes its own replies, and a live ghost supplies the ideal token at each prefix.

GRPO here is GhostRespond Policy Optimization, not Group Relative. Sampling and the ghost's forward pass are one
compiled program, which is queued after the running step. The device never waits for the host, and the replies still
come from the newest parameters. The host grades the replies of a batch while the step works on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import is_process_0
from cotgrpo.ghosts.live import certain, live_ghosts, reply_rewards, reweighted
from cotgrpo.ghosts.verdicts import with_advantages, with_ghost_weights
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.optimizers import MovingAverage
from cotgrpo.rollouts.rollouts import (
    RolloutBatch,
    RolloutPrompt,
    Rollouts,
    RolloutSettings,
    grade_replies,
    metric,
    rollout_metrics,
    token_ids,
)
from cotgrpo.sampling import Prompts, Replies, Sampler, pad_prompts
from cotgrpo.sampling.decoding_layout import also_resident
from cotgrpo.sharding import jit_eval
from cotgrpo.types import GhostBatch, Metrics, Params, SftBatch, Student


def make_draw(
    sample: Sampler, teacher: Student, *, drawn_ghosts: bool = False, top_k: int = 0, reference_rows: bool = False
) -> Callable[..., Any]:
    """Return a pure function that draws replies with their ghosts.

    Its form is `draw((params, teacher_params), (prompts, teacher_prompts, forced), key) -> (batch, replies,
    log_probs)`. Parameters come first and rows second, as `cotgrpo.sharding.jit_eval` expects them.

    Args:
        sample: the student's sampler.
        teacher: the frozen model that supplies the ghost at every prefix.
        drawn_ghosts: draw ghost tokens from the teacher's distribution, instead of taking its likeliest.
        top_k: tokens of that distribution in the batch, for `ForwardKl`. Teacher-forced rows then get a one-hot
            distribution.
        reference_rows: hand over what the teacher's head reads, for objectives with `top_k=None`. No forced rows then.

    Returns:
        The function. `teacher_prompts` replace the prompts for the teacher, unless they are None. `forced` are
        teacher-forced rows of the same width that join the batch, or None. With them the batch holds no drawn tokens,
        since those rows have none. If the objective needs some, the step draws them. `log_probs` `[B, T]` are the
        student's, of the token after each context of a reply, and 0 elsewhere.
    """
    return draw_with(
        sample, make_ghosts(teacher, drawn_ghosts=drawn_ghosts, top_k=top_k, reference_rows=reference_rows)
    )


def draw_with(sample: Sampler, ghosts_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of `make_draw` from its halves: a sampler, and the function of `make_ghosts`.

    A sampler that the host runs, such as an engine, has them apart. Then only `ghosts_of` is compiled.
    """

    def draw(
        models: tuple[Params, Params], rows: tuple[Prompts, Prompts | None, SftBatch | None], key: jax.Array
    ) -> tuple[GhostBatch, Replies, jax.Array]:
        (params, teacher_params), (prompts, teacher_prompts, forced) = models, rows
        for_sampling, for_ghosts = jax.random.split(key)
        with also_resident(teacher_params):
            replies = sample(params, prompts, for_sampling)
        ghosts, log_probs = ghosts_of(teacher_params, (prompts, replies, teacher_prompts, forced), for_ghosts)
        return ghosts, replies, log_probs

    return draw


def make_ghosts(
    teacher: Student, *, drawn_ghosts: bool = False, top_k: int = 0, reference_rows: bool = False
) -> Callable[..., Any]:
    """Return the second half of `make_draw`: the ghosts of replies that are there.

    Its form is `ghosts(teacher_params, (prompts, replies, teacher_prompts, forced), key) -> (batch, log_probs)`.
    """

    def ghosts_of(
        teacher_params: Params, rows: tuple[Prompts, Replies, Prompts | None, SftBatch | None], key: jax.Array
    ) -> tuple[GhostBatch, jax.Array]:
        prompts, replies, teacher_prompts, forced = rows
        ghosts = live_ghosts(
            teacher,
            teacher_params,
            prompts,
            replies,
            reads=teacher_prompts,
            key=key if drawn_ghosts else None,
            top_k=top_k,
            rows=reference_rows,
        )
        log_probs = jnp.pad(replies.log_probs, ((0, 0), (prompts.tokens.shape[1] - 1, 1)))
        if forced is not None:
            text = GhostBatch.teacher_forced(forced)
            text = certain(text, top_k) if top_k else text
            join = lambda own, more: jnp.concatenate([own, jnp.asarray(more, own.dtype)])
            ghosts = jax.tree.map(join, ghosts.replace(drawn_tokens=None), text)
            log_probs = jnp.pad(log_probs, ((0, forced.tokens.shape[0]), (0, 0)))
        return ghosts, log_probs

    return ghosts_of


class OnPolicyBatches(Rollouts):
    """Batches of replies with a live ghost's token at each prefix. See `Rollouts`. Process 0 writes the log.

    Args:
        draw: from `make_draw`, compiled by `jit_eval` for the mesh.
        teacher_params: the live ghost's parameters.
        student: computes the weights of replies that are used again, and the rewards in the log.
        template, questions, settings, seed, merged: as in `Rollouts`.
        forced: an iterator of teacher-forced batches of the same width. Their rows join each batch. Or None.
        completions: a log of some replies with their rewards, or None.
        mesh: of the parameters and the batches; None: JAX's default device.
        teacher: the live ghost, for a step whose reference it is; None: no step needs it.
        moving: "live": the teacher's parameters are the student's present ones; "ema": their moving average, from the
            optimizer's state (`cotgrpo.optimizers.with_moving_average`); "frozen": they are `teacher_params`.
    """

    def __init__(
        self,
        draw: Callable[..., Any],
        teacher_params: Params,
        student: Student,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        merged: Callable[[Params], Params] = lambda trained: trained,
        forced: Any = None,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
        teacher: Student | None = None,
        moving: Literal["frozen", "live", "ema"] = "frozen",
    ) -> None:
        super().__init__(template, questions, settings, seed=seed, merged=merged, mesh=mesh)
        self.draw, self.teacher, self.teacher_params, self.moving = draw, teacher, teacher_params, moving
        self.verdicts: tuple[np.ndarray, np.ndarray] | None = None  # of the newest replies
        self.forced, self.completions = forced, completions
        self.teacher_columns = max(len(q.teacher_prompt) if q.teacher_prompt is not None else 0 for q in questions)
        self.rewards = jit_eval(functools.partial(reply_rewards, student), mesh)
        own_B1 = np.arange(settings.replies + settings.forced_rows)[:, None] < settings.replies

        def reweight(params: Params, reused: tuple[GhostBatch, jax.Array]) -> GhostBatch:
            batch, log_probs = reused
            return reweighted(student, params, batch, log_probs, jnp.asarray(own_B1), settings.ratio_clip)

        self.reweighted = jit_eval(reweight, mesh)

        def judge(_: object, rows: tuple[GhostBatch, jax.Array, jax.Array, jax.Array]) -> GhostBatch:
            batch, log_probs, correct, rewards = rows
            batch = with_ghost_weights(batch, correct, settings.when, settings.replies)
            return with_advantages(batch, log_probs, rewards, self.group) if settings.rewarded else batch

        self.with_verdicts = jit_eval(judge, mesh)

    def set_params(self, trained: Params) -> None:
        super().set_params(trained)
        if self.moving == "live":
            self.teacher_params = self.params

    def set_opt_state(self, opt_state: Any) -> None:
        """Take the moving average of the parameters, if it is the teacher. Called after `set_params`."""
        if self.moving == "ema":
            assert isinstance(opt_state, MovingAverage)
            self.teacher_params = self.merged(opt_state.average)

    def roll_out(self, number: int) -> RolloutBatch:
        """Queue new replies on the device, without waiting for them."""
        prompts, pad_id = self.prompts_for(number), self.template.pad_id
        tokens = [p.teacher_prompt for p in prompts if p.teacher_prompt is not None]
        teacher_prompts = pad_prompts(tokens, length=self.teacher_columns, pad_id=pad_id) if tokens else None
        forced = None if self.forced is None else next(self.forced)
        batch, replies, log_probs = self.draw(
            (self.params, self.teacher_params), (self.padded(prompts), teacher_prompts, forced), self.key_of(number)
        )
        if self.settings.when != "always" or self.settings.rewarded:
            batch = self.judge_batch(prompts, batch, replies, log_probs)
        log, rewards = self.completions, None
        if log is not None and log.due(number + 1):
            shown = jax.tree.map(lambda x: x[: log.rows], batch.replace(drawn_tokens=None))
            rewards = shown.ghost_tokens, self.rewards(self.params, shown)
        return RolloutBatch(batch, log_probs, prompts, replies, rewards)

    def judge_batch(
        self, prompts: Sequence[RolloutPrompt], batch: GhostBatch, replies: Replies, log_probs: jax.Array
    ) -> GhostBatch:
        """Return the batch with what the verdicts on its replies decide. Waits for the replies if any are needed."""
        values = np.zeros((2, len(batch.tokens)), np.float32)
        if self.settings.when == "wrong" or self.settings.rewarded:
            self.verdicts = self.judged(prompts, jax.device_get(replies))
            values[:, : len(prompts)] = self.verdicts
        return self.with_verdicts((), (batch, log_probs, *values))

    def first_use(self, batch: RolloutBatch) -> GhostBatch:
        """Return the batch, with importance weights if an earlier student wrote the replies."""
        return self.reweigh(batch) if self.engine is not None and self.engine.is_stale else batch.batch

    def reuse_batch(self, batch: RolloutBatch) -> GhostBatch:
        """Return the replies of an earlier student, with importance weights for the present one."""
        return self.reweigh(batch)

    def reweigh(self, batch: RolloutBatch) -> GhostBatch:
        """Return a batch with importance weights for the present student."""
        reweighted: GhostBatch = self.reweighted(self.params, (batch.batch, batch.log_probs))
        return reweighted

    def observed(self) -> Metrics:
        """Grade the newest replies and log some of them, if they are due. Return their metrics."""
        if self.newest is None or self.newest.prompts is None:
            return {"rollout_tokens": metric(0, 1)}
        return self.graded_metrics() | ({} if self.engine is None else self.engine.observed())

    def graded_metrics(self) -> Metrics:
        """Do what `observed` says, if there are new replies."""
        assert self.newest is not None and self.newest.prompts is not None
        newest, prompts, self.newest = self.newest, self.newest.prompts, dataclasses.replace(self.newest, prompts=None)
        written, rewards = jax.device_get((newest.replies, newest.rewards))
        verdicts, self.verdicts = self.verdicts, None
        shown = len(prompts) if self.completions is None or verdicts is None else self.completions.rows
        replies = grade_replies(self.template, prompts[:shown], jax.tree.map(lambda x: x[:shown], written))
        if self.completions is not None and rewards is not None and is_process_0():
            ghosts, values = (part[:, self.settings.prompt_columns - 1 : -1] for part in rewards)
            tokenizer = self.template.tokenizer
            ids, version = token_ids(written), self.weights_version
            self.completions.write(self.taken, tokenizer, replies, ids, ghosts, values, version=version)
        if verdicts is not None:
            return self.judged_metrics(*verdicts, written)
        return rollout_metrics([reply.correct for reply in replies], written)

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"forced": None if self.forced is None else self.forced.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if self.forced is not None:
            self.forced.set_state(state["forced"])
