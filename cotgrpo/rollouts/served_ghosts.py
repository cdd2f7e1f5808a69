"""On-policy batches whose live ghost is a model on a server: it scores the student's replies while the device works.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The student's replies go to the server as token ids.
The likeliest tokens at every prefix come back. With `prefetch` the replies of the next batch are drawn, and sent, while
the device makes the step before it. Without it the device waits for the server.

Process 0 asks, and broadcasts what it gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.interrupts import wait_for
from cotgrpo.distributed.processes import broadcast_arrays, is_process_0
from cotgrpo.ghosts.live import certain, with_replies
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.rollouts.on_policy import OnPolicyBatches
from cotgrpo.rollouts.rollouts import PendingReplies, RolloutBatch, RolloutPrompt, RolloutSettings, metric, token_ids
from cotgrpo.sampling import Prompts, Replies, Sampler
from cotgrpo.sharding import jit_eval
from cotgrpo.teacher_servers.server import Scorer, Scores, Text
from cotgrpo.types import GhostBatch, Metrics, Params, SftBatch, Student

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, Float, Int, PRNGKeyArray

SAMPLES = 8
"""Texts by which the tokenizers are compared."""


def choose_ghosts(scores: Scores, key: PRNGKeyArray | None) -> tuple[Int[np.ndarray, "B N"], Float[np.ndarray, "B N"]]:
    """Return the ghost token at each place, and 1 where there is one, else 0.

    Args:
        scores: the teacher's likeliest tokens.
        key: None takes the likeliest. A key draws from the teacher's distribution: a token of the list with its
            probability, or else none of them. No ghost is known then, so that context is not supervised.
    """
    if key is None:
        return scores.ids[..., 0], scores.known.astype(np.float32)
    uniform_BN = np.asarray(jax.random.uniform(key, scores.ids.shape[:2]))
    below_BNK = np.cumsum(np.exp(scores.log_probs, dtype=np.float64), axis=-1) <= uniform_BN[..., None]
    place_BN = below_BNK.sum(axis=-1)
    drawn_BN = place_BN < scores.ids.shape[-1]
    place_BN1 = np.where(drawn_BN, place_BN, 0)[..., None]
    is_listed_BN = np.take_along_axis(scores.log_probs, place_BN1, axis=-1)[..., 0] > MASKED_LOGIT / 2
    ghosts_BN = np.take_along_axis(scores.ids, place_BN1, axis=-1)[..., 0]
    return ghosts_BN, (drawn_BN & is_listed_BN & scores.known).astype(np.float32)


def scored_batch(
    prompts: Prompts,
    replies: Replies,
    ghosts: Int[AnyArray, "B N"],
    known: Float[AnyArray, "B N"],
    tops: tuple[Int[AnyArray, "B N K"], Float[AnyArray, "B N K"]] | None = None,
    forced: SftBatch | None = None,
) -> tuple[GhostBatch, Float[AnyArray, "rows T"]]:
    """Return replies with ghosts that were chosen elsewhere, laid out as `cotgrpo.ghosts.live.live_ghosts` does.

    Args:
        prompts, replies: what the student read and wrote.
        ghosts: the ghost token at each place of the replies.
        known: 1 where there is one; contexts with 0 are not supervised.
        tops: ids and log-probabilities of the teacher's likeliest tokens, or None.
        forced: teacher-forced rows that join the batch, or None.

    Returns:
        The batch, and log p of the token after each context of a reply when it was drawn.
    """
    own = with_replies(prompts, replies)
    P = prompts.tokens.shape[1]
    widen = lambda x: jnp.pad(jnp.asarray(x), ((0, 0), (P - 1, 1), *((0, 0),) * (x.ndim - 2)))
    mask_BT = own.loss_mask * widen(known)
    here = lambda x: jnp.where(mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - 2)) != 0, x, 0)
    extra: dict[str, AnyArray] = (
        {} if tops is None else {"top_ids": here(widen(tops[0])), "top_log_probs": here(widen(tops[1]))}
    )
    batch = GhostBatch(
        tokens=own.tokens,
        ghost_tokens=here(widen(ghosts)),
        positions=own.positions,
        segment_ids=own.segment_ids,
        loss_mask=mask_BT,
        drawn_tokens=own.targets,
        extra=extra,
    )
    log_probs = widen(replies.log_probs)
    if forced is not None:
        text = GhostBatch.teacher_forced(forced)
        text = text if tops is None else certain(text, tops[0].shape[-1])
        join = lambda mine, more: jnp.concatenate([mine, jnp.asarray(more, mine.dtype)])
        batch = jax.tree.map(join, batch.replace(drawn_tokens=None), text)
        log_probs = jnp.pad(log_probs, ((0, forced.tokens.shape[0]), (0, 0)))
    return batch, log_probs


@dataclasses.dataclass(frozen=True)
class ScoredReplies(PendingReplies):
    """Replies that were drawn, and the work of scoring them; None on every process but the first."""

    scores: Future[Scores] | None = None


def own_prompt(question: RolloutPrompt) -> list[int]:
    """Return the tokens that the student reads."""
    return [int(token) for token in question.prompt]


class ServedGhostBatches(OnPolicyBatches):
    """Batches of replies with the ghosts of a model on a server. See `OnPolicyBatches`.

    Args:
        sample: the student's sampler, compiled by `jit_eval` for the mesh.
        server: scores the replies; None on every process but the first.
        student, template, questions, settings, seed, merged, forced, completions, mesh: as in `OnPolicyBatches`.
        drawn_ghosts: draw ghost tokens from the teacher's likeliest, instead of taking the first.
        scored_top_k: how many tokens the server gives at each place.
        top_k: how many of them are in the batch, for `ForwardKl`; 0: none.
        prefetch: draw the replies one update ahead.
        fingerprint: what the server gave for a sample, by which a run that resumes knows the model again.
        context_of: returns the prompt that the teacher reads, in its tokens.
    """

    def __init__(
        self,
        sample: Sampler,
        server: Scorer | None,
        student: Student,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        drawn_ghosts: bool = False,
        scored_top_k: int = 1,
        top_k: int = 0,
        prefetch: bool = False,
        fingerprint: Sequence[float] = (),
        context_of: Callable[[RolloutPrompt], list[int]] = own_prompt,
        merged: Callable[[Params], Params] = lambda trained: trained,
        forced: Any = None,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        super().__init__(
            self.draw_scored,
            (),
            student,
            template,
            questions,
            settings,
            seed=seed,
            merged=merged,
            forced=forced,
            completions=completions,
            mesh=mesh,
        )
        self.sample, self.server, self.fingerprint = sample, server, list(fingerprint)
        self.drawn_ghosts, self.top_k, self.scored_top_k = drawn_ghosts, top_k, scored_top_k
        self.prefetch, self.context_of = prefetch, context_of
        self.missing = (0, 0)  # contexts of the newest replies without a ghost, and all of them
        self.batch = jit_eval(lambda _, rows: scored_batch(*rows), mesh)

    def begin(self, number: int) -> ScoredReplies:
        """Queue the replies of batch `number` on the device, and let the server score them once they are there."""
        prompts, (for_sampling, _) = self.prompts_for(number), jax.random.split(self.key_of(number))
        return self.send(prompts, self.sample(self.params, self.padded(prompts), for_sampling))

    def send(self, prompts: Sequence[RolloutPrompt], replies: Replies) -> ScoredReplies:
        """Let the server score replies in the background."""
        if self.server is None:
            return ScoredReplies(replies, None)

        def texts() -> list[Text]:
            rows = token_ids(jax.device_get(replies))
            return [Text(self.context_of(q), row.tolist()) for q, row in zip(prompts, rows, strict=True)]

        return ScoredReplies(replies, self.server.score_later(texts, self.settings.max_new_tokens))

    def draw_scored(
        self, _: object, rows: tuple[Prompts, Prompts | None, SftBatch | None], key: jax.Array
    ) -> tuple[GhostBatch, Replies, jax.Array]:
        """Return the next batch, in the form of the function of `make_draw`. Waits for the server."""
        number = self.taken - 1
        prompts, _, forced = rows
        pending, self.pending = self.pending, None
        if not isinstance(pending, ScoredReplies):  # none, or those of a checkpoint
            pending = self.begin(number) if pending is None else self.send(self.prompts_for(number), pending.replies)
        self.prefetch_next()
        scores = self.scores_of(pending)
        ghosts, known = choose_ghosts(scores, jax.random.split(key)[1] if self.drawn_ghosts else None)
        tops = (scores.ids[..., : self.top_k], scores.log_probs[..., : self.top_k]) if self.top_k else None
        lengths = np.asarray(jax.device_get(pending.replies.lengths))
        is_real = np.arange(known.shape[1]) < lengths[:, None]
        self.missing = (int((is_real & (known == 0)).sum()), int(is_real.sum()))
        batch, log_probs = self.batch((), (prompts, pending.replies, ghosts, known, tops, forced))
        return batch, pending.replies, log_probs

    def scores_of(self, pending: ScoredReplies) -> Scores:
        """Return the server's scores on every process."""
        shape = (*pending.replies.tokens.shape, self.scored_top_k)

        def get() -> tuple[np.ndarray, np.ndarray]:
            assert pending.scores is not None
            scores = wait_for(pending.scores)
            return scores.ids, scores.log_probs

        empty = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return Scores(*broadcast_arrays(get, empty))

    def prefetch_next(self) -> None:
        """Queue the next batch's replies if the batch just taken is the last one of its rollout."""
        is_last = self.taken % self.settings.updates_per_rollout == 0
        self.pending = self.begin(self.taken) if self.prefetch and is_last else None

    def reuse_batch(self, batch: RolloutBatch) -> GhostBatch:
        """Return the replies of an earlier student, with importance weights for the present one."""
        reused = super().reuse_batch(batch)
        self.prefetch_next()
        return reused

    def observed(self) -> Metrics:
        """Return the metrics of the newest replies, and which share of their contexts has no ghost."""
        found = super().observed()
        if len(found) > 1:
            found["without_ghost"] = metric(*self.missing)
        return found

    def get_state(self) -> dict[str, Any]:
        own = {"fingerprint": self.fingerprint}
        return super().get_state() | own | ({} if self.pending is None else {"drawn": self.pending})

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if self.server is not None and is_process_0():
            self.server.check_same_model(state["fingerprint"], self.fingerprint, "before the run was stopped")
        self.fingerprint = state["fingerprint"]
        if "drawn" in state:
            self.pending = PendingReplies.from_text(state["drawn"])


def sample_texts(questions: Sequence[RolloutPrompt], rows: Sequence[np.ndarray]) -> list[Text]:
    """Return texts by which a server's tokenizer and model are known: some training rows, or prompts alone."""
    chosen = [row for row in rows[:SAMPLES] if len(row) >= 2] or [q.prompt for q in questions[:SAMPLES]]
    texts = [Text([int(row[0])], [int(i) for i in row[1:]]) for row in chosen if len(row) >= 2]
    return texts or [Text([int(questions[0].prompt[0])], [int(questions[0].prompt[0])])]
