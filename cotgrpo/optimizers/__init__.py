"""Optimizers: the settings and their optax chains, labels of parameters, rounding of bfloat16, schedule-free averages.

    tx = make_optimizer("muon", learning_rate=2e-4, total_steps=1_000)       # settings: OptimizerConfig
    tx = with_rounding(optax.lion(1e-5), "stochastic")                       # your own chain, bfloat16 parameters
    mask = jax.tree.map(lambda label: label == "matrix", param_labels(params))

`optax.MultiSteps` weighs every batch alike. The steps weigh tokens: take their `micro_batches` for a batch that does
not fit into memory.
"""

from cotgrpo.optimizers.average import MovingAverage, with_moving_average
from cotgrpo.optimizers.config import Optimizer, OptimizerConfig, Schedule, clip_by_norm, make_optimizer
from cotgrpo.optimizers.extra_args import accept_extra_args
from cotgrpo.optimizers.labels import Label, decayed, param_labels
from cotgrpo.optimizers.rounding import Rounding, lost_share, with_rounding
from cotgrpo.optimizers.schedule_free import gradient_params

__all__ = [
    "Label",
    "MovingAverage",
    "Optimizer",
    "OptimizerConfig",
    "Rounding",
    "Schedule",
    "accept_extra_args",
    "clip_by_norm",
    "decayed",
    "gradient_params",
    "lost_share",
    "make_optimizer",
    "param_labels",
    "with_moving_average",
    "with_rounding",
]
