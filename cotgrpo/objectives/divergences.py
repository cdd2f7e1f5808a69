"""Objectives that compare the student with a whole distribution: the live ghost's, or a frozen reference's.

GRPO here is GhostRespond Policy Optimization, not Group Relative. p is the student's distribution at one context, q the
ghost's, r the reference's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from cotgrpo.objectives import protocol
from cotgrpo.objectives.distribution import MASKED_LOGIT, exact_metrics, softmax
from cotgrpo.objectives.protocol import Objective, TokenInputs, require
from cotgrpo.xla_cpu import vocab_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ForwardKl:
    """`KL(q || p)` to the live ghost's distribution q. All but q's likeliest tokens count as one outcome.

        sum_{k in top} q(k) (log q(k) - log p(k))  +  q_rest (log q_rest - log p_rest)

    q_rest = 1 - sum_{k in top} q(k), and p_rest likewise. Logit gradient: `p - q'`, where q' is q on the top and
    spreads q_rest over the other tokens as p does. The objective is proper: its minimum, 0, is at p = q on the top.
    With the whole vocabulary on top it is KL(q || p). With q on a single token it is `Nll`. (Hinton et al. 2015,
    arXiv:1503.02531. On the student's own replies: Agarwal et al. 2024, arXiv:2306.13649.)

    The batch carries the extra arrays `top_ids`, int32 `[B, T, top_k]`, and `top_log_probs`, float32, log q of each:
    `cotgrpo.ghosts.live.live_ghosts(..., top_k=)` makes them. With fewer tokens than `top_k`, fill up with any id and a
    log q of minus infinity, or of -1e30. Adds the metric `top_mass`, the sum of q over the top.

    Attributes:
        top_k: how many of the live ghost's likeliest tokens are told apart, at least 1; the others are one outcome.
    """

    top_k: int = 16

    num_draws = 0
    batch_fields = ("top_ids", "top_log_probs")

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "ForwardKl.top_k", "an integer of at least 1", self.top_k)

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        student = softmax(logits_V)
        q_K, rest = self.target(inputs)
        listed_K = q_K > 0
        log_ratio_K = inputs["top_log_probs"] - student.log_prob(jnp.where(listed_K, inputs["top_ids"], 0))
        kl = jnp.sum(q_K * jnp.where(listed_K, log_ratio_K, 0.0))
        log_p_rest = softmax(self.rest_logits(logits_V, inputs)).log_z - student.log_z
        kl += jnp.where(rest > 0, rest * (jnp.log(jnp.where(rest > 0, rest, 1.0)) - log_p_rest), 0.0)
        return kl, exact_metrics(student, inputs) | {"top_mass": jnp.sum(q_K)}

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        q_K, rest = self.target(inputs)
        spread_V = rest * softmax(self.rest_logits(logits_V, inputs)).p_V
        grad_V = (softmax(logits_V).p_V - spread_V).at[self.listed_ids(logits_V, inputs)].add(-q_K, mode="drop")
        return self(logits_V, inputs), grad_V

    def target(self, inputs: TokenInputs) -> tuple[Float[Array, "K"], Float[Array, ""]]:
        """Return q on the top, and q_rest: 0 if it is within the rounding error of the sum."""
        log_q_K = inputs["top_log_probs"]
        if log_q_K.shape != (self.top_k,) or inputs["top_ids"].shape != (self.top_k,):
            raise ValueError(
                f"ForwardKl(top_k={self.top_k}) needs {self.top_k} top_ids and top_log_probs at each context, "
                f"got {inputs['top_ids'].shape[-1]} and {log_q_K.shape[-1]}. "
                "Make the batch with cotgrpo.ghosts.live.live_ghosts(..., top_k=)."
            )
        q_K = jnp.exp(log_q_K)
        rest = 1.0 - jnp.sum(q_K)
        return q_K, jnp.where(rest > 1e-6, rest, 0.0)

    def rest_logits(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> Float[Array, "V"]:
        """Return the logits of the tokens that are not on top; the top is masked."""
        return logits_V.at[self.listed_ids(logits_V, inputs)].set(MASKED_LOGIT, mode="drop")

    def listed_ids(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> Int[Array, "K"]:
        """Return the ids on top. A filler, which has no probability in q, is V and is dropped."""
        return jnp.where(jnp.exp(inputs["top_log_probs"]) > 0, inputs["top_ids"], logits_V.shape[0])


@dataclasses.dataclass(frozen=True)
class ReferenceKl:
    """Any objective, kept near a frozen reference model r: `objective + weight * KL(p || r)`.

        KL(p || r) = sum_y p(y) (log p(y) - log r(y)),    logit gradient  p(y) (log p(y) - log r(y) - KL)

    The sum over the vocabulary is exact. Adds the metric `kl`, in nats. Build the step with the reference:
    `make_grpo_step(..., reference=)`.

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
        return protocol.num_draws(self.objective)

    @property
    def batch_fields(self) -> tuple[str, ...] | None:
        return protocol.batch_fields(self.objective)

    @property
    def top_k(self) -> int:
        return protocol.top_k(self.objective)

    def draw_logits(self, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
        return protocol.draw_logits(self.objective, logits_V)

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        loss, metrics = self.objective(logits_V, inputs)
        kl, _, _ = self.kl_terms(logits_V, inputs)
        return loss + self.weight * kl, metrics | {"kl": kl}

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        (loss, metrics), grad_V = protocol.value_and_grad(self.objective)(logits_V, inputs)
        kl, p_V, log_ratio_V = self.kl_terms(logits_V, inputs)
        return (loss + self.weight * kl, metrics | {"kl": kl}), grad_V + self.weight * p_V * (log_ratio_V - kl)

    def kl_terms(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[Float[Array, ""], Float[Array, "V"], Float[Array, "V"]]:
        """Return `(KL(p || r), p, log p - log r)`."""
        student, reference = softmax(logits_V), softmax(inputs.reference_logits)
        log_ratio_V = (logits_V - student.log_z) - (inputs.reference_logits - reference.log_z)
        log_ratio_V = jnp.where(student.p_V > 0, log_ratio_V, 0.0)  # a padded logit may be minus infinity in both
        return vocab_sum(student.p_V * log_ratio_V), student.p_V, log_ratio_V
