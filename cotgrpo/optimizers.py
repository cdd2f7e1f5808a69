"""Optimizers as optax chains: a schedule, clipping by global norm, and weight decay on matrices only."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    final_fraction: float = 0.1,
) -> optax.Schedule:
    """The learning rate by step: linear from 0 over `warmup_steps`, then constant, or down to `final_fraction` of the peak at `total_steps`.

    Args:
        learning_rate: the peak, > 0.
        total_steps: > `warmup_steps`.
        warmup_steps: >= 0.
        schedule: "cosine", "linear" or "constant".
        final_fraction: in [0, 1].

    Raises:
        ValueError: an argument outside its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps), got {warmup_steps} with total_steps={total_steps}."
        )
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must lie in [0, 1], got {final_fraction}.")
    rest = total_steps - warmup_steps
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction),
        "linear": lambda: optax.linear_schedule(learning_rate, final_fraction * learning_rate, rest),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }[schedule]()
    if not warmup_steps:
        return after
    # The first step is already worth taking: the ramp starts at 1 / warmup_steps of the peak, not at 0.
    ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([ramp, after], [warmup_steps])


def make_optimizer(
    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw",
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    final_fraction: float = 0.1,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Clipping, then the named optimizer. Its state holds the learning rate in use, which the train step reports.

    Args:
        name: "adamw", "adafactor" (factored second moments, the least memory), "lion" or "sgd" (with momentum `b1`).
        learning_rate, total_steps, warmup_steps, schedule, final_fraction: see `make_schedule`.
        weight_decay: decoupled, >= 0; parameters with fewer than two dimensions a layer (norm scales, biases) are not decayed.
        clip_norm: gradients with a larger global norm are scaled down to it; None: never.
        b1, b2, eps: Adam's and Lion's moments.

    Raises:
        ValueError: an unknown name or an argument outside its range.
    """
    rate = make_schedule(
        learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        schedule=schedule,
        final_fraction=final_fraction,
    )
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm}.")

    def build(learning_rate: Any) -> optax.GradientTransformation:
        if name == "adamw":
            return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
        if name == "lion":
            return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
        if name == "adafactor":
            return optax.adafactor(
                learning_rate,
                multiply_by_parameter_scale=False,
                weight_decay_rate=weight_decay or None,
                weight_decay_mask=decayed,
            )
        return optax.chain(optax.add_decayed_weights(weight_decay, mask=decayed), optax.sgd(learning_rate, momentum=b1))

    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {OPTIMIZERS}, got {name!r}.")
    optimizer = optax.inject_hyperparams(build)(learning_rate=rate)
    return optimizer if clip_norm is None else optax.chain(clip_by_norm(clip_norm), optimizer)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Gradients times `min(1, most / norm)`, of the global norm.

    `optax.clip_by_global_norm` divides every element, which XLA does in a pass of its own over all gradients; a product is fused with what follows.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scale = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices, not norm scales or biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and not any(getattr(k, "key", None) in ("scale", "bias") for k in path),
        params,
    )
