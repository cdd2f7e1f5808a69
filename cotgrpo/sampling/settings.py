"""How tokens are drawn: greedy, temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cotgrpo.objectives import MASKED_LOGIT

if TYPE_CHECKING:
    from jaxtyping import Array, Float

COLDEST = 1e-30
"""Lower temperatures count as this one, which already draws the likeliest tokens only: float32 has no 1e-50."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How replies are drawn. Filters apply in this order: temperature, top-k, top-p.

    Attributes:
        max_new_tokens: longest reply, >= 1.
        eos_ids: tokens that end a reply. If empty, every reply has `max_new_tokens` tokens.
        temperature: >= 0. 0 is greedy: the likeliest token, the lowest id among equals.
        top_k: draw from the k likeliest tokens and those equal to the k-th. None: no limit.
        top_p: in (0, 1]. Draw from the smallest set of likeliest tokens with at least this probability
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        pad_id: fills a row after the end of its reply.

    Raises:
        ValueError: a setting is out of range.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingSettings.max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"SamplingSettings.temperature must be at least 0, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"SamplingSettings.top_k must be at least 1 or None, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingSettings.top_p must lie in (0, 1], got {self.top_p}.")


def filter_logits(logits_V: Float[Array, "V"], settings: SamplingSettings) -> Float[Array, "V"]:
    """Return the logits of the distribution that tokens are drawn from.

    Logits are counted from the largest one and divided by the temperature, which must be positive. Tokens outside top-k
    and top-p are masked.
    """
    real_V = logits_V > MASKED_LOGIT
    # The largest is 0 at any temperature: a quotient of logits overflows at small ones.
    cooled_V = (logits_V - jnp.max(logits_V)) / max(settings.temperature, COLDEST)
    logits_V = jnp.where(real_V, jnp.maximum(cooled_V, MASKED_LOGIT), MASKED_LOGIT)
    vocab = logits_V.shape[0]
    if settings.top_k is not None and settings.top_k < vocab:
        least = jax.lax.top_k(logits_V, settings.top_k)[0][-1]
        logits_V = jnp.where(logits_V >= least, logits_V, MASKED_LOGIT)
    if settings.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        p_V = jax.nn.softmax(sorted_V)
        # A token stays while the tokens before it hold less than top_p. The likeliest token always stays.
        stays_V = jnp.cumsum(p_V) - p_V < settings.top_p
        least = jnp.min(jnp.where(stays_V, sorted_V, jnp.inf))
        logits_V = jnp.where(logits_V >= least, logits_V, MASKED_LOGIT)
    return logits_V
