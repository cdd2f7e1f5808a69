"""Objectives that compare the student with a whole distribution: the live ghost's, or a frozen reference's.

GRPO here is GhostRespond Policy Optimization, not Group Relative. p is the student's distribution at one context, q the
ghost's, r the reference's. `ForwardKl`, `ReverseKl`, `JensenShannon` and `SkewedKl` move p to q.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from cotgrpo.objectives import protocol
from cotgrpo.objectives.distribution import MASKED_LOGIT, Distribution, exact_metrics, softmax
from cotgrpo.objectives.protocol import Around, Objective, TokenInputs, require
from cotgrpo.xla_cpu import vocab_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float, Int

ROUNDING = 1e-6
"""A rest of q that is smaller is within the rounding error of the sum of float32 probabilities."""


class Outcomes(NamedTuple):
    """The student's and the ghost's distribution over the same outcomes: the top tokens and the rest, or all tokens.

    Attributes:
        log_p_N: log-probabilities of the student, at least `MASKED_LOGIT`, which stands for probability 0.
        log_q_N: those of the ghost, likewise.
    """

    log_p_N: Float[Array, "N"]
    log_q_N: Float[Array, "N"]

    @property
    def p_N(self) -> Float[Array, "N"]:
        """The student's probabilities."""
        return jnp.exp(self.log_p_N)

    @property
    def q_N(self) -> Float[Array, "N"]:
        """The ghost's probabilities."""
        return jnp.exp(self.log_q_N)

    def log_mixture(self, share: float) -> Float[Array, "N"]:
        """Return `log((1 - share) p + share q)`, for a share in [0, 1]."""
        if share in (0, 1):
            return self.log_q_N if share else self.log_p_N
        log_p_N, log_q_N = self.log_p_N + math.log(1 - share), self.log_q_N + math.log(share)
        top_N = jax.lax.stop_gradient(jnp.maximum(log_p_N, log_q_N))
        return top_N + jnp.log(jnp.exp(log_p_N - top_N) + jnp.exp(log_q_N - top_N))


@dataclasses.dataclass(frozen=True)
class Divergence(abc.ABC):
    """A divergence of the student's distribution p from the live ghost's q.

    The outcomes are the ghost's `top_k` likeliest tokens, and all others as one outcome, the rest. With `top_k=None`
    every token is an outcome of its own, and the divergence is exact. Let `u_o = p_o df/dp_o` be the pull of outcome o,
    where f is the divergence as a function of the outcomes' p. The logit gradient of a token v is

        u_{o(v)} p(v) / p_{o(v)}  -  p(v) sum_o u_o

    With `top_k` the batch carries the extra arrays `top_ids`, int32 `[B, T, top_k]`, and `top_log_probs`, float32,
    log q of each: `cotgrpo.ghosts.live.live_ghosts(..., top_k=)` makes them. With fewer tokens than `top_k`, fill up
    with any id and a log q of minus infinity, or of -1e30. The metric `top_mass` is the sum of q over the top.

    With `top_k=None` the step is built with the teacher as its reference, `make_grpo_step(..., reference=teacher)`,
    whose logits are made next to the student's, a tile at a time. `cotgrpo.ghosts.live.live_ghosts(..., rows=True)`
    hands over what its head reads, so that the teacher does not run twice.

    Attributes:
        top_k: how many of the live ghost's likeliest tokens are told apart, at least 1; the others are one outcome.
            None: all of the vocabulary, exactly.
    """

    top_k: int | None = 16

    num_draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        name = f"{type(self).__name__}.top_k"
        require(self.top_k is None or self.top_k >= 1, name, "an integer of at least 1", self.top_k)

    @property
    def least_rest(self) -> float:
        """The least q of the rest. A rest below `ROUNDING` cannot be told from 0 in float32 and counts as this."""
        return 0.0

    @property
    def batch_fields(self) -> tuple[str, ...]:
        return () if self.top_k is None else ("top_ids", "top_log_probs")

    @property
    def needs_reference(self) -> bool:
        return self.top_k is None

    reads_teacher = needs_reference
    """Whether the reference is the live teacher."""

    @abc.abstractmethod
    def terms(self, outcomes: Outcomes) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        """Return the terms that sum to the divergence, and the pulls. The pulls may differ by a multiple of p."""

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        student = softmax(logits_V)
        outcomes = self.outcomes(student, inputs)
        terms_N, _ = self.terms(outcomes)
        metrics = exact_metrics(student, inputs)
        if self.top_k is not None:
            metrics["top_mass"] = jnp.sum(outcomes.q_N[:-1])
        return jnp.sum(terms_N), metrics

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        student = softmax(logits_V)
        _, pull_N = self.terms(self.outcomes(student, inputs))
        if self.top_k is None:
            grad_V = pull_N - vocab_sum(pull_N) * student.p_V
        else:
            rest_V = pull_N[-1] * softmax(rest_logits(logits_V, inputs)).p_V
            grad_V = rest_V - jnp.sum(pull_N) * student.p_V
            grad_V = grad_V.at[listed_ids(logits_V, inputs)].add(pull_N[:-1], mode="drop")
        return self(logits_V, inputs), grad_V

    def outcomes(self, student: Distribution, inputs: TokenInputs) -> Outcomes:
        """Return both distributions over the outcomes. With `top_k` the rest is the last outcome."""
        if self.top_k is None:
            return self.all_outcomes(student, inputs)
        log_q_K = inputs["top_log_probs"]
        if log_q_K.shape != (self.top_k,) or inputs["top_ids"].shape != (self.top_k,):
            raise ValueError(
                f"{type(self).__name__}(top_k={self.top_k}) needs {self.top_k} top_ids and top_log_probs at each "
                f"context, got {inputs['top_ids'].shape[-1]} and {log_q_K.shape[-1]}. "
                "Make the batch with cotgrpo.ghosts.live.live_ghosts(..., top_k=)."
            )
        log_q_K = log_q_K.astype(student.log_z.dtype)
        listed_K = jnp.exp(log_q_K) > 0
        log_p_K = jnp.where(listed_K, student.log_prob(jnp.where(listed_K, inputs["top_ids"], 0)), MASKED_LOGIT)
        log_q_K = jnp.where(listed_K, log_q_K, MASKED_LOGIT)
        log_p_rest = jnp.maximum(softmax(rest_logits(student.logits_V, inputs)).log_z - student.log_z, MASKED_LOGIT)
        rest = 1.0 - jnp.sum(jnp.exp(log_q_K))
        least = jnp.where(jnp.exp(log_p_rest) > 0, self.least_rest, 0.0)  # 0 if no other token exists
        rest = jnp.where(rest > ROUNDING, rest, least)
        log_rest = jnp.where(rest > 0, jnp.log(jnp.where(rest > 0, rest, 1.0)), MASKED_LOGIT)
        return Outcomes(jnp.append(log_p_K, log_p_rest), jnp.append(log_q_K, log_rest))

    def all_outcomes(self, student: Distribution, inputs: TokenInputs) -> Outcomes:
        """Return both distributions over the vocabulary."""
        theirs_V, shape = inputs.reference_logits, student.logits_V.shape
        if theirs_V is None or theirs_V.shape != shape:
            raise ValueError(
                f"{type(self).__name__}(top_k=None) needs the teacher's logits over the student's vocabulary, {shape}, "
                f"got {None if theirs_V is None else theirs_V.shape}. Build the step with reference=teacher, a Student "
                "whose head has the columns of the student's."
            )
        log_prob_V = lambda p: jnp.maximum((p.logits_V - p.top) - p.log_mass, MASKED_LOGIT)
        return Outcomes(log_prob_V(student), log_prob_V(softmax(theirs_V.astype(student.logits_V.dtype))))


def rest_logits(logits_V: Float[Array, "V"], inputs: TokenInputs) -> Float[Array, "V"]:
    """Return the logits of the tokens that are not on top; the top is masked."""
    return logits_V.at[listed_ids(logits_V, inputs)].set(MASKED_LOGIT, mode="drop")


def listed_ids(logits_V: Float[Array, "V"], inputs: TokenInputs) -> Int[Array, "K"]:
    """Return the ids on top. A filler, which has no probability in q, is V and is dropped."""
    return jnp.where(jnp.exp(inputs["top_log_probs"]) > 0, inputs["top_ids"], logits_V.shape[0])


@dataclasses.dataclass(frozen=True)
class ForwardKl(Divergence):
    """`KL(q || p)` to the live ghost's distribution q. All but q's likeliest tokens count as one outcome.

        sum_{k in top} q(k) (log q(k) - log p(k))  +  q_rest (log q_rest - log p_rest)

    q_rest = 1 - sum_{k in top} q(k), and p_rest likewise. Logit gradient: `p - q'`, where q' is q on the top and
    spreads q_rest over the other tokens as p does. The objective is proper: its minimum, 0, is at p = q on the top.
    With the whole vocabulary on top it is KL(q || p). With q on a single token it is `Nll`. (Hinton et al. 2015,
    arXiv:1503.02531. On the student's own replies: Agarwal et al. 2024, arXiv:2306.13649.)

    See `Divergence` for what the batch carries.
    """

    def terms(self, outcomes: Outcomes) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        q_N = outcomes.q_N
        return q_N * (outcomes.log_q_N - outcomes.log_p_N), -q_N


@dataclasses.dataclass(frozen=True)
class ReverseKl(Divergence):
    """`KL(p || q)` to the live ghost's distribution q: the student leaves what the ghost would not do.

        sum_o p_o (log p_o - log q_o)

    Logit gradient over all tokens: `p(v) (log p(v) - log q(v) - KL)`. It is proper, and large where the student does
    what the ghost finds impossible. A ghost that is certain of one token has q_rest = 1e-6, since its rest cannot be
    known better: the pull towards it is bounded by log 1e6. (Gu et al. 2024, "MiniLLM", arXiv:2306.08543.)

    See `Divergence` for what the batch carries.
    """

    @property
    def least_rest(self) -> float:
        return ROUNDING

    def terms(self, outcomes: Outcomes) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        terms_N = outcomes.p_N * (outcomes.log_p_N - outcomes.log_q_N)
        return terms_N, terms_N


@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence):
    """The generalized Jensen-Shannon divergence to the live ghost's distribution q, with m = beta q + (1 - beta) p.

        beta KL(q || m) + (1 - beta) KL(p || m),    pull u_o = (1 - beta) p_o (log p_o - log m_o)

    It is proper and bounded. beta = 0 stands for `ForwardKl` and beta = 1 for `ReverseKl`, the limits of the divergence
    over beta and over 1 - beta, as TRL and the paper define them. Towards either end the divergence itself goes to 0:
    at beta = 0.01 its gradient is about 0.01 of that of `ForwardKl`. (Agarwal et al. 2024, "GKD", arXiv:2306.13649.)

    See `Divergence` for what the batch carries.

    Attributes:
        beta: in [0, 1], the share of the ghost in m.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta <= 1, "JensenShannon.beta", "a number in [0, 1]", self.beta)

    @property
    def least_rest(self) -> float:
        return ROUNDING if self.beta == 1 else 0.0

    def terms(self, outcomes: Outcomes) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        if self.beta in (0, 1):
            return (ReverseKl() if self.beta else ForwardKl()).terms(outcomes)
        log_m_N = outcomes.log_mixture(self.beta)
        from_p_N = (1 - self.beta) * outcomes.p_N * (outcomes.log_p_N - log_m_N)
        return self.beta * outcomes.q_N * (outcomes.log_q_N - log_m_N) + from_p_N, from_p_N


@dataclasses.dataclass(frozen=True)
class SkewedKl(Divergence):
    """A Kullback-Leibler divergence whose second argument is mixed with the first, so that it is bounded.

        forward    KL(q || m),  m = alpha q + (1 - alpha) p,    pull u_o = -q_o (1 - alpha) p_o / m_o
        reverse    KL(p || m),  m = alpha p + (1 - alpha) q,    pull u_o = p_o (log p_o - log m_o - alpha p_o / m_o)

    Both are proper, and at most log(1 / alpha). alpha = 0 is `ForwardKl` or `ReverseKl`.
    (Ko et al. 2024, "DistiLLM", arXiv:2402.03898.)

    See `Divergence` for what the batch carries.

    Attributes:
        alpha: share of the first argument in the second, in [0, 1).
        direction: forward or reverse.
    """

    alpha: float = 0.1
    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha < 1, "SkewedKl.alpha", "a number in [0, 1)", self.alpha)
        known = self.direction in ("forward", "reverse")
        require(known, "SkewedKl.direction", '"forward" or "reverse"', self.direction)

    @property
    def least_rest(self) -> float:
        return ROUNDING if self.direction == "reverse" and not self.alpha else 0.0

    def terms(self, outcomes: Outcomes) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        p_N, q_N, log_p_N, log_q_N = outcomes.p_N, outcomes.q_N, *outcomes
        if self.direction == "forward":
            log_m_N = outcomes.log_mixture(self.alpha)
            return q_N * (log_q_N - log_m_N), -q_N * (1 - self.alpha) * jnp.exp(log_p_N - log_m_N)
        log_m_N = outcomes.log_mixture(1 - self.alpha)
        terms_N = p_N * (log_p_N - log_m_N)
        return terms_N, terms_N - (self.alpha * p_N * jnp.exp(log_p_N - log_m_N) if self.alpha else 0.0)


@dataclasses.dataclass(frozen=True)
class ReferenceKl(Around):
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
        one = "an objective with a top_k, since the exact divergence reads the teacher in the reference's place"
        require(not protocol.reads_teacher(self.objective), "ReferenceKl.objective", one, self.objective)

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
