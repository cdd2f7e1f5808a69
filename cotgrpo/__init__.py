"""cotgrpo: teach small language models to reason, by chain-of-thought distillation and GhostRespond Policy Optimization.

GRPO in this package is GhostRespond Policy Optimization (a ghost reply supplies the ideal token at each context), not Group Relative
Policy Optimization. The names below need jax, flax, optax and numpy alone; data, sampling and runs live in the subpackages.
"""

from cotgrpo.objectives import Nll, Pair, Reinforce, RewardGradient, TokenInputs, ghost_reward
from cotgrpo.objectives.divergences import ForwardKl, ReferenceKl
from cotgrpo.optimizers import make_optimizer
from cotgrpo.sharding import jit_step, make_mesh
from cotgrpo.train_steps import make_eval_step, make_grpo_step, make_sft_step
from cotgrpo.types import GhostBatch, Metric, SftBatch, Student, TrainState

__all__ = [
    "ForwardKl",
    "GhostBatch",
    "Metric",
    "Nll",
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
    """`__version__`, looked up when asked for: the code also runs from a checkout that is not installed."""
    if name == "__version__":
        from importlib.metadata import version

        return version("cotgrpo")
    raise AttributeError(f"module 'cotgrpo' has no attribute {name!r}")
