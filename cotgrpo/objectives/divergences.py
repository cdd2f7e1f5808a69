"""Objectives that see a whole distribution beside the student's: the live ghost's, or a frozen reference's. GRPO here is GhostRespond Policy Optimization, not Group Relative.

As in `cotgrpo.objectives`, each is the maths of one token: p is the student's distribution, q the ghost's, r the reference's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.objectives import MASKED_LOGIT, Objective, TokenInputs, exact_metrics, require, softmax
from cotgrpo.xla_cpu import vocab_sum

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float


@dataclasses.dataclass(frozen=True)
class ForwardKl:
    """The live ghost's distribution q as the target, and not one token of it: `KL(q || p)`, with all but q's likeliest tokens as one outcome.

        sum_{k in top} q(k) (log q(k) - log p(k))  +  q_rest (log q_rest - log p_rest),    q_rest = 1 - sum_{k in top} q(k),  p_rest likewise

    Logit gradient: `p - q'`, where q' is q on the top and spreads q_rest over the other tokens as p does. Proper: its minimum, 0, is at p = q on the
    top. With the whole vocabulary on top it is KL(q || p); with q on one token alone it is `Nll`. (Hinton et al. 2015, arXiv:1503.02531; on the student's own replies:
    Agarwal et al. 2024, arXiv:2306.13649.) Adds the metric `top_mass`, the sum of q over the top.

    Attributes:
        top_k: tokens of q that are told apart, at least 1; the batch holds as many (`cotgrpo.ghosts.live.live_ghosts(..., top_k=)`).
    """

    top_k: int = 16

    num_draws = 0

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "ForwardKl.top_k", "an integer of at least 1", self.top_k)

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        student = softmax(logits_V)
        q_K, rest = self.target(row)
        kl = jnp.sum(q_K * (row.top_log_probs - student.log_prob(row.top_ids)))
        log_p_rest = softmax(self.others(logits_V, row)).log_z - student.log_z
        kl += jnp.where(rest > 0, rest * (jnp.log(jnp.where(rest > 0, rest, 1.0)) - log_p_rest), 0.0)
        return kl, exact_metrics(student, row) | {"top_mass": jnp.sum(q_K)}

    def value_and_grad(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, Float[Array, "V"]]:
        q_K, rest = self.target(row)
        spread_V = rest * softmax(self.others(logits_V, row)).p_V
        return self(logits_V, row), (softmax(logits_V).p_V - spread_V).at[row.top_ids].add(-q_K)

    def target(self, row: TokenInputs) -> tuple[Any, Any]:
        """The top's q, and the rest's: 0 where that is no more than the rounding of the sum."""
        q_K = jnp.exp(row.top_log_probs)
        rest = 1.0 - jnp.sum(q_K)
        return q_K, jnp.where(rest > 1e-6, rest, 0.0)

    def others(self, logits_V: Float[Array, "V"], row: TokenInputs) -> Float[Array, "V"]:
        """The logits of the tokens that are not on top."""
        return logits_V.at[row.top_ids].set(MASKED_LOGIT)


@dataclasses.dataclass(frozen=True)
class ReferenceKl:
    """Any objective, kept near a frozen reference model r: `objective + weight * KL(p || r)`, the sum over the vocabulary taken exactly.

        KL(p || r) = sum_y p(y) (log p(y) - log r(y)),    logit gradient  p(y) (log p(y) - log r(y) - KL)

    Adds the metric `kl`, in nats. The step that uses it is built with the reference (`make_grpo_step(..., reference=)`).

    Attributes:
        objective: the objective to keep near the reference.
        weight: >= 0.
    """

    objective: Objective
    weight: float = 0.1

    needs_reference = True

    def __post_init__(self) -> None:
        require(self.weight >= 0, "ReferenceKl.weight", "a number of at least 0", self.weight)

    @property
    def num_draws(self) -> int:
        return objectives.num_draws(self.objective)

    @property
    def top_k(self) -> int:
        return objectives.top_k(self.objective)

    def draw_logits(self, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
        return objectives.draw_logits(self.objective, logits_V)

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        loss, metrics = self.objective(logits_V, row)
        kl = self.parts(logits_V, row)[0]
        return loss + self.weight * kl, metrics | {"kl": kl}

    def value_and_grad(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, Float[Array, "V"]]:
        (loss, metrics), grad_V = objectives.value_and_grad(self.objective)(logits_V, row)
        kl, p_V, ratio_V = self.parts(logits_V, row)
        return (loss + self.weight * kl, metrics | {"kl": kl}), grad_V + self.weight * p_V * (ratio_V - kl)

    def parts(self, logits_V: Any, row: TokenInputs) -> tuple[Any, Any, Any]:
        """`(KL(p || r), p, log p - log r)`."""
        student, reference = softmax(logits_V), softmax(row.reference_logits)
        ratio_V = (logits_V - student.log_z) - (row.reference_logits - reference.log_z)
        return vocab_sum(student.p_V * ratio_V), student.p_V, ratio_V
