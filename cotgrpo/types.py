"""The arrays that a train step takes and returns, and the student it trains.

Dimension legend, used in names (`logits_TV`) and in signatures (`Float[Array, "B T D"]`) everywhere:

    B sequences    T tokens of a sequence    N = B * T tokens of a batch    V vocabulary    D model width
    L layers       Q query heads             K key/value heads              H head width    G drawn tokens a context
    F MLP width    S columns of a key/value cache

Everything here is a pytree of arrays, except `Student`. It holds functions, and a step closes over it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
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
    """A weighted mean before its division: `total / weight`.

    Sums add across tokens, micro-batches, devices and hosts. The division happens once, when the number is read.

    Attributes:
        total: sum of weight times value, float32 scalar.
        weight: sum of weights (for most metrics: the number of supervised tokens), float32 scalar.
    """

    total: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.weight + other.weight)

    def mean(self) -> float:
        """Return `total / weight` as a Python float, `nan` if nothing was counted."""
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
    def create(cls, *, params: Params, tx: optax.GradientTransformation, key: Any, copy: bool = True) -> TrainState:
        """Return the state before the first step, in which every leaf has a buffer of its own.

        `jit_step` donates the state: its buffers are reused, and arrays that share them are deleted. So nothing of a
        state may be shared, neither with the caller nor within it, as by optimizers that keep the first parameters.

        Args:
            params: the student's parameters.
            tx: the optimizer of the step.
            key: a JAX random key, or an int seed for one.
            copy: copy `params`, so that the caller's arrays outlive the first step. False moves them into the state
                without the memory of a copy; do not use them again.
        """
        key = jax.random.key(key) if isinstance(key, int) else jnp.copy(key)
        params = jax.tree.map(jnp.copy, params) if copy else params
        state = cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), key=key)
        return own_buffers(state)


def own_buffers(tree: PyTree) -> PyTree:
    """Return the tree with a copy of every array that shares its buffers with an earlier leaf."""
    seen: set[object] = set()

    def own(leaf: Any) -> Any:
        buffers = buffers_of(leaf)
        leaf = jnp.copy(leaf) if buffers & seen else leaf
        seen.update(buffers)
        return leaf

    return jax.tree.map(own, tree)


def buffers_of(leaf: Any) -> set[object]:
    """Return the addresses of an array's buffers in this process. A traced array stands for itself."""
    if isinstance(leaf, jax.core.Tracer):
        return {id(leaf)}
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return set()
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards if shard.data.size}


class SftBatch(flax.struct.PyTreeNode):
    """Packed sequences for next-token training. `[B, T]` each; the targets are already shifted.

    Attributes:
        tokens: int32 in [0, V), the input ids.
        targets: int32 in [0, V), the id that should follow each input.
        positions: int32 >= 0, counted from the start of each document (they restart in a packed row).
        segment_ids: int32, 0 for padding, 1, 2, ... for the documents of a row. Attention stays inside a segment.
        loss_mask: float or bool, the weight of each target in the loss, 0 for targets that are not supervised.
        extra: further arrays `[B, T]` or `[B, T, K]` by name, which reach the objective by that name.
    """

    tokens: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    segment_ids: Int[AnyArray, "B T"]
    loss_mask: Real[AnyArray, "B T"] | Bool[AnyArray, "B T"]
    extra: dict[str, AnyArray] = flax.struct.field(default_factory=dict)


class GhostBatch(flax.struct.PyTreeNode):
    """Contexts with the ghost (ideal) token at each. `[B, T]` each, as in `SftBatch`.

    Attributes:
        tokens, positions, segment_ids, loss_mask: as in `SftBatch`.
        ghost_tokens: int32 in [0, V), y*: the id that a ghost reply puts after each context.
        drawn_tokens: int32 in [0, V), y: the id that the student drew there, `[B, T]`, or `[B, T, G]` for G of them.
            None: the step draws from the student's own distribution if the objective wants drawn tokens.
        extra: further arrays `[B, T]` or `[B, T, K]` by name, which reach the objective by that name. `GroupRelative`
            reads `drawn_log_probs` and `advantages`; `ForwardKl` reads `top_ids` and `top_log_probs`.
    """

    tokens: Int[AnyArray, "B T"]
    ghost_tokens: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    segment_ids: Int[AnyArray, "B T"]
    loss_mask: Real[AnyArray, "B T"] | Bool[AnyArray, "B T"]
    drawn_tokens: Int[AnyArray, "B T"] | Int[AnyArray, "B T G"] | None = None
    extra: dict[str, AnyArray] = flax.struct.field(default_factory=dict)

    @classmethod
    def teacher_forced(cls, batch: SftBatch) -> GhostBatch:
        """Return the batch whose contexts are the prompt and the ghost reply's own prefix.

        The ghost token y* is then the next token of the text.
        """
        return cls(
            tokens=batch.tokens,
            ghost_tokens=batch.targets,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            loss_mask=batch.loss_mask,
            extra=batch.extra,
        )


def check_arrays(batch: SftBatch | GhostBatch) -> None:
    """Raise ValueError if the shapes or dtypes of a batch do not fit each other.

    Reads shapes and dtypes only, so it costs nothing when a step is traced.
    """
    kind, tokens = type(batch).__name__, batch.tokens
    named = {name: array for name, array in vars(batch).items() if name != "extra"}
    if named.get("drawn_tokens") is None:
        named.pop("drawn_tokens", None)
    if not isinstance(batch.extra, Mapping):
        raise ValueError(f"{kind}.extra must be a dict of arrays by name, got {type(batch.extra).__name__}.")
    for name, array in {**named, **{f"extra[{name!r}]": array for name, array in batch.extra.items()}}.items():
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(f"{kind}.{name} must be an array, got {type(array).__name__}.")
    if len(tokens.shape) != 2:
        raise ValueError(f"{kind}.tokens must have the shape [B, T], got {tokens.shape}.")
    for name, array in named.items():
        draws = name == "drawn_tokens"
        if array.shape[:2] != tokens.shape or array.ndim > 2 + draws:
            expected = f"[B, T] or [B, T, G] with [B, T] = {tokens.shape}" if draws else f"of tokens, {tokens.shape}"
            raise ValueError(f"{kind}.{name} must have the shape {expected}, got {array.shape}.")
        if name != "loss_mask" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{kind}.{name} must hold integers, got {array.dtype}.")
    if jnp.issubdtype(batch.loss_mask.dtype, jnp.complexfloating):
        raise ValueError(f"{kind}.loss_mask must hold floats or bools, got {batch.loss_mask.dtype}.")
    for name, array in batch.extra.items():
        if array.shape[:2] != tokens.shape:
            raise ValueError(
                f"{kind}.extra[{name!r}] must have the shape [B, T] or [B, T, K] with [B, T] = {tokens.shape}, "
                f"got {array.shape}."
            )


Aux = tuple[Any, dict[str, Any]]
"""A model's auxiliary loss and its metrics: arrays `[]`, `[B]` or `[B, T]`, averaged over real tokens."""


@dataclasses.dataclass(frozen=True)
class Student:
    """The model as a step sees it: pure functions, closed over. Any framework's model fits.

    Call `rows` rather than `hidden`: it knows what this student's `hidden` takes and returns.

    Attributes:
        hidden: `hidden(params, tokens_BT, positions_BT, segment_ids_BT) -> Float[B T D]`, the rows that the head reads.
        head: `head(params) -> Float[D V]`, the language-model head; None if `hidden` returns logits (`V` for `D`).
        softcap: c > 0 makes every logit `c * tanh(logit / c)` (Gemma 2), or None.
        vocab_size: the number of real tokens if the head has padded columns, or None. Ids at and above it have
            probability zero in losses and are never drawn.
        takes_key: whether `hidden` also takes the argument `key`, for dropout: a random key in a train step, and None
            in evaluation, references and measurements.
        has_aux: whether `hidden` returns `(rows, (loss, metrics))`, with the auxiliary loss of the model (a router's)
            and a dict of its metrics. Each is a mean over the real tokens: a scalar, `[B]` one for each row, or
            `[B, T]`. Train steps minimize `loss + aux_loss`, so the model scales its loss itself.

    Raises:
        ValueError: a value out of range; `takes_key` and the signature of `hidden` do not fit each other.
    """

    hidden: Callable[..., Any]
    head: Callable[[Params], Any] | None
    softcap: float | None = None
    vocab_size: int | None = None
    takes_key: bool = False
    has_aux: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"Student.softcap must be a positive float or None, got {self.softcap!r}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"Student.vocab_size must be at least 1 or None, got {self.vocab_size!r}.")
        check_key_argument(self.hidden, self.takes_key)

    @classmethod
    def from_logits(
        cls,
        apply_fn: Callable[..., Any],
        *,
        vocab_size: int | None = None,
        takes_key: bool = False,
        has_aux: bool = False,
    ) -> Student:
        """Return a student from any model that returns logits.

        `apply_fn(params, tokens, positions, segment_ids) -> [B T V]`. There is no head to tile then, so the
        `[B, T, V]` logits and their gradient exist in full.
        """
        return cls(hidden=apply_fn, head=None, vocab_size=vocab_size, takes_key=takes_key, has_aux=has_aux)

    def rows(
        self,
        params: Params,
        tokens: Int[AnyArray, "B T"],
        positions: Int[AnyArray, "B T"],
        segment_ids: Int[AnyArray, "B T"],
    ) -> Float[Array, "..."]:
        """Return the rows `[B, T, D]` that the head reads, without dropout."""
        return self.rows_and_aux(params, tokens, positions, segment_ids)[0]

    def rows_and_aux(
        self,
        params: Params,
        tokens: Int[AnyArray, "B T"],
        positions: Int[AnyArray, "B T"],
        segment_ids: Int[AnyArray, "B T"],
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "..."], Aux | None]:
        """Return the rows `[B, T, D]`, and the auxiliary loss with its metrics, or None without `has_aux`.

        Args:
            params: the parameters.
            tokens, positions, segment_ids: as in `SftBatch`.
            key: for a student that takes one. None: no dropout.

        Raises:
            ValueError: `hidden` returns something else than `has_aux` says.
        """
        found = self.hidden(params, tokens, positions, segment_ids, **({"key": key} if self.takes_key else {}))
        if not self.has_aux:
            if not hasattr(found, "dtype"):
                raise ValueError(
                    f"Student.hidden must return the rows [B, T, D], got {describe(found)}. If it returns "
                    "(rows, (loss, metrics)) with an auxiliary loss, build Student(..., has_aux=True)."
                )
            return found, None
        is_pair = lambda x: isinstance(x, tuple | list) and len(x) == 2
        if not (is_pair(found) and is_pair(found[1]) and isinstance(found[1][1], Mapping)):
            raise ValueError(
                "Student(has_aux=True): hidden must return (rows, (loss, metrics)) with a dict of metrics, got "
                f"{describe(found)}. If the model has no auxiliary loss, leave has_aux out."
            )
        rows, (loss, metrics) = found
        for name, value in {"loss": loss, **metrics}.items():
            if jnp.shape(value) not in ((), tokens.shape[:1], tokens.shape):
                raise ValueError(
                    f"Student.hidden: the auxiliary {name} must be a scalar, or have the shape [B] or [B, T] with "
                    f"[B, T] = {tokens.shape}, got {jnp.shape(value)}."
                )
        return rows, (loss, dict(metrics))

    def without_extras(self) -> Student:
        """Return the student without dropout and auxiliary loss, as a reference and a sampler use it."""
        return dataclasses.replace(self, hidden=self.rows, takes_key=False, has_aux=False)

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Return the logits in float32, padded columns included, for tests and tools. Train steps never build them."""
        rows_BTD = self.rows(params, tokens, positions, segment_ids)
        return project(rows_BTD, None if self.head is None else self.head(params), self.softcap)


def check_key_argument(hidden: Callable[..., Any], takes_key: bool) -> None:
    """Raise ValueError if a student's function cannot take a key, or takes one that no step would pass.

    A `key` with a value of its own, as by `functools.partial`, needs none from the step.
    """
    try:
        arguments = inspect.signature(hidden).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return
    own = next((one for one in arguments if one.name == "key" and one.kind != one.POSITIONAL_ONLY), None)
    if takes_key and own is None and not any(one.kind == one.VAR_KEYWORD for one in arguments):
        raise ValueError(
            "Student(takes_key=True): hidden must take the argument key, as hidden(params, tokens, positions, "
            f"segment_ids, key), got hidden({', '.join(map(str, arguments))}). A step passes a random key, and "
            "evaluation None."
        )
    if not takes_key and own is not None and (own.default is own.empty or own.default is None):
        raise ValueError(
            "Student.hidden takes a key, but takes_key is False, so no step would pass one: build "
            "Student(..., takes_key=True), or bind the key with functools.partial."
        )


def describe(found: Any) -> str:
    """Return what a function returned in a few words, for messages."""
    if isinstance(found, tuple | list):
        return f"{type(found).__name__} of ({', '.join(describe(one) for one in found)})"
    shape = getattr(found, "shape", None)
    return type(found).__name__ if shape is None else f"an array of the shape {shape}"


def at_least_float32(*arrays: AnyArray | jax.ShapeDtypeStruct | None) -> jnp.dtype:
    """Return the type to compute in: float64 if an array is float64, else float32."""
    double = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def same_dtype(*arrays: Array) -> tuple[Array, ...]:
    """Return arrays in the type that holds them all. Arrays of one type stay as they are."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
    return tuple(x.astype(dtype) for x in arrays)


def project(
    rows_D: Float[Array, "*batch D"], head_DV: Float[Array, "D V"] | None, softcap: float | None = None
) -> Float[Array, "*batch V"]:
    """Return float32 logits of hidden rows: `rows @ head` accumulated in float32, then the soft-cap.

    Without a head the rows are the logits. If the rows or the head are float64, so are the logits.
    """
    dtype = at_least_float32(rows_D, head_DV)
    if head_DV is None:
        logits_V = rows_D.astype(dtype)
    else:
        logits_V = jnp.matmul(*same_dtype(rows_D, head_DV), preferred_element_type=dtype)
    return logits_V if softcap is None else softcap * jnp.tanh(logits_V / softcap)
