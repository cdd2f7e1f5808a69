"""Check that an objective of your own is what the train steps expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cotgrpo.objectives import Objective, TokenInputs, batch_fields, draw_logits, needs_reference, num_draws

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float

NUM_PADDED = 3
"""Impossible tokens behind the vocabulary, in the cases that have them."""


def check_objective(
    objective: Objective,
    *,
    vocab_size: int = 11,
    extra: Mapping[str, ArrayLike] | None = None,
    num_cases: int = 20,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Check an objective of one token as the train steps use it.

    The cases are random logits of many sharpnesses, with every relation of ghost, drawn token and greedy token, logits
    of 1e4, and padded tokens with a logit of -1e30 or minus infinity. In each:

    - the loss and the metrics are finite scalars, and so is the gradient, whose shape is `[V]`;
    - the gradient of a padded token is 0;
    - a `value_and_grad` of the objective's own returns the objective's loss and metrics, and the gradient of autodiff;
    - the distribution of the draws is finite and never draws a padded token.

    The numbers are computed in float64.

    Args:
        objective: a function of one token, see `cotgrpo.objectives.Objective`.
        vocab_size: V, at least 3.
        extra: arrays of one token by name, if the objective reads `inputs["name"]`.
        num_cases: random cases of each kind.
        tolerance: largest difference of two gradients, relative to the largest element or 1.
        seed: seed of the cases.

    Raises:
        AssertionError: the first check that fails, with the case.
        ValueError: `extra` lacks an array that `objective.batch_fields` names.

    Example:
        >>> import jax
        >>> check_objective(lambda logits_V, token: (-jax.nn.log_softmax(logits_V)[token.ghost], {}))
    """
    missing = [name for name in batch_fields(objective) or () if name not in (extra or {})]
    if missing:
        raise ValueError(f"The objective needs the extra array {missing[0]!r}: expected check_objective(extra=...).")
    with jax.enable_x64(True):
        own = getattr(objective, "value_and_grad", None)
        derive = jax.jit(jax.value_and_grad(lambda z_V, token: objective(z_V, token), has_aux=True))
        closed = None if own is None else jax.jit(lambda z_V, token: own(z_V, token))
        for kind, logits_V, padded, token in make_cases(objective, vocab_size, extra or {}, num_cases, seed):
            case = f"{kind}, logits {np.asarray(logits_V)}, ghost {token.ghost}, drawn {token.drawn}"
            check_draws(objective, logits_V, padded, case)
            (loss, metrics), grad_V = derive(logits_V, token)
            check_numbers(loss, metrics, grad_V, padded, f"{case}: autodiff")
            if closed is not None:
                (own_loss, own_metrics), own_grad_V = closed(logits_V, token)
                check_numbers(own_loss, own_metrics, own_grad_V, padded, f"{case}: value_and_grad")
                check_equal({"loss": loss, **metrics}, {"loss": own_loss, **own_metrics}, tolerance, case)
                check_equal({"the gradient": grad_V}, {"the gradient": own_grad_V}, tolerance, case)


def make_cases(
    objective: Objective, vocab_size: int, extra: Mapping[str, ArrayLike], count: int, seed: int
) -> list[tuple[str, Float[Array, "V"], int, TokenInputs]]:
    """Return `(name, logits_V, padded, inputs)` of every case. The last `padded` tokens are impossible."""
    rng = np.random.default_rng(seed)
    arrays = {name: jnp.asarray(value) for name, value in extra.items()}
    cases = []
    for number in range(count):
        plain_V = rng.normal(size=vocab_size) * rng.uniform(0.1, 5)
        large_V = np.where(rng.random(vocab_size) < 0.5, 1e4, 0.0) + plain_V
        reference_V = rng.normal(size=vocab_size)
        for name, logits_V, fill in (
            ("random", plain_V, None),
            ("large", large_V, None),
            ("padded by -1e30", plain_V, -1e30),
            ("padded by -inf", plain_V, -np.inf),
        ):
            end = [] if fill is None else [fill] * NUM_PADDED
            ghost = int(rng.integers(vocab_size))
            drawn = ghost if number % 4 == 0 else int(rng.integers(vocab_size))
            if name == "large":  # a ghost without probability has an infinite loss, and the step skips it
                ghost = int(np.argmax(logits_V))
            token = TokenInputs(
                ghost=jnp.int32(ghost),
                weight=jnp.asarray(1.0),
                drawn=jnp.int32(drawn) if num_draws(objective) else None,
                reference_logits=jnp.asarray([*reference_V, *end]) if needs_reference(objective) else None,
                extra=arrays,
            )
            cases.append((name, jnp.asarray([*logits_V, *end]), len(end), token))
    return cases


def check_draws(objective: Objective, logits_V: Float[Array, "V"], padded: int, case: str) -> None:
    """Check the distribution of the tokens that the objective draws."""
    if not num_draws(objective):
        return
    own_V = draw_logits(objective, logits_V)
    assert own_V.shape == logits_V.shape, f"{case}: draw_logits must return {logits_V.shape}, got {own_V.shape}."
    p_V = np.asarray(jax.nn.softmax(own_V))
    assert np.all(np.isfinite(p_V)), f"{case}: draw_logits is no distribution: {np.asarray(own_V)}."
    chance = float(p_V[len(p_V) - padded :].sum())
    assert chance == 0, f"{case}: draw_logits draws an impossible token with probability {chance:.2g}."


def check_numbers(loss: Any, metrics: Mapping[str, Any], grad_V: Float[Array, "V"], padded: int, case: str) -> None:
    """Check shapes, and that all numbers are finite."""
    for name, value in {"loss": loss, **metrics}.items():
        assert jnp.shape(value) == (), f"{case}: {name} must be a scalar, got the shape {jnp.shape(value)}."
        assert bool(jnp.isfinite(value)), f"{case}: {name} is {float(value)}."
    grad = np.asarray(grad_V)
    assert np.all(np.isfinite(grad)), f"{case}: the gradient is not finite: {grad}."
    pushed = np.abs(grad[len(grad) - padded :])
    assert not np.any(pushed), f"{case}: the gradient of an impossible token is not 0: {grad}."


def check_equal(expected: Mapping[str, Any], got: Mapping[str, Any], tolerance: float, case: str) -> None:
    """Check that the closed form returns what the objective and autodiff return."""
    assert expected.keys() == got.keys(), (
        f"{case}: value_and_grad must return the metrics {sorted(expected)}, got {sorted(got)}."
    )
    for name, value in expected.items():
        want, came = np.asarray(value), np.asarray(got[name])
        limit = tolerance * max(1.0, float(np.max(np.abs(want))))
        assert np.all(np.abs(want - came) <= limit), (
            f"{case}: {name} of value_and_grad must be that of autodiff, {want}, got {came}."
        )
