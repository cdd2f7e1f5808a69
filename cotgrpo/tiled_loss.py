"""The head and the objective over tiles of supervised tokens, with gradients in the same pass.

The language-model head is never applied to the whole batch. For each tile of tokens the logits are made, the objective
is mapped over them, and the tile's contributions to `d hidden` and `d head` are added at once:

    logits_TV = hidden_TD @ head_DV                     float32 accumulation
    loss_T, dlogits_TV = vmap(value_and_grad(objective))
    d hidden_TD = dlogits_TV @ head_DV^T,    d head_DV += hidden_TD^T @ dlogits_TV

These are three matrix products a token, the least possible. Nothing is recomputed, and no `[B, T, V]` array exists. The
whole is a `custom_vjp` whose backward pass only scales the stored gradients. Tokens with a weight are moved to the
front and the loop ends after them, so prompt and padding tokens cost nothing here.

On a mesh every shard of the batch loops over its own tokens, until the shard with the most supervised tokens is done.
The head is gathered once, before the loop; its columns stay split over the tensor axis. The shards' `d head` are summed
once, after the loop. XLA would do both in every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.objectives import MASKED_LOGIT, Objective, TokenInputs
from cotgrpo.sharding import constrain_param, vary_alike
from cotgrpo.token_shards import ONLY_SHARD, Shard, over_shards
from cotgrpo.types import Student, at_least_float32, project, same_dtype
from cotgrpo.xla_cpu import outer_product_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Bool, Float, Int, PyTree

    Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
    """The weighted sum of the loss, and those of its metrics."""
    Evaluate = Callable[[Float[Array, "V"], TokenInputs], tuple[LossAndMetrics, Float[Array, "V"] | None]]
    """The loss and metrics of one token, and the gradient in its logits or None."""

CPU_BLOCK_ROWS = 16
"""The most rows of logits that an objective is mapped over at one time on a CPU."""


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """How hidden rows become a distribution.

    Attributes:
        softcap: c > 0 makes every logit `c * tanh(logit / c)`, or None.
        vocab_size: the number of columns of the head that are real tokens, or None for all.
    """

    softcap: float | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, student: Student) -> HeadSpec:
        """Return the soft-cap and the vocabulary size of a student."""
        return cls(student.softcap, student.vocab_size)

    def logits(
        self, rows_TD: Float[Array, "T D"], head_DV: Float[Array, "D V"] | None, shard: Shard = ONLY_SHARD
    ) -> Float[Array, "S W"]:
        """Return the logits of a tile, whole rows of at least float32. Padded columns get `MASKED_LOGIT`."""
        logits_TV = shard.whole_rows(project(rows_TD, head_DV, self.softcap))
        return jnp.where(self.is_real(logits_TV), logits_TV, MASKED_LOGIT) if self.vocab_size else logits_TV

    def pull_back(self, logits_TV: Float[Array, "T V"], dlogits_TV: Float[Array, "T V"]) -> Float[Array, "T V"]:
        """Return the gradient before soft-cap and mask: d(c tanh(x / c)) = 1 - (logit / c)^2."""
        if self.softcap:
            dlogits_TV = dlogits_TV * (1.0 - jnp.square(logits_TV / self.softcap))
        # Last, since the soft-cap's derivative overflows at a masked logit.
        return jnp.where(self.is_real(logits_TV), dlogits_TV, 0.0) if self.vocab_size else dlogits_TV

    def is_real(self, logits_TV: Float[Array, "T V"]) -> Bool[Array, "1 V"]:
        """Return which columns are real tokens."""
        return jnp.arange(logits_TV.shape[-1])[None, :] < jnp.asarray(self.vocab_size)


class Reference(flax.struct.PyTreeNode):
    """The frozen reference model of a batch.

    Attributes:
        hidden: `[B, T, D']` or `[N, D']`, the rows that its head reads.
        head: `[D', V]`, or None if the rows are logits.
        spec: its soft-cap and vocabulary size.
    """

    hidden: Float[Array, "*batch D"]
    head: Float[Array, "D V"] | None = None
    spec: HeadSpec = flax.struct.field(pytree_node=False, default=HeadSpec())


def tiled_loss(
    objective: Objective,
    hidden: Float[Array, "*batch D"],
    head_DV: Float[Array, "D V"] | None,
    inputs: TokenInputs,
    *,
    uniform: Float[Array, "*batch G"] | Float[Array, "*batch G 2"] | None = None,
    reference: Reference | None = None,
    spec: HeadSpec = HeadSpec(),
    tile_size: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return `sum_n weight_n objective(logits_n, inputs_n)` and the weighted sums of its metrics.

    Differentiable in `hidden` and `head_DV`.

    Args:
        objective: see `cotgrpo.objectives`.
        hidden: the rows that the head reads, `[B, T, D]` or `[N, D]`, any float type.
        head_DV: the head in the compute type, or None if the hidden rows are logits.
        inputs: ghost ids `[B, T]` or `[N]`, weights, drawn ids `[B, T, G]` if they came with the batch, and extra
            arrays. Tokens with weight 0 are skipped.
        uniform: in [0, 1), one random number for each token to draw here, or pairs of `objectives.draw_uniform`; None:
            nothing is drawn.
        reference: the frozen reference model, or None.
        spec: soft-cap and real vocabulary size.
        tile_size: tokens a tile; None chooses (see `default_tile_size`).

    Returns:
        The loss sum and a dict of metric sums: scalars, float64 if `hidden` or the head are so, else float32. Only the
        loss carries a gradient, and only to `hidden` and `head_DV`.
    """
    inputs = computable(inputs, at_least_float32(hidden, head_DV))
    loss = TiledLoss(objective, spec, HeadSpec() if reference is None else reference.spec, tile_size)

    @jax.custom_vjp
    def total(hidden: Array, head: Array | None, rest: PyTree) -> Sums:
        return loss.sums(hidden, head, rest)

    def forward(hidden: Array, head: Array | None, rest: PyTree) -> tuple[Sums, PyTree]:
        return loss.sums_and_grads(hidden, head, rest)

    def backward(grads: PyTree, cotangents: Sums) -> tuple[Array, Array | None, None]:
        scale, _ = cotangents
        dhidden, dhead = jax.tree.map(
            lambda g, like: (scale.astype(g.dtype) * g).astype(like.dtype), grads, (hidden_like, head_like)
        )
        return dhidden, dhead, None

    hidden_like = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
    head_like = None if head_DV is None else jax.ShapeDtypeStruct(head_DV.shape, head_DV.dtype)
    total.defvjp(forward, backward)
    frozen = (None, None) if reference is None else (reference.hidden, reference.head)
    return total(*vary_alike(hidden, head_DV, (inputs, uniform, frozen)))


def computable(inputs: TokenInputs, dtype: jnp.dtype) -> TokenInputs:
    """Return the inputs with ids in int32, and all floats in the type of the logits."""
    floats = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return inputs.replace(
        ghost=inputs.ghost.astype(jnp.int32),
        weight=inputs.weight.astype(dtype),
        drawn=None if inputs.drawn is None else inputs.drawn.astype(jnp.int32),
        extra={name: floats(jnp.asarray(x)) for name, x in inputs.extra.items()},
    )


def default_tile_size(num_tokens: int, vocab_size: int, platform: str | None = None) -> int:
    """Return how many tokens a tile has.

    Its float32 logits take at most 128 MiB on a CPU and 1 GiB elsewhere. Within that it is an eighth of the tokens, the
    granularity of skipping, but at least 512: smaller tiles would read and write `d head` too often.
    """
    budget = 2**27 if (platform or jax.default_backend()) == "cpu" else 2**30
    most = max(budget // (4 * vocab_size), 1)
    return min(most, max(-(-num_tokens // 8), 512), num_tokens)


class LiveTiles(NamedTuple):
    """The tokens of one shard in tiles, live ones first in their order.

    Attributes:
        order_N: token indices, live ones first.
        num_live: how many are live.
        size: tokens a tile.
    """

    order_N: Int[Array, "N"]
    num_live: Int[Array, ""]
    size: int

    @property
    def num_tiles(self) -> int:
        """The number of tiles that all tokens fill."""
        return -(-len(self.order_N) // self.size)

    def loop(
        self,
        tile: Callable[[Int[Array, "T"], Bool[Array, "T"]], tuple[PyTree, PyTree]],
        shards: tuple[str, ...],
    ) -> tuple[PyTree, PyTree]:
        """Run `tile(token_T, is_live_T) -> (sums, rows)` over the tiles with live tokens.

        Returns:
            The sums over tiles, and the rows `[N, ...]` in the tokens' own order. Rows of tiles without a live token
            are zero.
        """
        padded = jnp.pad(self.order_N, (0, self.num_tiles * self.size - len(self.order_N)))

        def one_tile(index: Int[Array, ""], carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            sums, rows = carry
            start = index * self.size
            token_T = jax.lax.dynamic_slice_in_dim(padded, start, self.size)
            is_live_T = start + jnp.arange(self.size, dtype=jnp.int32) < self.num_live
            tile_sums, tile_rows = tile(token_T, is_live_T)
            put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            return jax.tree.map(jnp.add, sums, tile_sums), jax.tree.map(put, rows, tile_rows)

        sums, rows = jax.eval_shape(tile, padded[: self.size], jnp.ones(self.size, bool))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        empty = jax.tree.map(lambda x: jnp.zeros((self.num_tiles * self.size, *x.shape[1:]), x.dtype), rows)
        zeros, empty, _ = vary_alike(zeros, empty, self.order_N)
        live_tiles = (self.num_live + self.size - 1) // self.size
        if shards:
            # The collectives of the tensor axis are in this loop, so it must be equally long on every device.
            live_tiles = jax.lax.pmax(live_tiles, shards)
        sums, rows = jax.lax.fori_loop(0, live_tiles, one_tile, (zeros, empty))
        place_N = jnp.argsort(self.order_N)
        return sums, jax.tree.map(lambda x: x[place_N], rows)


def map_live_tiles(
    tile: Callable[[PyTree, PyTree, Bool[Array, "T"], Shard], tuple[PyTree, PyTree]],
    rows: PyTree,
    heads: PyTree,
    weight: Float[Array, "*batch"] | Bool[Array, "*batch"],
    *,
    vocab_size: int,
    tile_size: int | None = None,
    split_vocab: bool = False,
) -> tuple[PyTree, PyTree]:
    """Run a function over tiles of the live tokens of a batch, each shard of it over its own.

    Args:
        tile: `tile(rows_T, heads, is_live_T, shard) -> (sums, out_T)`.
        rows: arrays `[B, T, ...]` or `[N, ...]`.
        heads: arrays `[D, V]` that every tile reads whole.
        weight: tokens of weight 0 are skipped, but a tile may hold some.
        vocab_size: V, for the size of a tile.
        tile_size: tokens a tile; None chooses.
        split_vocab: whether `tile` may get some columns of the heads only, as `shard.vocab` says.

    Returns:
        The sums over all tiles, and `out` as arrays `[B, T, ...]`, zero for tokens whose tile was skipped.
    """

    def one_shard(shard: Shard, rows: PyTree, heads: PyTree, weight: Array) -> tuple[PyTree, PyTree]:
        shape = weight.shape
        flat = jax.tree.map(lambda x: x.reshape(weight.size, *x.shape[len(shape) :]), rows)
        live_N = weight.reshape(-1).astype(bool)
        size = min(tile_size or default_tile_size(live_N.size, vocab_size), live_N.size)
        size = -(-size // shard.parts) * shard.parts
        # JAX forgets that the result of argsort varies as its argument does.
        order_N, num_live = vary_alike(jnp.argsort(~live_N, stable=True), jnp.sum(live_N, dtype=jnp.int32))
        tiles = LiveTiles(order_N, num_live, size)
        pick = lambda token_T: jax.tree.map(lambda x: x[token_T], flat)
        run = lambda token_T, is_live_T: tile(pick(token_T), heads, is_live_T, shard)
        sums, out = tiles.loop(run, shard.tokens)
        return sums, jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)

    return over_shards(one_shard, *vary_alike(rows, heads, weight), split_vocab=split_vocab)


@dataclasses.dataclass(frozen=True)
class TiledLoss:
    """The loss of a batch, and the loss with its gradients. Everything in here is static; arrays are arguments.

    The argument `rest` of the methods is `(inputs, uniform, (reference_hidden, reference_head))`.
    """

    objective: Objective
    spec: HeadSpec
    reference_spec: HeadSpec
    tile_size: int | None

    def sums(self, hidden: Float[Array, "*batch D"], head_DV: Float[Array, "D V"] | None, rest: PyTree) -> Sums:
        """Return the sums of loss and metrics."""

        def tile(rows: PyTree, heads: PyTree, is_live_T: Bool[Array, "T"], shard: Shard) -> tuple[Sums, None]:
            hidden_TD = jnp.where(is_live_T[:, None], rows[0], 0)
            evaluate: Evaluate = lambda logits_V, inputs: (self.objective(logits_V, inputs), None)
            sums, _ = self.tile_sums(evaluate, hidden_TD, rows[1:], heads, is_live_T, shard)
            return sums, None

        sums, _ = self.over_tiles(tile, hidden, head_DV, rest)
        return sums

    def sums_and_grads(
        self, hidden: Float[Array, "*batch D"], head_DV: Float[Array, "D V"] | None, rest: PyTree
    ) -> tuple[Sums, tuple[Float[Array, "*batch D"], Float[Array, "D V"] | None]]:
        """Return the sums, and the gradients `(d hidden, d head)`: `d head` in the logits' type, or None."""
        evaluate = objectives.value_and_grad(self.objective)

        def tile(
            rows: PyTree, heads: PyTree, is_live_T: Bool[Array, "T"], shard: Shard
        ) -> tuple[PyTree, Float[Array, "T D"]]:
            # What a skipped row holds, even NaN, must not reach `d head` as NaN * 0.
            hidden_TD = jnp.where(is_live_T[:, None], rows[0], 0)
            sums, dlogits_TV = self.tile_sums(evaluate, hidden_TD, rows[1:], heads, is_live_T, shard)
            assert dlogits_TV is not None
            head_DV, _ = heads
            if head_DV is None:
                return (sums, None), dlogits_TV.astype(hidden_TD.dtype)
            dtype = dlogits_TV.dtype
            dlogits_TV = dlogits_TV.astype(head_DV.dtype)
            dhidden_TD = shard.sum_of_columns(jnp.matmul(dlogits_TV, head_DV.T, preferred_element_type=dtype))
            left_TD, right_TV = same_dtype(hidden_TD, dlogits_TV)
            dhead_DV = outer_product_sum(left_TD, right_TV, dtype)
            return (sums, dhead_DV), dhidden_TD.astype(hidden_TD.dtype)

        (sums, dhead), dhidden = self.over_tiles(tile, hidden, head_DV, rest)
        return sums, (dhidden, jax.tree.map(lambda x: constrain_param(x, "head"), dhead))

    def over_tiles(
        self,
        tile: Callable[[PyTree, PyTree, Bool[Array, "T"], Shard], tuple[PyTree, PyTree]],
        hidden: Float[Array, "*batch D"],
        head_DV: Float[Array, "D V"] | None,
        rest: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """Run `tile` over the supervised tokens."""
        inputs, uniform, (reference_hidden, reference_head) = rest
        return map_live_tiles(
            tile,
            (hidden, inputs, uniform, reference_hidden),
            (head_DV, reference_head),
            inputs.weight,
            vocab_size=hidden.shape[-1] if head_DV is None else head_DV.shape[1],
            tile_size=self.tile_size,
            # Logits that come without a head are whole rows.
            split_vocab=head_DV is not None and (reference_hidden is None) == (reference_head is None),
        )

    def tile_sums(
        self,
        evaluate: Evaluate,
        hidden_TD: Float[Array, "T D"],
        rest: PyTree,
        heads: PyTree,
        is_live_T: Bool[Array, "T"],
        shard: Shard,
    ) -> tuple[Sums, Float[Array, "T V"] | None]:
        """Return the weighted sums of one tile, and the gradient in its logits or None."""
        (inputs, uniform, reference_TD), (head_DV, reference_head) = rest, heads
        inputs = inputs.replace(weight=jnp.where(is_live_T, inputs.weight, 0.0))
        logits_TV = self.spec.logits(hidden_TD, head_DV, shard)
        reference_TV = None if reference_TD is None else self.reference_spec.logits(reference_TD, reference_head, shard)
        if reference_TV is not None:
            reference_TV = reference_TV.astype(logits_TV.dtype)
        inputs, uniform = shard.own_tokens((inputs, uniform))
        sums, dlogits_TV = jax.lax.platform_dependent(
            logits_TV,
            inputs.replace(reference_logits=reference_TV),
            uniform,
            cpu=functools.partial(self.tile_loss_blocked, evaluate),
            default=functools.partial(self.tile_loss, evaluate),
        )
        return sums, None if dlogits_TV is None else shard.own_columns(dlogits_TV)

    def tile_loss_blocked(
        self,
        evaluate: Evaluate,
        logits_TV: Float[Array, "T V"],
        inputs: TokenInputs,
        uniform: Float[Array, "T G"] | Float[Array, "T G 2"] | None,
    ) -> tuple[Sums, Float[Array, "T V"] | None]:
        """Compute `tile_loss` a few rows at a time, which stay in a CPU's caches.

        The gradient is written over the logits.
        """
        tile = logits_TV.shape[0]
        size = next(size for size in range(min(CPU_BLOCK_ROWS, tile), 0, -1) if tile % size == 0)
        block = lambda x, index: jax.lax.dynamic_slice_in_dim(x, index * size, size)

        def one_block(index: Int[Array, ""], carry: PyTree) -> PyTree:
            sums, logits_BV, tile_TV = carry
            known = jax.tree.map(lambda x: block(x, index), (inputs, uniform))
            block_sums, dlogits_BV = self.tile_loss(evaluate, logits_BV, *known)
            if dlogits_BV is not None:
                tile_TV = jax.lax.dynamic_update_slice_in_dim(tile_TV, dlogits_BV, index * size, axis=0)
            # The next block is read here, after the write. Read at its use, it would make XLA copy the tile first.
            return jax.tree.map(jnp.add, sums, block_sums), block(tile_TV, index + 1), tile_TV

        like = jax.eval_shape(functools.partial(self.tile_loss, evaluate), logits_TV, inputs, uniform)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like[0])
        sums, first, logits_TV = vary_alike(sums, block(logits_TV, 0), logits_TV)
        sums, _, tile_TV = jax.lax.fori_loop(0, tile // size, one_block, (sums, first, logits_TV))
        return sums, None if like[1] is None else tile_TV

    def tile_loss(
        self,
        evaluate: Evaluate,
        logits_TV: Float[Array, "T V"],
        inputs: TokenInputs,
        uniform: Float[Array, "T G"] | Float[Array, "T G 2"] | None,
    ) -> tuple[Sums, Float[Array, "T V"] | None]:
        """Return the weighted sums of rows of logits, and the gradient in the logits or None."""
        if uniform is not None:
            draw_TV = jax.vmap(functools.partial(objectives.draw_logits, self.objective))(logits_TV)
            inputs = inputs.replace(drawn=jax.vmap(objectives.draw)(draw_TV, uniform))
        values, dlogits_TV = jax.vmap(functools.partial(mean_over_draws, evaluate))(logits_TV, inputs)
        live_T = inputs.weight != 0
        # A select and not only a product: a skipped row's values, even NaN, must not reach the sums.
        weigh = lambda weight, x: weight * jnp.asarray(x).astype(weight.dtype)  # a metric may be an integer or a bool
        sums = jax.tree.map(lambda x: jnp.sum(jnp.where(live_T, weigh(inputs.weight, x), 0.0)), values)
        if dlogits_TV is not None:
            dlogits_TV = jnp.where(live_T[:, None], weigh(inputs.weight[:, None], dlogits_TV), 0.0)
            dlogits_TV = self.spec.pull_back(logits_TV, dlogits_TV)
        return sums, dlogits_TV


def mean_over_draws(
    evaluate: Evaluate, logits_V: Float[Array, "V"], inputs: TokenInputs
) -> tuple[LossAndMetrics, Float[Array, "V"] | None]:
    """Evaluate one token; its values and gradient are means over its drawn tokens, if it has any."""
    if inputs.drawn is None:
        return evaluate(logits_V, inputs)
    if inputs.drawn.shape == (1,):
        return evaluate(logits_V, inputs.replace(drawn=inputs.drawn[0]))
    results = jax.vmap(lambda drawn: evaluate(logits_V, inputs.replace(drawn=drawn)))(inputs.drawn)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)
