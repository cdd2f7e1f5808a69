"""Teach small language models to reason: chain-of-thought distillation and GhostRespond Policy Optimization.

GRPO in this package is GhostRespond Policy Optimization, not Group Relative Policy Optimization: a ghost reply supplies
the ideal token at each context. The names below need only jax, flax, optax and numpy. Data, sampling and runs are in
the subpackages.
"""

from cotgrpo.objectives import (
    ForwardKl,
    Nll,
    Objective,
    Pair,
    ReferenceKl,
    Reinforce,
    RewardGradient,
    TokenInputs,
    ghost_reward,
)
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import jit_step, make_mesh
from cotgrpo.train_steps import make_eval_step, make_grpo_step, make_sft_step
from cotgrpo.types import GhostBatch, Metric, SftBatch, Student, TrainState

__all__ = [
    "ForwardKl",
    "GhostBatch",
    "Metric",
    "Nll",
    "Objective",
    "Pair",
    "ReferenceKl",
    "Reinforce",
    "RewardGradient",
    "SftBatch",
    "Student",
    "TokenInputs",
    "TrainState",
    "ghost_reward",
    "jit_step",
    "make_eval_step",
    "make_grpo_step",
    "make_mesh",
    "make_optimizer",
    "make_sft_step",
]


def __getattr__(name: str) -> str:
    """Look up `__version__` on first use, since the code also runs from a checkout that is not installed."""
    if name == "__version__":
        from importlib.metadata import version

        return version("cotgrpo")
    raise AttributeError(f"module 'cotgrpo' has no attribute {name!r}")
