"""Pure train steps: `step(state, batch) -> (state, metrics)`.

GRPO here is GhostRespond Policy Optimization, not Group Relative. Model, optimizer and objective are closed over.
Everything that changes is in `TrainState`, a pytree of arrays. There are no globals, no host callbacks and no mesh in
here: `jit_step` adds jit, donation and shardings from outside. A step's randomness is `fold_in(state.key, state.step)`.

Losses are sums with weights. Gradients are summed over micro-batches and divided once, by the weight of the whole
batch. So accumulation and any sharding give the same update as one big batch.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jax.experimental import checkify
from jax.extend.core import ClosedJaxpr, Jaxpr

from cotgrpo import objectives
from cotgrpo.objectives import Nll, Objective, Pair, TokenInputs
from cotgrpo.optimizers import accept_extra_args, gradient_params
from cotgrpo.sequence_loss import SequenceLoss, count_replies, sequence_sums
from cotgrpo.tiled_loss import HeadSpec, Reference, tiled_loss
from cotgrpo.types import (
    Aux,
    GhostBatch,
    Metric,
    Metrics,
    Params,
    SftBatch,
    Student,
    TrainState,
    at_least_float32,
    check_arrays,
)

if TYPE_CHECKING:
    from typing import Any

    from jaxtyping import Shaped

    from cotgrpo.types import AnyArray, Array, Bool, Float, Int, PRNGKeyArray, PyTree

    Sums = Mapping[str, Float[Array, ""] | Metric]
    """Metrics by name: sums with the weight of the loss, or a total with a weight of its own."""

Step = Callable[..., tuple[TrainState, Metrics]]
"""`step(state, batch) -> (state, metrics)`, or `step(state, batch, reference_params)` when built with a reference."""

COSTLY_UPDATE = frozenset(
    {"dot_general", "ragged_dot_general", "conv_general_dilated", "while", "scan"}
    | {"cholesky", "eig", "eigh", "lu", "qr", "svd", "triangular_solve"}
)
"""JAX's primitives that make an optimizer's update costly."""


def make_sft_step(
    student: Student,
    tx: optax.GradientTransformation,
    objective: Objective = Nll(),
    *,
    micro_batches: int = 1,
    tile_size: int | None = None,
    sequence_loss: SequenceLoss | None = None,
    debug: bool = False,
) -> Step:
    """Build the supervised step: the next-token loss `-log p(target)`, averaged over the supervised tokens.

    It is `make_grpo_step` with the objective `Nll`, and takes the same arguments.
    """
    return make_grpo_step(
        student,
        tx,
        objective,
        micro_batches=micro_batches,
        tile_size=tile_size,
        sequence_loss=sequence_loss,
        debug=debug,
    )


def make_grpo_step(
    student: Student,
    tx: optax.GradientTransformation,
    objective: Objective = Pair(),
    *,
    reference: Student | None = None,
    micro_batches: int = 1,
    tile_size: int | None = None,
    reward_gain: bool = False,
    sequence_loss: SequenceLoss | None = None,
    debug: bool = False,
) -> Step:
    """Build the GhostRespond step: the token-level objective at every supervised context of a `GhostBatch`.

        loss = sum_t w_t objective(logits_t, (y*_t, y_t)) / sum_t w_t

    An `SftBatch` is read as the teacher-forced `GhostBatch` of the same text. If the loss, the gradient, or any new
    parameter or optimizer state is not finite, `params` and `opt_state` stay as they were. The step counts in the
    metric `skipped`, and adds nothing to the other means. A batch with no supervised token is such a step, 0 / 0.

    A student that `takes_key` gets its own random key in each step and micro-batch, from `fold_in(state.key, step)` and
    apart from the draws'. All calls of `value_fn` in a step get the same keys. A student that `has_aux` is trained on
    `loss + aux_loss`: the auxiliary loss is averaged over all real tokens of the batch, supervised or not.

    Args:
        student: the model's pure functions.
        tx: an optax transformation. It gets `value`, `grad` and `value_fn`, the batch's mean loss as a function of the
            parameters, if it takes them (L-BFGS, Polyak's step size, reduce-on-plateau). The metric `learning_rate`
            appears if its state holds exactly one, as that of `cotgrpo.optimizers.make_optimizer` does.
        objective: a function of one token, see `cotgrpo.objectives.Objective`.
        reference: a frozen model for objectives with `needs_reference`. The step then takes its parameters as a third
            argument, so that they are neither baked into the program nor part of the state.
        micro_batches: the batch is taken in this many equal parts, gradients summed; must divide B.
        tile_size: tokens a tile of the loss; None chooses.
        reward_gain: adds the metric `reward_gain`, what the update did to the reward on this batch
            (`cotgrpo.objectives.RewardGain`). It takes two more forward passes, without dropout.
        sequence_loss: a function of the losses of a whole reply (`cotgrpo.sequence_loss.SequenceInputs`). The loss is
            then its mean over replies. The metrics of the objective stay means over tokens, with its own loss as
            `token_loss`. It gets all extra arrays of the batch.
        debug: ids outside [0, V) are errors. The step is then for `jax.experimental.checkify.checkify`.

    Returns:
        `step(state, batch[, reference_params]) -> (state, metrics)`, not jitted. Metrics: `loss`, what the objective
        reports, `grad_norm`, `learning_rate`, `skipped` (0 or 1), `tokens` (real ones), `padded_tokens`, and
        `invalid_tokens`, supervised ones whose ghost or drawn id is not in [0, V): they do not train.

    Raises:
        ValueError: an objective that needs a reference without one, or the reverse; `micro_batches` or `tile_size`
            below 1. When the step is traced: a batch whose arrays do not fit each other, lack an extra array that the
            objective needs, or have another number of drawn tokens; no `reference_params` for a reference; a metric of
            the objective, the sequence loss or the model by the name of one of the step's or of another of these.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}.")
    batch_loss = make_batch_loss(student, objective, reference, tile_size, sequence_loss)
    gradient = jax.value_and_grad(batch_loss, has_aux=True)
    tx = accept_extra_args(tx)
    plain = student.without_extras()
    gain_loss = make_batch_loss(plain, objectives.RewardGain(), plain, tile_size)

    def step(
        state: TrainState, batch: SftBatch | GhostBatch, reference_params: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        if reference is not None and reference_params is None:
            raise ValueError("The step was built with a reference: expected step(state, batch, reference_params).")
        ghosts, invalid = leave_out_invalid(as_ghosts(batch), objective, student, state.params, debug=debug)
        key = jax.random.fold_in(state.key, state.step)
        parts = (ghosts, uniforms_for(objective, ghosts, key), model_keys(student, key, micro_batches))
        scale = aux_scale(student, ghosts, sequence_loss)
        of_part = lambda function, params: lambda part: function(params, *part[:2], reference_params, part[2], scale)
        at = gradient_params(state.params, state.opt_state)
        (loss, (sums, weight)), grads = accumulate(of_part(gradient, at), parts, micro_batches)
        # XLA fuses a product with what follows. A quotient would be a pass of its own over all gradients.
        share = 1.0 / weight
        grads = jax.tree.map(lambda g, p: (g.astype(share.dtype) * share).astype(p.dtype), grads, state.params)
        grad_norm = optax.tree.norm(grads)

        def mean_loss(params: Params) -> Float[Array, ""]:
            total, (_, weight) = accumulate(of_part(batch_loss, params), parts, micro_batches)
            return total / weight

        def advance(opt_state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
            given = {"value": loss / weight, "grad": grads, "value_fn": mean_loss}  # what is not used is not computed
            with jax.numpy_dtype_promotion("standard"):  # optax is not written for the strict one
                updates, opt_state = tx.update(grads, opt_state, params, **given)
                return optax.apply_updates(params, updates), opt_state

        params, opt_state = advance(state.opt_state, state.params)
        finite = jnp.isfinite(loss / weight) & jnp.isfinite(grad_norm) & stays_finite(advance, state)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        new_state = state.replace(
            step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state)
        )
        one = finite.astype(jnp.float32)
        counted = lambda metric: jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metric)
        metrics = {name: counted(metric) for name, metric in named_metrics(loss, sums, weight).items()}
        metrics["grad_norm"] = counted(Metric(grad_norm, one))
        metrics |= rate_metric(opt_state)
        metrics["skipped"] = Metric(1.0 - one, jnp.ones(()))
        metrics["invalid_tokens"] = Metric(invalid, jnp.ones(()))
        if reward_gain:
            check_names(repr(objective), sums.keys() - {"loss"}, ("reward_gain",))
            _, (gains, gain_weight) = accumulate(
                lambda part: gain_loss(new_state.params, part, None, state.params),
                ghosts.replace(extra={}),  # the rows of another reference are not the student's
                micro_batches,
            )
            metrics["reward_gain"] = counted(Metric(gains["reward_gain"], gain_weight))
        return new_state, metrics | token_counts(ghosts)

    return step


def make_eval_step(
    student: Student,
    objective: Objective = Nll(),
    *,
    tile_size: int | None = None,
    sequence_loss: SequenceLoss | None = None,
) -> Callable[[Params, SftBatch | GhostBatch], Metrics]:
    """Build `eval_step(params, batch) -> metrics`: the objective and its metrics on held-out text, without gradient.

    The head runs on supervised tokens only. The metrics of several batches add up (`Metric.__add__`) to the mean over
    all their tokens, however they were packed. A student that `takes_key` gets None, so there is no dropout.

    Raises:
        ValueError: an objective that draws tokens or needs a reference. Evaluation is deterministic.
    """
    if objectives.num_draws(objective):
        fix = "use its exact form"
        if not hasattr(objective, "num_draws"):
            fix = "a plain function gets one draw at each context; if yours reads none, set its attribute num_draws = 0"
        raise ValueError(f"make_eval_step needs an objective that draws no tokens, got {objective!r}; {fix}.")
    batch_loss = make_batch_loss(student, objective, None, tile_size, sequence_loss)

    def eval_step(params: Params, batch: SftBatch | GhostBatch) -> Metrics:
        ghosts, invalid = leave_out_invalid(as_ghosts(batch), objective, student, params)
        loss, (sums, weight) = batch_loss(params, ghosts, None, None)
        metrics = named_metrics(loss, sums, weight)
        return metrics | {"invalid_tokens": Metric(invalid, jnp.ones(()))} | token_counts(ghosts)

    return eval_step


def make_batch_loss(
    student: Student,
    objective: Objective,
    reference: Student | None,
    tile_size: int | None,
    sequence_loss: SequenceLoss | None = None,
) -> Callable[..., tuple[Float[Array, ""], tuple[Sums, Float[Array, ""]]]]:
    """Return `batch_loss(params, ghosts, uniform, reference_params, keys=None, scale=None)`.

    Its result is `(loss_sum, (metric_sums, weight_sum))`. With `keys`, an array of one key, the student may use
    dropout. With a `scale` the auxiliary loss of the student is added to the sum, so much for each real token.
    """
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1 or None, got {tile_size}.")
    if sequence_loss is not None and not callable(sequence_loss):
        raise ValueError(f"sequence_loss must be a function of one reply or None, got {sequence_loss!r}.")
    check_reference(objective, reference)

    def batch_loss(
        params: Params,
        ghosts: GhostBatch,
        uniform: Float[Array, "B T G"] | Float[Array, "B T G 2"] | None,
        reference_params: Params | None,
        keys: Shaped[Array, "..."] | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], tuple[Sums, Float[Array, ""]]]:
        contexts = (ghosts.tokens, ghosts.positions, ghosts.segment_ids)
        known = ghosts.extra.get("reference_rows")
        frozen = None if reference is None else read_reference(reference, reference_params, contexts, known)
        inputs = token_inputs(objective, ghosts)
        rows, aux = student.rows_and_aux(params, *contexts, key=None if keys is None else keys[0])
        arrays = (rows, None if student.head is None else student.head(params), inputs)
        options: dict[str, Any] = {
            "uniform": uniform, "reference": frozen, "spec": HeadSpec.of(student), "tile_size": tile_size,
        }  # fmt: skip
        weight = jnp.sum(inputs.weight.astype(at_least_float32(*arrays[:2])))  # of the type of the loss
        sums: Sums
        try:
            if sequence_loss is None:
                loss, sums = tiled_loss(objective, *arrays, **options)
                check_names(repr(objective), sums)
            else:
                extra = {k: jnp.asarray(array) for k, array in ghosts.extra.items() if k != "reference_rows"}
                found = sequence_sums(sequence_loss, objective, *arrays, contexts[-1], extra=extra, **options)
                check_names(repr(objective), found.token_metrics, ("token_loss",))
                check_names("sequence_loss", found.metrics, ("token_loss", *found.token_metrics))
                tokens = {"token_loss": found.token_loss, **found.token_metrics}
                sums = {**found.metrics, **{name: Metric(total, weight) for name, total in tokens.items()}}
                loss, weight = found.loss, found.replies
        except TypeError as error:
            raise explain_missing_reference(objective, reference, error) from error
        if aux is None:
            return loss, (sums, weight)
        check_names("The student", aux[1], ("aux_loss", *sums))
        check_names(repr(objective), sums, ("aux_loss",))
        means = aux_means(aux, ghosts.segment_ids)
        added = means["aux_loss"].total.astype(loss.dtype)
        total = loss if scale is None else loss + scale.astype(loss.dtype) * added
        return total, ({**sums, **means, "loss": Metric(loss, weight)}, weight)

    return batch_loss


def check_reference(objective: Objective, reference: Student | None) -> None:
    """Raise ValueError if the objective needs a reference that is not there, or the reverse."""
    needs = objectives.needs_reference(objective)
    plain = not any(hasattr(objective, name) for name in ("num_draws", "batch_fields", "needs_reference"))
    if needs != (reference is not None) and not (plain and reference is not None):  # it may read what it is given
        wants = "needs" if reference is None else "does not use"
        raise ValueError(
            f"The objective {objective!r} {wants} a frozen reference model. Objectives with needs_reference, such as "
            "ReferenceKl, and make_*_step(..., reference=Student) belong together."
        )


def read_reference(
    reference: Student,
    params: Params | None,
    contexts: tuple[Int[AnyArray, "B T"], Int[AnyArray, "B T"], Int[AnyArray, "B T"]],
    known: Float[AnyArray, "B T D"] | None = None,
) -> Reference:
    """Return what the reference knows about these contexts, without a gradient and without dropout.

    `known` are the rows that its head reads, from `live_ghosts(..., rows=True)`. Then the reference does not run.
    """
    fixed = jax.lax.stop_gradient(params)
    head = None if reference.head is None else reference.head(fixed)
    if known is None:
        rows = reference.rows(fixed, *contexts)
    else:
        rows = jnp.asarray(known, None if head is None else head.dtype)
    return Reference(rows, head, HeadSpec.of(reference))


def aux_means(aux: Aux, segment_ids: Int[AnyArray, "B T"]) -> Metrics:
    """Return the auxiliary loss of a model as `aux_loss`, and its metrics, as means over real tokens."""
    real_BT = segment_ids != 0
    count = jnp.sum(real_BT).astype(jnp.float32)

    def total(values: Array) -> Array:
        values = jnp.asarray(values)
        values = values.astype(at_least_float32(values))
        if not values.ndim:
            return jnp.where(count > 0, count.astype(values.dtype) * values, 0.0)
        values = values[:, None] if values.ndim == 1 else values
        return jnp.sum(jnp.where(real_BT, values, 0.0))

    loss, metrics = aux
    return {name: Metric(total(value), count) for name, value in {"aux_loss": loss, **metrics}.items()}


def aux_scale(student: Student, ghosts: GhostBatch, sequence_loss: SequenceLoss | None) -> Float[Array, ""] | None:
    """Return by how much the auxiliary loss of a real token counts in a sum that is divided by the loss's weight.

    It is known before the gradient of the first micro-batch, so that all of them can be added up.
    """
    if not student.has_aux:
        return None
    weight = jnp.asarray(ghosts.loss_mask, jnp.float32)
    whole = jnp.sum(weight) if sequence_loss is None else count_replies(ghosts.segment_ids, weight)
    return whole / jnp.sum(ghosts.segment_ids != 0).astype(jnp.float32)


MODEL_KEY = zlib.crc32(b"the student's own key")
"""Separates the student's random numbers from the draws of a step."""


def model_keys(student: Student, key: PRNGKeyArray, micro_batches: int) -> Shaped[Array, "..."] | None:
    """Return the student's key in each micro-batch of the step with this key, or None if it takes none."""
    return jax.random.split(jax.random.fold_in(key, MODEL_KEY), micro_batches) if student.takes_key else None


def named_metrics(loss: Float[Array, ""], sums: Sums, weight: Float[Array, ""]) -> Metrics:
    """Return the metrics of `batch_loss`. Sums that are no metrics yet have the weight of the loss."""
    return {
        name: found if isinstance(found, Metric) else Metric(found, weight)
        for name, found in {"loss": loss, **sums}.items()
    }


def as_ghosts(batch: SftBatch | GhostBatch) -> GhostBatch:
    """Return the batch as contexts and ghosts. Raise ValueError if its arrays do not fit each other."""
    check_arrays(batch)
    return GhostBatch.teacher_forced(batch) if isinstance(batch, SftBatch) else batch


def token_inputs(objective: Objective, ghosts: GhostBatch) -> TokenInputs:
    """Return what the objective reads of a batch, besides logits.

    Raises:
        ValueError: an extra array that the objective needs and the batch does not carry.
    """
    names = objectives.batch_fields(objective)
    names = tuple(ghosts.extra) if names is None else names
    missing = [name for name in names if name not in ghosts.extra]
    if missing:
        raise ValueError(
            f"{objective!r} needs the extra array {missing[0]!r}: expected {type(ghosts).__name__}(extra=...) with "
            f"{', '.join(names)}, got {', '.join(ghosts.extra) or 'no extra arrays'}."
        )
    drawn = ghosts.drawn_tokens if objectives.num_draws(objective) else None
    return TokenInputs(
        ghost=jnp.asarray(ghosts.ghost_tokens),
        weight=jnp.asarray(ghosts.loss_mask).astype(at_least_float32(ghosts.loss_mask)),
        drawn=None if drawn is None else jnp.reshape(drawn, (*ghosts.tokens.shape, -1)),
        extra={name: jnp.asarray(ghosts.extra[name]) for name in names},
    )


RESERVED = ("loss", "learning_rate", "grad_norm", "skipped", "tokens", "padded_tokens", "invalid_tokens")
"""Metrics of the step itself, which an objective must not report."""
STEP_METRICS = ("aux_loss", "token_loss", "reward_gain")
"""Metrics of a step that has what they measure."""


def check_names(owner: str, names: Collection[str], others: Sequence[str] = ()) -> None:
    """Raise ValueError if an objective or a model reports a metric by a name that is taken.

    Args:
        owner: who reports them, for the message.
        names: those of the metrics.
        others: names that are taken besides those of every step.
    """
    for name in (*RESERVED, *others):
        if name in names:
            own = (
                "which is the step's own" if name in (*RESERVED, *STEP_METRICS) else "as another part of the loss does"
            )
            raise ValueError(
                f"{owner} reports a metric {name!r}, {own}: give it another name (reserved are "
                f"{', '.join((*RESERVED, *others))})."
            )


def explain_missing_reference(objective: Objective, reference: Student | None, error: TypeError) -> Exception:
    """Return a ValueError if an objective failed because it reads a reference that it has not got, else the error."""
    if reference is not None or "NoneType" not in str(error):
        return error
    return ValueError(
        f"{objective!r} failed on an input that is None ({error}). If it reads inputs.reference_logits, build the step "
        "with reference=Student."
    )


def leave_out_invalid(
    ghosts: GhostBatch, objective: Objective, student: Student, params: Params, *, debug: bool = False
) -> tuple[GhostBatch, Float[Array, ""]]:
    """Give weight 0 to tokens whose ghost or drawn id is not in [0, V). Return the batch and how many they are.

    Raises:
        ValueError: another number of drawn tokens than the objective has.
    """
    draws, drawn = objectives.num_draws(objective), ghosts.drawn_tokens
    as_ids = lambda ids: ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # V is no int8
    ids = [as_ids(ghosts.ghost_tokens)[..., None]]
    if draws and drawn is not None:
        given, drawn = drawn.shape, as_ids(drawn).reshape(*ghosts.tokens.shape, -1)
        if drawn.shape[-1] != draws:
            raise ValueError(
                f"{objective!r} takes {draws} drawn tokens at each context: expected drawn_tokens of the shape "
                f"{(*ghosts.tokens.shape, draws)}, got {given}."
            )
        ids.append(drawn)
    size = vocabulary_size(student, params, ghosts)
    valid = functools.reduce(jnp.logical_and, [jnp.all((i >= 0) & (i < size), axis=-1) for i in ids])
    weighted = jnp.asarray(ghosts.loss_mask).astype(bool)
    count = jnp.sum(weighted & ~valid).astype(jnp.float32)
    if debug:
        checkify.check(
            count == 0, "{count} supervised tokens have a ghost or drawn id outside [0, " + str(size) + ")", count=count
        )
    return ghosts.replace(loss_mask=jnp.where(valid, ghosts.loss_mask, jnp.zeros_like(ghosts.loss_mask))), count


def vocabulary_size(student: Student, params: Params, ghosts: GhostBatch) -> int:
    """Return V, from the student or the shape of its logits. Nothing is computed."""
    if student.vocab_size is not None:
        return student.vocab_size
    if student.head is not None:
        return jax.eval_shape(student.head, params).shape[-1]
    contexts = (ghosts.tokens, ghosts.positions, ghosts.segment_ids)
    return jax.eval_shape(student.rows, params, *contexts).shape[-1]


def uniforms_for(objective: Objective, ghosts: GhostBatch, key: PRNGKeyArray) -> Float[Array, "B T G 2"] | None:
    """Return `[B, T, G]` pairs of `objectives.draw_uniform` for the tokens that the step has to draw, or None.

    They are drawn for the whole batch at once, so that neither tiles nor micro-batches change what is drawn.
    """
    draws = objectives.num_draws(objective)
    if not draws or ghosts.drawn_tokens is not None:
        return None
    return objectives.draw_uniform(key, (*ghosts.tokens.shape, draws))


def accumulate(gradient: Callable[[PyTree], PyTree], batch: PyTree, micro_batches: int) -> PyTree:
    """Return the sum of `gradient(part)` over `micro_batches` equal parts of `batch`, one part in memory at a time."""
    if micro_batches == 1:
        return gradient(batch)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % micro_batches:
            raise ValueError(f"micro_batches={micro_batches} must divide the batch, which has {x.shape[0]} sequences.")
        # Part i takes rows i, i + M, ...: each part is then spread over the devices as the batch is.
        return x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, at_least_float32(x)), shapes)
    add = lambda sums, x: sums + x.astype(sums.dtype)
    return jax.lax.scan(lambda sums, part: (jax.tree.map(add, sums, gradient(part)), None), zeros, parts)[0]


def stays_finite(
    advance: Callable[[optax.OptState, Params], tuple[Params, optax.OptState]], state: TrainState
) -> Bool[Array, ""]:
    """Return whether `advance(opt_state, params) -> (params, opt_state)` gives finite numbers only.

    No array may be overwritten before this is known, so XLA would hold a second copy of the whole state. Behind a
    barrier it computes the update twice instead, once for this result: that reads the state once more and takes no
    memory. An update with matrix products or loops (Muon, L-BFGS) costs more than its copy, and is computed once.
    """
    old = (state.opt_state, state.params)
    costly = not COSTLY_UPDATE.isdisjoint(primitives(jax.make_jaxpr(advance)(*old).jaxpr))
    params, opt_state = advance(*(old if costly else jax.lax.optimization_barrier(old)))
    return all_finite(params, opt_state, state.opt_state)


def primitives(jaxpr: Jaxpr) -> set[str]:
    """Return the names of all primitives of a program, also of those that it calls."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    is_program = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    for equation in jaxpr.eqns:
        for inner in filter(is_program, jax.tree.leaves(equation.params, is_leaf=is_program)):
            found |= primitives(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return found


def all_finite(params: Params, opt_state: optax.OptState, before: optax.OptState) -> Bool[Array, ""]:
    """Return whether all parameters and all arrays of the optimizer state are finite.

    A scalar of the state may be infinite if it was so `before`: optimizers start with "no best loss yet" that way. The
    moments of a parameter are compared together with it, since one pass then computes and reads them all.
    """
    together = {path: jnp.isfinite(leaf) for path, leaf in float_leaves(params)}
    alone = []
    for (path, leaf), (_, old) in zip(float_leaves(opt_state), float_leaves(before), strict=True):
        finite = jnp.isfinite(leaf)
        own = next((path[start:] for start in range(len(path) + 1) if path[start:] in together), None)
        if leaf.ndim == 0:
            alone.append(finite | ~jnp.isfinite(old))
        elif own is not None and together[own].shape == leaf.shape:
            together[own] &= finite
        else:
            alone.append(finite)
    return functools.reduce(
        jnp.logical_and, [jnp.all(finite) for finite in (*together.values(), *alone)], jnp.bool_(True)
    )


def float_leaves(tree: PyTree) -> list[tuple[Any, Array]]:
    """Return the paths and arrays of the leaves that hold floating-point or complex numbers."""
    leaves = [(path, jnp.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def rate_metric(opt_state: optax.OptState) -> Metrics:
    """Return `learning_rate`, if the optimizer state holds exactly one."""
    rates = optax.tree.get_all_with_path(opt_state, "learning_rate")
    rates = [rate for _, rate in rates if isinstance(rate, jax.Array)]
    return {"learning_rate": Metric(rates[0].astype(jnp.float32), jnp.ones(()))} if len(rates) == 1 else {}


def token_counts(ghosts: GhostBatch) -> Metrics:
    """Return `tokens`, those of documents, and `padded_tokens`, all positions that were computed; means over steps."""
    real = jnp.sum(ghosts.segment_ids != 0).astype(jnp.float32)
    return {
        "tokens": Metric(real, jnp.ones(())),
        "padded_tokens": Metric(jnp.float32(ghosts.tokens.size), jnp.ones(())),
    }
