"""The arrays that a train step takes and returns, and the student it trains.

Dimension legend, used in names (`logits_TV`) and in signatures (`Float[Array, "B T D"]`) everywhere:

    B sequences    T tokens of a sequence    N = B * T tokens of a batch    V vocabulary    D model width
    L layers       Q query heads             K key/value heads              H head width    G drawn tokens a context
    F MLP width    S slots of a key/value cache

Everything here is a pytree of arrays, except `Student`, which holds functions and is closed over by a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real
    from jaxtyping import PyTree as PyTree

    # Batches come from the host as NumPy arrays, and are JAX arrays inside a step.
    AnyArray = Array | np.ndarray


Params = Any
"""A nested dict of arrays, as `flax.linen.Module.init` makes it."""


class Metric(flax.struct.PyTreeNode):
    """A weighted mean that is not divided yet: `total / weight`.

    Sums add across tokens, micro-batches, devices and hosts; the division happens once, when a person reads the number.

    Attributes:
        total: sum of weight times value, float32 scalar.
        weight: sum of weights (for most metrics: the number of supervised tokens), float32 scalar.
    """

    total: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.weight + other.weight)

    def mean(self) -> float:
        """`total / weight` as a Python float; `nan` where nothing was counted."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


Metrics = dict[str, Metric]


class TrainState(flax.struct.PyTreeNode):
    """All that changes during training. Arrays only, so it can be donated, sharded and checkpointed as it is.

    Attributes:
        step: int32 scalar, the number of calls of the train step so far (skipped updates count).
        params: the student's parameters, a pytree of arrays.
        opt_state: what `tx.init(params)` returned.
        key: the run's random key. It never changes: a step uses `fold_in(key, step)`, so a resumed run is the same run.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: PRNGKeyArray

    @classmethod
    def create(cls, *, params: Params, tx: optax.GradientTransformation, key: Any) -> TrainState:
        """The state before the first step. `key` is a JAX random key, or an int seed for one."""
        key = jax.random.key(key) if isinstance(key, int) else key
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), key=key)


class SftBatch(flax.struct.PyTreeNode):
    """Packed sequences for next-token training. `[B, T]` each; the targets are already shifted.

    Attributes:
        tokens: int32 in [0, V), the input ids.
        targets: int32 in [0, V), the id that should follow each input.
        positions: int32 >= 0, counted from the start of each document (they restart in a packed row).
        segment_ids: int32, 0 for padding, 1, 2, ... for the documents of a row. Attention stays inside a segment.
        loss_mask: float or bool, the weight of each target in the loss, 0 where nothing is supervised.
    """

    tokens: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    segment_ids: Int[AnyArray, "B T"]
    loss_mask: Real[AnyArray, "B T"] | Bool[AnyArray, "B T"]


class GhostBatch(flax.struct.PyTreeNode):
    """Contexts with the ghost (ideal) token at each. Fields as in `SftBatch`, `[B, T]` each, and

    Attributes:
        ghost_tokens: int32 in [0, V), y*: the id a ghost reply puts after each context.
        drawn_tokens: int32 in [0, V), y: the id the student drew there (`[B, T]`, or `[B, T, G]` for G of them), or None:
            then the step draws from the student's own distribution when the objective wants drawn tokens.
        drawn_log_probs: float32, log p(y) when y was drawn, and
        advantages: float32, how much better than others the reply is that y belongs to: both for `GroupRelative` alone, and None elsewhere.
        top_ids: int32 `[B, T, K]` in [0, V), the likeliest tokens of the live ghost's distribution, and
        top_log_probs: float32 `[B, T, K]`, their log-probabilities in it: both for `ForwardKl` alone, and None elsewhere.
    """

    tokens: Int[AnyArray, "B T"]
    ghost_tokens: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    segment_ids: Int[AnyArray, "B T"]
    loss_mask: Real[AnyArray, "B T"] | Bool[AnyArray, "B T"]
    drawn_tokens: Int[AnyArray, "B T"] | Int[AnyArray, "B T G"] | None = None
    drawn_log_probs: Float[AnyArray, "B T"] | None = None
    advantages: Float[AnyArray, "B T"] | None = None
    top_ids: Int[AnyArray, "B T K"] | None = None
    top_log_probs: Float[AnyArray, "B T K"] | None = None

    @classmethod
    def teacher_forced(cls, batch: SftBatch) -> GhostBatch:
        """The batch whose contexts are the prompt and the ghost reply's own prefix, so y* is the next token of the text."""
        return cls(
            tokens=batch.tokens,
            ghost_tokens=batch.targets,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            loss_mask=batch.loss_mask,
        )


@dataclasses.dataclass(frozen=True)
class Student:
    """The model as a step sees it: pure functions, closed over. Any framework's model fits.

    Attributes:
        hidden: `hidden(params, tokens_BT, positions_BT, segment_ids_BT) -> Float[B T D]`, the rows that the head reads.
        head: `head(params) -> Float[D V]`, the language-model head; None when `hidden` already returns logits (`V` for `D`).
        softcap: c > 0 makes every logit `c * tanh(logit / c)` (Gemma 2), or None.
        vocab_size: the number of real tokens where the head has padded columns, or None. Ids at and above it have
            probability zero in losses and are never drawn.
    """

    hidden: Callable[..., Any]
    head: Callable[[Params], Any] | None
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"Student.softcap must be a positive float or None, got {self.softcap!r}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"Student.vocab_size must be at least 1 or None, got {self.vocab_size!r}.")

    @classmethod
    def from_logits(cls, apply_fn: Callable[..., Any], *, vocab_size: int | None = None) -> Student:
        """A student from any model that returns logits: `apply_fn(params, tokens, positions, segment_ids) -> [B T V]`.

        The engine then has no head to tile, so the `[B, T, V]` logits and their gradient exist in full.
        """
        return cls(hidden=apply_fn, head=None, vocab_size=vocab_size)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """The model's logits in float32, padded columns included, for tests and tools; train steps never build them."""
        rows_BTD = self.hidden(params, tokens, positions, segment_ids)
        return project(rows_BTD, None if self.head is None else self.head(params), self.softcap)


def project(
    rows_D: Float[Array, "*batch D"], head_DV: Float[Array, "D V"] | None, softcap: float | None = None
) -> Float[Array, "*batch V"]:
    """Hidden rows to float32 logits: `rows @ head` accumulated in float32, then the soft-cap. No head: rows are logits."""
    if head_DV is None:
        logits_V = rows_D.astype(jnp.float32)
    else:
        logits_V = jnp.matmul(rows_D, head_DV, preferred_element_type=jnp.float32)
    return logits_V if softcap is None else softcap * jnp.tanh(logits_V / softcap)
