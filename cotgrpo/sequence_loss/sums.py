"""The sums of a sequence loss over a batch, with their gradients: see `cotgrpo.sequence_loss`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.objectives import Objective, TokenInputs
from cotgrpo.sequence_loss.inputs import SequenceInputs, SequenceLoss
from cotgrpo.sharding import constrain_param, vary_alike, with_types_as_layout
from cotgrpo.tiled_loss import CPU_BLOCK_ROWS, HeadSpec, Reference, map_live_tiles, mean_over_draws
from cotgrpo.token_shards import Shard
from cotgrpo.types import same_dtype
from cotgrpo.xla_cpu import outer_product_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.tiled_loss import Evaluate
    from cotgrpo.types import AnyArray, Array, Bool, Float, Int, PyTree

    Grads = tuple[Float[Array, "*batch D"], Float[Array, "D V"] | None]
    """The gradients in the hidden rows and in the head."""


class SequenceSums(flax.struct.PyTreeNode):
    """Sums over a batch.

    Attributes:
        loss: of the sequence loss over replies.
        metrics: of its metrics over replies.
        replies: how many replies there are.
        token_loss: of the objective's loss over tokens, weighted.
        token_metrics: of the objective's metrics over tokens, weighted.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    replies: Float[Array, ""]
    token_loss: Float[Array, ""]
    token_metrics: dict[str, Float[Array, ""]]


def sequence_sums(
    sequence_loss: SequenceLoss,
    objective: Objective,
    hidden: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"] | None,
    inputs: TokenInputs,
    segment_ids: Int[AnyArray, "B T"],
    *,
    extra: Mapping[str, Array] | None = None,
    uniform: Float[Array, "B T G"] | Float[Array, "B T G 2"] | None = None,
    reference: Reference | None = None,
    spec: HeadSpec,
    tile_size: int | None = None,
) -> SequenceSums:
    """Return the sums of a sequence loss. The field `loss` is differentiable in `hidden` and `head_DV`.

    Args:
        sequence_loss: a function of one reply, see `SequenceInputs`.
        objective: a function of one token, see `cotgrpo.objectives`.
        hidden, head_DV, inputs, uniform, reference, spec, tile_size: as in `cotgrpo.tiled_loss.tiled_loss`.
        segment_ids: 0 for padding, the same number for the tokens of a document.
        extra: arrays `[B, T, ...]` for the sequence loss.
    """
    reference_spec = HeadSpec() if reference is None else reference.spec
    loss = RepliesLoss(sequence_loss, objective, spec, reference_spec, tile_size)

    @jax.custom_vjp
    def total(hidden: Array, head: Array | None, rest: PyTree) -> SequenceSums:
        return loss.sums(hidden, head, rest)

    def forward(hidden: Array, head: Array | None, rest: PyTree) -> tuple[SequenceSums, Grads]:
        return loss.sums_and_grads(hidden, head, rest)

    def backward(grads: Grads, cotangents: SequenceSums) -> tuple[Array, Array | None, None]:
        scaled = lambda g, like: (cotangents.loss.astype(g.dtype) * g).astype(like.dtype)
        dhidden, dhead = jax.tree.map(scaled, grads, likes)
        return dhidden, dhead, None

    likes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (hidden, head_DV))
    total.defvjp(forward, backward)
    frozen = (None, None) if reference is None else (reference.hidden, reference.head)
    return total(*vary_alike(hidden, head_DV, (inputs, uniform, frozen, segment_ids, dict(extra or {}))))


@dataclasses.dataclass(frozen=True)
class RepliesLoss:
    """The sums of a batch, and the sums with the gradients. Everything in here is static; arrays are arguments.

    The argument `rest` of the methods is `(inputs, uniform, (reference_hidden, reference_head), segment_ids, extra)`.
    """

    function: SequenceLoss
    objective: Objective
    spec: HeadSpec
    reference_spec: HeadSpec
    tile_size: int | None

    def sums(self, hidden: Float[Array, "B T D"], head_DV: Float[Array, "D V"] | None, rest: PyTree) -> SequenceSums:
        """Return the sums."""
        values, _ = self.over_tiles(hidden, head_DV, rest)
        return self.over_replies(values, rest)[0]

    def sums_and_grads(
        self, hidden: Float[Array, "B T D"], head_DV: Float[Array, "D V"] | None, rest: PyTree
    ) -> tuple[SequenceSums, Grads]:
        """Return the sums, and the gradients of the loss."""
        values, _ = self.over_tiles(hidden, head_DV, rest)
        _, slope_BT = self.over_replies(values, rest)
        # All results come from the second pass, so that nothing needs the first if the slopes do not.
        values, grads = self.over_tiles(hidden, head_DV, rest, slope_BT)
        assert grads is not None
        return self.over_replies(values, rest)[0], grads

    def over_tiles(
        self,
        hidden: Float[Array, "B T D"],
        head_DV: Float[Array, "D V"] | None,
        rest: PyTree,
        slope_BT: Float[Array, "B T"] | None = None,
    ) -> tuple[PyTree, Grads | None]:
        """Return loss and metrics of every token, `[B, T]`, and with slopes the gradients of `sum_t slope_t loss_t`."""
        inputs, uniform, (reference_hidden, reference_head), *_ = rest

        def tile(rows: PyTree, heads: PyTree, is_live_T: Bool[Array, "T"], shard: Shard) -> tuple[PyTree, PyTree]:
            hidden_TD, inputs, uniform, reference_TD, slope_T = rows
            head_DV, reference_head = heads
            # What a skipped row holds, even NaN, must not reach `d head` as NaN * 0.
            hidden_TD = jnp.where(is_live_T[:, None], hidden_TD, 0)
            logits_TV = self.spec.logits(hidden_TD, head_DV)
            frozen_TV = None if reference_TD is None else self.reference_spec.logits(reference_TD, reference_head)
            inputs = inputs.replace(reference_logits=frozen_TV)
            values, dlogits_TV = self.map_tokens(slope_T is not None, logits_TV, inputs, uniform)
            if dlogits_TV is None:
                return None, (values, None)
            dlogits_TV = jnp.where((is_live_T & (slope_T != 0))[:, None], slope_T[:, None] * dlogits_TV, 0.0)
            dlogits_TV = self.spec.pull_back(logits_TV, dlogits_TV)
            if head_DV is None:
                return None, (values, dlogits_TV.astype(hidden_TD.dtype))
            dtype, dlogits_TV = dlogits_TV.dtype, dlogits_TV.astype(head_DV.dtype)
            dhidden_TD = jnp.matmul(dlogits_TV, head_DV.T, preferred_element_type=dtype)
            left_TD, right_TV = same_dtype(hidden_TD, dlogits_TV)
            return outer_product_sum(left_TD, right_TV, dtype), (values, dhidden_TD.astype(hidden_TD.dtype))

        dhead, (values, dhidden) = map_live_tiles(
            tile,
            (hidden, inputs, uniform, reference_hidden, slope_BT),
            (head_DV, reference_head),
            inputs.weight,
            vocab_size=hidden.shape[-1] if head_DV is None else head_DV.shape[1],
            tile_size=self.tile_size,
        )
        if slope_BT is None:
            return values, None
        return values, (dhidden, jax.tree.map(lambda x: constrain_param(x, "head"), dhead))

    def map_tokens(
        self,
        with_gradient: bool,
        logits_TV: Float[Array, "T V"],
        inputs: TokenInputs,
        uniform: Float[Array, "T G"] | Float[Array, "T G 2"] | None,
    ) -> tuple[PyTree, Float[Array, "T V"] | None]:
        """Return loss and metrics of each token of a tile, and the gradient of each loss in its logits or None."""
        plain: Evaluate = lambda logits_V, inputs: (self.objective(logits_V, inputs), None)
        evaluate = objectives.value_and_grad(self.objective) if with_gradient else plain

        def one(token: tuple[Array, TokenInputs, Array | None]) -> tuple[PyTree, Array | None]:
            logits_V, inputs, uniform = token
            if uniform is not None:
                draw_V = objectives.draw_logits(self.objective, logits_V)
                inputs = inputs.replace(drawn=objectives.draw(draw_V, uniform))
            return mean_over_draws(evaluate, logits_V, inputs)

        return jax.lax.platform_dependent(
            (logits_TV, inputs, uniform),
            cpu=lambda tokens: jax.lax.map(one, tokens, batch_size=CPU_BLOCK_ROWS),  # they stay in a CPU's caches
            default=jax.vmap(one),
        )

    def over_replies(self, values: PyTree, rest: PyTree) -> tuple[SequenceSums, Float[Array, "B T"]]:
        """Return the sums, and the slopes of their loss in the tokens' losses."""
        inputs, _, _, segment_ids, extra = rest
        run = lambda _, segments, *arrays: self.loop_over_replies(segments, *arrays)
        return with_types_as_layout(run, {}, segment_ids, values, inputs.weight, extra)

    def loop_over_replies(
        self,
        segment_ids: Int[Array, "B T"],
        values: PyTree,
        weight_BT: Float[Array, "B T"],
        extra: dict[str, Array],
    ) -> tuple[SequenceSums, Float[Array, "B T"]]:
        """Do what `over_replies` does: the first document of each row at one time, then the second."""
        document_BT, live_BT = number_documents(segment_ids), weight_BT != 0
        losses_BT, metrics = values
        as_loss = lambda x: x.astype(losses_BT.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        weight_BT, metrics, extra = jax.tree.map(as_loss, (weight_BT, metrics, extra))
        tokens = SequenceInputs(losses_BT, weight_BT, metrics, extra)

        def add_documents(index: Int[Array, ""], carry: PyTree) -> PyTree:
            own_BT = live_BT & (document_BT == index)
            found, slope_BT = jax.vmap(self.one_reply)(own_BT, tokens)
            sums, slopes_BT = carry
            return jax.tree.map(lambda s, x: s + jnp.sum(x, axis=0), sums, found), slopes_BT + slope_BT

        like = jax.eval_shape(jax.vmap(self.one_reply), live_BT, tokens)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), like)
        zeros, slopes_BT, _ = vary_alike(zeros, jnp.zeros_like(losses_BT), (segment_ids, tokens))
        (sums, replies), slopes_BT = jax.lax.fori_loop(1, jnp.max(document_BT) + 1, add_documents, (zeros, slopes_BT))
        (loss, own), weigh = sums, lambda x: jnp.sum(jnp.where(live_BT, weight_BT * x.astype(weight_BT.dtype), 0.0))
        return SequenceSums(loss, own, replies, *jax.tree.map(weigh, values)), slopes_BT

    def one_reply(
        self, own_T: Bool[Array, "T"], tokens: SequenceInputs
    ) -> tuple[tuple[LossAndMetrics, Float[Array, ""]], Float[Array, "T"]]:
        """Return the loss and metrics of the reply of these tokens, 1 or 0 replies, and the slopes of the loss."""
        only = lambda x: jnp.where(own_T.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))
        reply = jax.tree.map(only, tokens)

        def of_losses(losses_T: Float[Array, "T"]) -> LossAndMetrics:
            found: Any = self.function(reply.replace(losses=losses_T))
            if not (isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[1], Mapping)):
                raise ValueError(
                    "sequence_loss must return (loss, metrics), a scalar and a dict of scalars, got "
                    f"{type(found).__name__}."
                )
            for name, value in {"loss": found[0], **found[1]}.items():
                if jnp.shape(value) != ():
                    raise ValueError(f"sequence_loss must return scalars, got {name} of the shape {jnp.shape(value)}.")
            as_float = lambda x: jnp.asarray(x, losses_T.dtype)
            return as_float(found[0]), {name: as_float(value) for name, value in found[1].items()}

        values, slope_T = jax.value_and_grad(of_losses, has_aux=True)(reply.losses)
        exists = jnp.any(own_T)
        values = jax.tree.map(lambda x: jnp.where(exists, x, 0.0), values)
        return (values, exists.astype(slope_T.dtype)), only(slope_T)


def number_documents(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return 1, 2, ... for the documents of a row in their order, and 0 for padding, whatever numbers they have."""
    before_BT = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts_BT = (segment_ids != 0) & (segment_ids != before_BT)
    return jnp.where(segment_ids != 0, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), 0)


def count_replies(segment_ids: Int[AnyArray, "B T"], weight: Float[Array, "B T"]) -> Float[Array, ""]:
    """Return how many documents have a supervised token."""

    def count(_: PyTree, segment_ids: Array, weight_BT: Array) -> Array:
        document_BT = jnp.where(weight_BT != 0, number_documents(segment_ids), 0)
        # The first supervised token of a document has a larger number than all before it.
        before_BT = jnp.pad(jax.lax.cummax(document_BT, axis=1)[:, :-1], ((0, 0), (1, 0)))
        return jnp.sum(document_BT > before_BT).astype(jnp.float32)

    return with_types_as_layout(count, {}, jnp.asarray(segment_ids), weight)
