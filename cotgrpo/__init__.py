"""Teach small language models to reason: chain-of-thought distillation and GhostRespond Policy Optimization.

GRPO in this package is GhostRespond Policy Optimization, not Group Relative Policy Optimization: a ghost reply supplies
the ideal token at each context. The names below need only jax, flax, optax and numpy. Data, sampling and runs are in
the subpackages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cotgrpo.objectives import (
        ForwardKl,
        GhostRespond,
        GroupRelative,
        JensenShannon,
        Nll,
        Objective,
        Pair,
        ReferenceKl,
        Reinforce,
        ReverseKl,
        RewardGradient,
        SkewedKl,
        TokenInputs,
        ghost_reward,
    )
    from cotgrpo.optimizers import make_optimizer, param_labels, with_rounding
    from cotgrpo.sequence_loss import SequenceInputs
    from cotgrpo.sharding import jit_step, make_mesh
    from cotgrpo.train_steps import make_eval_step, make_grpo_step, make_sft_step
    from cotgrpo.types import GhostBatch, Metric, SftBatch, Student, TrainState

__all__ = [
    "ForwardKl",
    "GhostBatch",
    "GhostRespond",
    "GroupRelative",
    "JensenShannon",
    "Metric",
    "Nll",
    "Objective",
    "Pair",
    "ReferenceKl",
    "Reinforce",
    "ReverseKl",
    "RewardGradient",
    "SequenceInputs",
    "SftBatch",
    "SkewedKl",
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
    "param_labels",
    "with_rounding",
]

NAMES = {
    "ForwardKl": "objectives",
    "GhostBatch": "types",
    "GhostRespond": "objectives",
    "GroupRelative": "objectives",
    "JensenShannon": "objectives",
    "Metric": "types",
    "Nll": "objectives",
    "Objective": "objectives",
    "Pair": "objectives",
    "ReferenceKl": "objectives",
    "Reinforce": "objectives",
    "ReverseKl": "objectives",
    "RewardGradient": "objectives",
    "SequenceInputs": "sequence_loss",
    "SftBatch": "types",
    "SkewedKl": "objectives",
    "Student": "types",
    "TokenInputs": "objectives",
    "TrainState": "types",
    "ghost_reward": "objectives",
    "jit_step": "sharding",
    "make_eval_step": "train_steps",
    "make_grpo_step": "train_steps",
    "make_mesh": "sharding",
    "make_optimizer": "optimizers",
    "make_sft_step": "train_steps",
    "param_labels": "optimizers",
    "with_rounding": "optimizers",
}
"""Each public name, and the module that defines it."""


def __getattr__(name: str) -> object:
    """Import a public name on its first use, so that the command line answers before JAX is loaded.

    `__version__` is looked up, since the code also runs from a checkout that is not installed.
    """
    if name in NAMES:
        return getattr(import_module(f"cotgrpo.{NAMES[name]}"), name)
    if name in NAMES.values():
        return import_module(f"cotgrpo.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("cotgrpo")
    raise AttributeError(f"module 'cotgrpo' has no attribute {name!r}")
