"""What to optimize, as the math of one token. GRPO here is GhostRespond Policy Optimization, not Group Relative.

At a context c the student has a distribution p over the vocabulary. A ghost reply supplies the ideal token y*. The
student draws y. The reward is the log-ratio R = log p(y*) - log p(y). Both share one normalizer, so R is a difference
of two logits:

    D(y) = log p(y*) - log p(y) = z(y*) - z(y)

`cotgrpo.objectives.protocol.Objective` says what an objective is. Every objective here except `Reinforce` and
`GroupRelative` has the logit gradient `sum_y s(y) (e_y - e_{y*})`, with `s >= 0` its *slope*. A step down it raises
p(y*), and the reward R of every y, if the logits are free. The one y of a drawn pair falls. With exact means some y may
rise, and y falls in the mean over y ~ p. With shared parameters this holds on average only (docs/method.md, "What an
update does"). y = y* contributes exactly nothing. The objectives differ only in s:

    Nll                     s(y) = p(y)                              fixed point: the ghost distribution q
    RewardGradient          s(y) = 1 at the drawn y                  its mean over y ~ p is the gradient of Nll
    Pair, policy, alone     s(y) = 2 p(y) sigmoid(-beta D(y))        fixed point: p proportional to q^(1/(1+beta))
    Pair, calibrated        the same, y ~ p^(1-beta)                 fixed point: q
    Pair(), the default     s(y) = p(y) (1 + 0.6 sigmoid(-D(y)))     fixed point: between q and q^(1/2), near q

`ForwardKl`, `ReverseKl`, `JensenShannon` and `SkewedKl` compare with the ghost's whole distribution, and rest at it.
`GhostRespond` is the drawn pair alone, the method as stated. `ReferenceKl` keeps any objective near a frozen reference.
`GroupRelative` has no ghost. `RewardGain` measures what an update did to R.
"""

from cotgrpo.objectives.distribution import MASKED_LOGIT, Distribution, ghost_reward, softmax
from cotgrpo.objectives.divergences import Divergence, ForwardKl, JensenShannon, ReferenceKl, ReverseKl, SkewedKl
from cotgrpo.objectives.drawing import draw, draw_uniform, likeliest
from cotgrpo.objectives.ghost import GhostRespond, Nll, Pair, Reinforce, RewardGradient
from cotgrpo.objectives.group_relative import GroupRelative
from cotgrpo.objectives.protocol import (
    Objective,
    TokenInputs,
    batch_fields,
    draw_logits,
    needs_reference,
    num_draws,
    reads_teacher,
    top_k,
    value_and_grad,
)
from cotgrpo.objectives.reward_gain import RewardGain
from cotgrpo.objectives.rewarded_ghost import RewardedGhost

__all__ = [
    "MASKED_LOGIT",
    "Distribution",
    "Divergence",
    "ForwardKl",
    "GhostRespond",
    "GroupRelative",
    "JensenShannon",
    "Nll",
    "Objective",
    "Pair",
    "ReferenceKl",
    "Reinforce",
    "ReverseKl",
    "RewardGain",
    "RewardGradient",
    "RewardedGhost",
    "SkewedKl",
    "TokenInputs",
    "batch_fields",
    "draw",
    "draw_logits",
    "draw_uniform",
    "ghost_reward",
    "likeliest",
    "needs_reference",
    "num_draws",
    "reads_teacher",
    "softmax",
    "top_k",
    "value_and_grad",
]
