"""Optimizers as optax chains: a schedule, clipping by global norm, weight decay, and how bfloat16 sums are rounded."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from cotgrpo.optimizers.labels import decayed, stacked_matrices
from cotgrpo.optimizers.rounding import Rounding, is_bfloat16, lost_share, with_rounding
from cotgrpo.optimizers.schedule_free import averaged_params

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Params

Optimizer = Literal["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free"]
Schedule = Literal["cosine", "linear", "constant"]
LARGEST_RATE = 1e3
"""A higher learning rate is a slip of the pen."""
MUON_RMS = 0.2
"""Root mean square of muon's updates at the learning rate 1: that of AdamW (arXiv:2502.16982), so rates carry over."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
        name: optimizer: `adamw`, `adafactor` (least memory), `lion`, `sgd` (with momentum b1), `muon` (orthogonal
            updates of each layer's matrices, with momentum b1; adamw for the embedding, the head, norms and biases), or
            `schedule_free` (adamw that trains an average of its weights: no schedule after the warm-up).
        learning_rate: peak of the learning rate, above 0.
        warmup_steps: steps of the linear warm-up.
        warmup_ratio: the same as a fraction of all steps, rounded up to whole steps. Give one of the two.
        schedule: decay after the warm-up. schedule_free has none.
        final_fraction: learning rate at the last step, as a fraction of the peak.
        weight_decay: decoupled weight decay, on matrices only: not on norm scales or biases.
        clip_norm: global norm that gradients are clipped to; null turns clipping off.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.
        rounding: how a parameter that is stored in bfloat16 takes an update: `nearest` loses small ones; `stochastic`
            rounds at random, so that all arrive in the mean, and takes no memory; `compensated` adds exactly, and
            takes 2 bytes a parameter. With the latter two, the optimizer's own state is float32.
    """

    name: Optimizer = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    rounding: Rounding = "nearest"
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        choices_of = {"name": Optimizer, "schedule": Schedule, "rounding": Rounding}
        for name, choices in ((name, get_args(choice)) for name, choice in choices_of.items()):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.learning_rate > LARGEST_RATE:
            raise ValueError(f"learning_rate must be at most {LARGEST_RATE:g}, got {self.learning_rate:g}.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}.")
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio is {self.warmup_ratio} and warmup_steps is {self.warmup_steps}: give one of the two."
            )
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must lie in [0, 1], got {self.final_fraction}.")
        if self.name == "schedule_free" and self.schedule == "linear":
            raise ValueError("schedule does not apply to schedule_free, which keeps its rate, got 'linear': remove it.")
        if self.name == "schedule_free" and not self.b1 > 0:
            raise ValueError(f"b1 must be above 0 for schedule_free, which averages with it, got {self.b1}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}.")

    def warmup(self, total_steps: int) -> int:
        """Return the steps of the warm-up in a run of `total_steps`: of a ratio, at least one less than those."""
        return (
            min(math.ceil(self.warmup_ratio * total_steps), total_steps - 1) if self.warmup_ratio else self.warmup_steps
        )

    def make_schedule(self, total_steps: int) -> optax.Schedule:
        """Return the learning rate by step.

        It rises linearly over the warm-up. Then it stays, or falls to `final_fraction` of the peak at `total_steps`.
        That of `schedule_free` always stays.

        Raises:
            ValueError: `warmup_steps` outside [0, total_steps).
        """
        warmup_steps = self.warmup(total_steps)
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"warmup_steps must lie in [0, total_steps), got {warmup_steps} with total_steps={total_steps}."
            )
        peak, rest = self.learning_rate, total_steps - warmup_steps
        after = {
            "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction),
            "linear": lambda: optax.linear_schedule(peak, self.final_fraction * peak, rest),
            "constant": lambda: optax.constant_schedule(peak),
        }["constant" if self.name == "schedule_free" else self.schedule]()
        if not warmup_steps:
            return after
        # The ramp starts at 1 / warmup_steps of the peak and not at 0: the first step should count.
        ramp = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
        return optax.join_schedules([ramp, after], [warmup_steps])

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """Return the optimizer of a run of `total_steps` steps. Raises ValueError as `make_schedule` does."""
        rated = optax.inject_hyperparams(self.at_rate)(learning_rate=self.make_schedule(total_steps))
        tx = rated if self.clip_norm is None else optax.chain(clip_by_norm(self.clip_norm), rated)
        # The average of schedule_free moves less and less, so it needs float32 anyway.
        plain = self.rounding == "nearest" and self.name != "schedule_free"
        return tx if plain else with_rounding(tx, self.rounding)

    def at_rate(self, learning_rate: Float[Array, ""]) -> optax.GradientTransformation:
        """Return the named optimizer at one learning rate."""
        decay = self.weight_decay
        adamw = optax.adamw(learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=decay, mask=decayed)
        if self.name == "adamw":
            return adamw
        if self.name == "lion":
            return optax.lion(learning_rate, b1=self.b1, b2=self.b2, weight_decay=decay, mask=decayed)
        if self.name == "adafactor":
            return optax.adafactor(
                learning_rate,
                multiply_by_parameter_scale=False,
                weight_decay_rate=decay or None,
                weight_decay_mask=decayed,
            )
        if self.name == "muon":
            matrices = optax.contrib.muon(
                learning_rate,
                beta=self.b1,
                eps=self.eps,
                weight_decay=decay,
                consistent_rms=MUON_RMS,
                # The axes before the last two are the layers', each of which is orthogonalized by itself.
                muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
            )
            label = lambda params: jax.tree.map(lambda m: "muon" if m else "adamw", stacked_matrices(params))
            return optax.partition({"muon": matrices, "adamw": adamw}, label)
        if self.name == "schedule_free":
            base = optax.chain(
                optax.scale_by_rms(decay=self.b2, eps=self.eps, eps_in_sqrt=False, bias_correction=True),
                optax.add_decayed_weights(decay, mask=decayed),
                optax.scale_by_learning_rate(learning_rate),
            )
            return averaged_params(base, learning_rate, self.b1)
        return optax.chain(optax.add_decayed_weights(decay, mask=decayed), optax.sgd(learning_rate, momentum=self.b1))

    def typical_update(self, num_params: int) -> float | None:
        """Return the size of an update at the peak learning rate, about; None if gradients alone decide it."""
        if self.name != "sgd":
            return self.learning_rate * (MUON_RMS if self.name == "muon" else 1.0)
        if self.clip_norm is None:
            return None
        return self.learning_rate * self.clip_norm / (1 - self.b1) / math.sqrt(num_params)

    def rounding_loss(self, params: Params) -> str | None:
        """Return a sentence on the updates that rounding to bfloat16 will lose, or None if none are."""
        stored = sum(leaf.size for leaf in jax.tree.leaves(params) if is_bfloat16(leaf))
        if not stored or self.rounding != "nearest":
            return None
        size = self.typical_update(stored)
        if size is None:
            what = "updates smaller than 1/512 to 1/256 of their weight are lost"
        else:
            lost = f"{lost_share(params, size):.0%}"
            what = (
                f"about {lost} of the updates are lost: they have a size of about {size:.1g}, at the peak learning rate"
            )
        return f"parameters are stored in bfloat16 and sums are rounded to the nearest value, so {what}"


def make_optimizer(
    name: Optimizer = "adamw", *, learning_rate: float, total_steps: int, **settings: Any
) -> optax.GradientTransformation:
    """Return gradient clipping, then the named optimizer.

    Its state holds the learning rate in use, which the train step reports.

    Args:
        name: "adamw", "adafactor", "lion", "sgd", "muon" or "schedule_free". The last one needs gradients at
            `gradient_params(params, opt_state)`, which the train steps of `cotgrpo` take.
        learning_rate: the peak, above 0.
        total_steps: number of updates that the schedule spans.
        **settings: any other attribute of `OptimizerConfig`, which has the defaults: `warmup_steps`, `schedule`,
            `final_fraction`, `weight_decay`, `clip_norm`, `b1`, `b2`, `eps`, `rounding`, `warmup_ratio`.

    Raises:
        ValueError: an unknown name or an argument outside its range.
        TypeError: an unknown argument.
    """
    return OptimizerConfig(name, learning_rate, **settings).build(total_steps)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Return a transformation that multiplies gradients by `min(1, most / norm)`, with their global norm.

    `optax.clip_by_global_norm` divides each element, which XLA does in a separate pass over all gradients. A product is
    fused with what follows.
    """

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        scale = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
