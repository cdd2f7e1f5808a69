"""What to optimise, as the maths of one token. GRPO here is GhostRespond Policy Optimization, not Group Relative.

At a context c the student has a distribution p over the vocabulary. A ghost reply supplies the ideal token y*; the student draws y.
The reward is the log-ratio R = log p(y*) - log p(y), which is a difference of two logits, because both share one normaliser:

    D(y) = log p(y*) - log p(y) = z(y*) - z(y)

An objective is any function `objective(logits_V, row) -> (loss, metrics)`: one row of float32 logits, one `TokenInputs`, a scalar loss and a dict
of scalars to be averaged. The engine maps it over tokens, weights it, sums it and takes its gradient. Three optional attributes tell the
engine more, a fourth the batch; a plain function needs none of them:

    num_draws          tokens to draw at each context; `row.drawn` is one of them and the results are averaged (a function: 1)
    draw_logits        `draw_logits(logits_V) -> logits_V` of the distribution they are drawn from (default: the student's own)
    value_and_grad     `value_and_grad(logits_V, row) -> ((loss, metrics), dloss_dlogits_V)`, a closed form instead of autodiff
    top_k              tokens of the ghost's own distribution that the batch has to hold (default: 0)

Every objective here except `Reinforce` has the logit gradient `sum_y s(y) (e_y - e_{y*})`, with `s >= 0` its *slope*: each single update raises
log p(y*) and lowers log p(y), and y = y* contributes exactly nothing. They differ only in s:

    Nll                     s(y) = p(y)                              fixed point: the ghost distribution q
    RewardGradient          s(y) = 1 at the drawn y                  its mean over y ~ p is the gradient of Nll
    Pair, policy            s(y) = 2 p(y) sigmoid(-beta D(y))        fixed point: p proportional to q^(1/(1+beta))
    Pair, calibrated        the same, y ~ p^(1-beta)                 fixed point: q

`GroupRelative` has no ghost. Two more are in `cotgrpo.objectives.divergences`: `ForwardKl`, to the ghost's whole distribution, and `ReferenceKl`, which keeps any of them near a reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo.xla_cpu import materialized_on_cpu, vocab_sum

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

Objective = Callable[..., Any]
"""`objective(logits_V, row) -> (loss, metrics)`."""

MASKED_LOGIT = -1e30
"""The logit of a token that does not exist (a padded column of the head): finite, so 0 * logit is 0 and not NaN."""


class TokenInputs(flax.struct.PyTreeNode):
    """What an objective knows about one token, beside the student's logits.

    Attributes:
        ghost: int32 in [0, V), y*.
        drawn: int32 in [0, V), y; None when the objective asks for no draws.
        weight: float32, this token's weight in the loss. The engine applies it; an objective need not.
        reference_logits: float32 `[V]`, the frozen reference model's logits at this context, or None without a reference.
        drawn_log_prob: float32, log p(y) when y was drawn, and
        advantage: float32, of the reply that y belongs to, in the batches that hold them.
        top_ids: int32 `[K]`, the likeliest tokens of the ghost's distribution q, and
        top_log_probs: float32 `[K]`, log q of each, in the batches that hold them.
    """

    ghost: Int[Array, ""]
    drawn: Any  # Int[Array, ""] where the objective asked for draws, and None nowhere else
    weight: Float[Array, ""]
    reference_logits: Any = None  # Float[Array, "V"] where there is a reference
    drawn_log_prob: Any = None  # Float[Array, ""] each, beside drawn tokens with an advantage
    advantage: Any = None
    top_ids: Any = None  # Int[Array, "K"] and Float[Array, "K"], of a live ghost that was asked for them
    top_log_probs: Any = None


def ghost_reward(
    logits_V: Float[Array, "V"], ghost: int | Int[Array, ""], drawn: int | Int[Array, ""]
) -> Float[Array, ""]:
    """The GhostRespond reward of one drawn token: `log p(ghost) - log p(drawn)`, with p = softmax(logits).

    The normaliser cancels, so this is `logits[ghost] - logits[drawn]`: exact, and no pass over the vocabulary. `vmap` it over tokens.

    Args:
        logits_V: one context's logits.
        ghost: y* in [0, V).
        drawn: y in [0, V).

    Returns:
        The reward in nats: positive where the student finds the ghost token likelier than its own, 0 at `ghost == drawn`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(ghost_reward(jnp.array([1.0, 3.0, 0.5]), ghost=1, drawn=0))
        2.0
    """
    return logits_V[ghost] - logits_V[drawn]


class Distribution(NamedTuple):
    """p = softmax(z) at one context.

    Attributes:
        logits_V: z.
        log_z: the log-normaliser `log sum_v exp(z_v)`; NaN where the largest logit is not finite.
        p_V: `exp(z - log_z)`, NaN there too.
    """

    logits_V: Any
    log_z: Any
    p_V: Any

    def log_prob(self, token: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """`log p(token)`, of one or of several."""
        return self.logits_V[token] - self.log_z

    def entropy(self) -> Float[Array, ""]:
        """`-sum_v p_v log p_v`, in nats."""
        return self.log_z - vocab_sum(self.p_V * self.logits_V)


def softmax(logits_V: Float[Array, "V"]) -> Distribution:
    """The distribution of logits, from one array of exponentials."""
    top = jax.lax.stop_gradient(jnp.max(logits_V))
    mass_V = materialized_on_cpu(jnp.exp(logits_V - top))
    mass = jnp.sum(mass_V)
    return Distribution(logits_V, top + jnp.log(mass), mass_V * (1 / mass))


def distribution_metrics(student: Distribution, row: TokenInputs) -> dict[str, Any]:
    """What every objective reports: `entropy` of p in nats, and `token_accuracy`, 1 where the greedy token is the ghost."""
    return {
        "entropy": student.entropy(),
        "token_accuracy": jnp.float32(student.logits_V[row.ghost] >= jnp.max(student.logits_V)),
    }


def exact_metrics(student: Distribution, row: TokenInputs) -> dict[str, Any]:
    """The reward and its companions as exact means over y ~ p: nothing needs to be drawn to know them.

    `reward` = E[log p(y*) - log p(y)], `ghost_prob` = p(y*), `drawn_prob` = E[p(y)], `match_rate` = P(y = y*) = p(y*).
    """
    metrics = distribution_metrics(student, row)
    ghost_prob = jnp.exp(student.log_prob(row.ghost))
    return metrics | {
        "reward": student.log_prob(row.ghost) + metrics["entropy"],
        "ghost_prob": ghost_prob,
        "drawn_prob": vocab_sum(student.p_V * student.p_V),
        "match_rate": ghost_prob,
    }


def drawn_metrics(student: Distribution, row: TokenInputs) -> dict[str, Any]:
    """The same for the one token that was drawn."""
    return distribution_metrics(student, row) | {
        "reward": ghost_reward(student.logits_V, row.ghost, row.drawn),
        "ghost_prob": jnp.exp(student.log_prob(row.ghost)),
        "drawn_prob": jnp.exp(student.log_prob(row.drawn)),
        "match_rate": jnp.float32(row.drawn == row.ghost),
    }


def toward_ghost(slope_V: Float[Array, "V"], ghost: Int[Array, ""]) -> Float[Array, "V"]:
    """The logit gradient `sum_y s(y) (e_y - e_ghost)` of slopes s: every y is pushed down, the ghost up by as much.

    The slope at the ghost itself drops out, and is left out, so that a lone y = y* gives exactly zero.
    """
    is_ghost_V = jnp.arange(slope_V.shape[0]) == ghost
    others_V = jnp.where(is_ghost_V, 0.0, slope_V)
    return jnp.where(is_ghost_V, -jnp.sum(others_V), others_V)


def softplus(x: Any) -> Any:
    """`log(1 + exp(x))`, elementwise, as `max(x, 0) + log(1 + exp(-|x|))`: within 6e-8 of it, and without log1p, which a CPU computes one by one."""
    rest = jnp.log(1 + jnp.exp(-jnp.abs(x)))
    return jnp.where(x >= 0, x + rest, rest)  # JAX's derivative of |x| is 1 at 0, so this one's is 1/2


@dataclasses.dataclass(frozen=True)
class Nll:
    """Maximum likelihood of the ghost token: `-log p(y*)`. On text this is SFT.

    Logit gradient: `p - e_{y*}`. Proper: against ghosts drawn from q the minimum is p = q.
    """

    num_draws = 0

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        student = softmax(logits_V)
        return -student.log_prob(row.ghost), distribution_metrics(student, row)

    def value_and_grad(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, Float[Array, "V"]]:
        return self(logits_V, row), toward_ghost(softmax(logits_V).p_V, row.ghost)


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """The formula taken literally: `-sg(R) log p(y)`, y ~ p, R = log p(y*) - log p(y). For study; it does not work.

    Warning: `log p(y*)` is a constant baseline and drops out of the expected gradient, which is exactly minus the gradient of the *entropy* of p.
    It carries no information about y*, raises the entropy without end, and destroys a trained student in a few hundred steps.
    It stays as the negative control of the tests.
    """

    num_draws = 1

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        student = softmax(logits_V)
        metrics = drawn_metrics(student, row)
        return -jax.lax.stop_gradient(metrics["reward"]) * student.log_prob(row.drawn), metrics


@dataclasses.dataclass(frozen=True)
class RewardGradient:
    """Ascent on the reward itself: `-(log p(y*) - log p(y))`, y ~ p held fixed.

    Logit gradient: `e_y - e_{y*}`. Its mean over y ~ p is exactly the gradient of `Nll`; drawing y only adds noise to that.

    Attributes:
        samples: tokens drawn at each context and averaged, at least 1.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        require(self.samples >= 1, "RewardGradient.samples", "an integer of at least 1", self.samples)

    @property
    def num_draws(self) -> int:
        return self.samples

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        return -ghost_reward(logits_V, row.ghost, row.drawn), drawn_metrics(softmax(logits_V), row)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A logistic preference of the ghost over what the student would say, beside the likelihood of the ghost.

        nll_weight * -log p(y*)  +  pair_weight * E_y[(2 / beta) softplus(-beta D(y))],    y ~ n held fixed

    The factor 2 makes the slope at D = 0 that of `Nll`. Pairs that are won by a margin (D large) push no more.

    With negatives from the policy (n = p) the pair term alone is not proper: against ghosts drawn from q its fixed point is p proportional to
    q^(1/(1+beta)), flatter than q, and on the student's own contexts it collapses. Beside the likelihood it is safe. Calibrated
    negatives, n proportional to p^(1-beta), make the fixed point exactly q, and need no anchor.

    Attributes:
        beta: > 0, the sharpness of the preference; at most 1 with calibrated negatives (1: uniform negatives).
        nll_weight: >= 0.
        pair_weight: >= 0.
        negatives: "policy" or "calibrated".
        estimator: "exact" takes the mean over the whole vocabulary, all of which is at hand; "drawn" draws y.
        samples: tokens drawn at each context and averaged; "drawn" only.
    """

    beta: float = 1.0
    nll_weight: float = 1.0
    pair_weight: float = 0.3
    negatives: Literal["policy", "calibrated"] = "policy"
    estimator: Literal["exact", "drawn"] = "exact"
    samples: int = 1

    def __post_init__(self) -> None:
        require(self.beta > 0, "Pair.beta", "a positive number", self.beta)
        require(self.nll_weight >= 0, "Pair.nll_weight", "a number of at least 0", self.nll_weight)
        require(self.pair_weight >= 0, "Pair.pair_weight", "a number of at least 0", self.pair_weight)
        require(self.nll_weight + self.pair_weight > 0, "Pair.nll_weight + pair_weight", "a positive sum", 0)
        require(
            self.negatives in ("policy", "calibrated"), "Pair.negatives", '"policy" or "calibrated"', self.negatives
        )
        require(self.estimator in ("exact", "drawn"), "Pair.estimator", '"exact" or "drawn"', self.estimator)
        require(self.samples >= 1, "Pair.samples", "an integer of at least 1", self.samples)
        if self.negatives == "calibrated":
            require(self.beta <= 1, "Pair.beta", "at most 1 with calibrated negatives", self.beta)

    @property
    def num_draws(self) -> int:
        return self.samples if self.estimator == "drawn" else 0

    def draw_logits(self, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
        """Logits of the distribution n of the negatives."""
        if self.negatives == "policy":
            return logits_V
        # A token that does not exist stays impossible at any temperature (0 * -1e30 would make it likely).
        return jnp.where(logits_V <= MASKED_LOGIT, MASKED_LOGIT, (1 - self.beta) * logits_V)

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        student = softmax(logits_V)
        if self.estimator == "drawn":
            pair = softplus(-self.beta * ghost_reward(logits_V, row.ghost, row.drawn))
            metrics = drawn_metrics(student, row)
        else:
            n_V = jax.lax.stop_gradient(self.negatives_V(student))
            pair = vocab_sum(n_V * softplus(self.beta * (logits_V - logits_V[row.ghost])))
            metrics = exact_metrics(student, row)
        return self.pair_weight * (2 / self.beta) * pair - self.nll_weight * student.log_prob(row.ghost), metrics

    def negatives_V(self, student: Distribution) -> Float[Array, "V"]:
        """The distribution of the negatives."""
        return student.p_V if self.negatives == "policy" else softmax(self.draw_logits(student.logits_V)).p_V

    def value_and_grad(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, Float[Array, "V"]]:
        student = softmax(logits_V)
        if self.estimator == "drawn":
            n_V = (jnp.arange(logits_V.shape[0]) == row.drawn).astype(jnp.float32)
        else:
            n_V = self.negatives_V(student)
        lost_V = jax.nn.sigmoid(self.beta * (logits_V - logits_V[row.ghost]))
        slope_V = self.nll_weight * student.p_V + (2 * self.pair_weight) * n_V * lost_V
        return self(logits_V, row), toward_ghost(slope_V, row.ghost)


@dataclasses.dataclass(frozen=True)
class GroupRelative:
    """Group Relative Policy Optimization, which the field calls GRPO, to be compared with: no ghost, but an advantage A of the whole reply that y is part of.

        -min(r A, clip(r, 1 - clip, 1 + clip) A) + kl_weight (u - log u - 1),    r = p(y) / p_old(y),  u = p_ref(y) / p(y)

    p_old is the student that drew y, and the second term the estimator "k3" of KL(p || p_ref). With c the derivative in log p(y), which is
    `-r A` where the minimum is not clipped, plus `kl_weight (1 - u)`, the logit gradient is `c (e_y - p)`.
    Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300. Adds the metrics `clipped`, the share of tokens whose ratio has no gradient, and `kl` where it is weighted.

    Attributes:
        clip: in (0, 1).
        kl_weight: >= 0; above 0 it needs a reference.
    """

    clip: float = 0.2
    kl_weight: float = 0.0

    num_draws = 1

    def __post_init__(self) -> None:
        require(0 < self.clip < 1, "GroupRelative.clip", "a number in (0, 1)", self.clip)
        require(self.kl_weight >= 0, "GroupRelative.kl_weight", "a number of at least 0", self.kl_weight)

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def __call__(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, dict[str, Any]]:
        return self.parts(softmax(logits_V), row)[:2]

    def value_and_grad(self, logits_V: Float[Array, "V"], row: TokenInputs) -> tuple[Any, Float[Array, "V"]]:
        student = softmax(logits_V)
        loss, metrics, slope = self.parts(student, row)
        is_drawn_V = (jnp.arange(logits_V.shape[0]) == row.drawn).astype(jnp.float32)
        return (loss, metrics), slope * (is_drawn_V - student.p_V)

    def parts(self, student: Distribution, row: TokenInputs) -> tuple[Any, dict[str, Any], Any]:
        """`(loss, metrics, dloss / dlog p(y))`."""
        log_p = student.log_prob(row.drawn)
        ratio = jnp.exp(log_p - row.drawn_log_prob)
        bounded = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        clipped = bounded * row.advantage < ratio * row.advantage
        loss = -jnp.minimum(ratio * row.advantage, bounded * row.advantage)
        slope = jnp.where(clipped, 0.0, -ratio * row.advantage)
        metrics = {"entropy": student.entropy(), "clipped": jnp.float32(clipped)}
        if self.kl_weight:
            log_u = softmax(row.reference_logits).log_prob(row.drawn) - log_p
            metrics["kl"] = jnp.exp(log_u) - log_u - 1
            loss, slope = loss + self.kl_weight * metrics["kl"], slope + self.kl_weight * (1 - jnp.exp(log_u))
        return loss, metrics, slope


def num_draws(objective: Objective) -> int:
    """How many tokens the engine draws for each context."""
    return getattr(objective, "num_draws", 1)


def top_k(objective: Objective) -> int:
    """How many of the likeliest tokens of the ghost's distribution the objective wants to know."""
    return getattr(objective, "top_k", 0)


def draw_logits(objective: Objective, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
    """Logits of the distribution the engine draws them from."""
    own = getattr(objective, "draw_logits", None)
    return logits_V if own is None else own(logits_V)


def value_and_grad(objective: Objective) -> Callable[..., Any]:
    """`(logits_V, row) -> ((loss, metrics), dloss_dlogits_V)`: the objective's closed form, or autodiff where it has none."""
    own = getattr(objective, "value_and_grad", None)
    return jax.value_and_grad(objective, has_aux=True) if own is None else own


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError, naming the argument, what was expected and what came, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}.")
