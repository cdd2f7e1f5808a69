"""Optimizers as optax chains: a schedule, clipping by global norm, and weight decay on matrices only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Params, PyTree

Optimizer = Literal["adamw", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
LARGEST_RATE = 1e3
"""A higher learning rate is a slip of the pen."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule.

    Attributes:
        name: optimizer: `adamw`, `adafactor` (least memory), `lion` or `sgd` (with momentum b1).
        learning_rate: peak of the learning rate, above 0.
        warmup_steps: steps of the linear warm-up.
        schedule: decay after the warm-up.
        final_fraction: learning rate at the last step, as a fraction of the peak.
        weight_decay: decoupled weight decay, on matrices only: not on norm scales or biases.
        clip_norm: global norm that gradients are clipped to; null turns clipping off.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.
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

    def __post_init__(self) -> None:
        for name, choices in (("name", get_args(Optimizer)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.learning_rate > LARGEST_RATE:
            raise ValueError(f"learning_rate must be at most {LARGEST_RATE:g}, got {self.learning_rate:g}.")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must lie in [0, 1], got {self.final_fraction}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}.")

    def make_schedule(self, total_steps: int) -> optax.Schedule:
        """Return the learning rate by step.

        It rises linearly over `warmup_steps`. Then it stays, or falls to `final_fraction` of the peak at `total_steps`.

        Raises:
            ValueError: `warmup_steps` outside [0, total_steps).
        """
        if not 0 <= self.warmup_steps < total_steps:
            raise ValueError(
                f"warmup_steps must lie in [0, total_steps), got {self.warmup_steps} with total_steps={total_steps}."
            )
        peak, rest = self.learning_rate, total_steps - self.warmup_steps
        after = {
            "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction),
            "linear": lambda: optax.linear_schedule(peak, self.final_fraction * peak, rest),
            "constant": lambda: optax.constant_schedule(peak),
        }[self.schedule]()
        if not self.warmup_steps:
            return after
        # The ramp starts at 1 / warmup_steps of the peak and not at 0: the first step should count.
        ramp = optax.linear_schedule(peak / self.warmup_steps, peak, max(self.warmup_steps - 1, 1))
        return optax.join_schedules([ramp, after], [self.warmup_steps])

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """Return the optimizer of a run of `total_steps` steps. Raises ValueError as `make_schedule` does."""

        def build(learning_rate: Float[Array, ""]) -> optax.GradientTransformation:
            decay = self.weight_decay
            if self.name == "adamw":
                return optax.adamw(
                    learning_rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=decay, mask=decayed
                )
            if self.name == "lion":
                return optax.lion(learning_rate, b1=self.b1, b2=self.b2, weight_decay=decay, mask=decayed)
            if self.name == "adafactor":
                return optax.adafactor(
                    learning_rate,
                    multiply_by_parameter_scale=False,
                    weight_decay_rate=decay or None,
                    weight_decay_mask=decayed,
                )
            return optax.chain(
                optax.add_decayed_weights(decay, mask=decayed), optax.sgd(learning_rate, momentum=self.b1)
            )

        optimizer = optax.inject_hyperparams(build)(learning_rate=self.make_schedule(total_steps))
        return optimizer if self.clip_norm is None else optax.chain(clip_by_norm(self.clip_norm), optimizer)


def make_optimizer(
    name: Optimizer = "adamw", *, learning_rate: float, total_steps: int, **settings: Any
) -> optax.GradientTransformation:
    """Return gradient clipping, then the named optimizer.

    Its state holds the learning rate in use, which the train step reports.

    Args:
        name: "adamw", "adafactor", "lion" or "sgd".
        learning_rate: the peak, above 0.
        total_steps: number of updates that the schedule spans.
        **settings: any other attribute of `OptimizerConfig`, which has the defaults: `warmup_steps`, `schedule`,
            `final_fraction`, `weight_decay`, `clip_norm`, `b1`, `b2`, `eps`.

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


def decayed(params: Params) -> PyTree:
    """Return True for the leaves that weight decay applies to: matrices, not norm scales or biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and not any(getattr(k, "key", None) in ("scale", "bias") for k in path),
        params,
    )
