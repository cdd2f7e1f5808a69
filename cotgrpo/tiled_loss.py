"""One engine feeds every objective: the head and the objective over tiles of tokens, gradients in the same pass.

The language-model head is never applied to the whole batch. For each tile of tokens the engine makes the tile's logits, maps
`value_and_grad(objective)` over its rows, and at once adds the tile's contribution to `d hidden` and `d head`:

    logits_TV = hidden_TD @ head_DV                     float32 accumulation
    loss_T, dlogits_TV = vmap(value_and_grad(objective))
    d hidden_TD = dlogits_TV @ head_DV^T,    d head_DV += hidden_TD^T @ dlogits_TV

That is three matrix products a token, the least possible: nothing is recomputed, and no `[B, T, V]` array exists. It is a `custom_vjp`
whose backward pass only scales the stored gradients. Tokens with a weight are moved to the front and the loop ends after them, so
prompt and padding tokens cost nothing here: the head costs what the response costs.

On a mesh every shard of the batch walks over its own tokens, live ones first, until the shard with the most is done. The head is gathered once, before the loop (its columns
stay spread over the tensor axis), and each shard's `d head` is summed with the others' once, after it: left to itself, XLA would do both in
every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo import objectives
from cotgrpo.objectives import MASKED_LOGIT, Objective, TokenInputs
from cotgrpo.sharding import axis_names, constrain, constrain_param, partition_spec
from cotgrpo.types import project
from cotgrpo.xla_cpu import outer_product_sum

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

DRAW_BLOCK = 256
"""Width of the blocks of the two-level inverse CDF: the cumulative sum runs over V / 256 block sums, then over one block."""

BLOCK_ROWS = 16
"""Rows of logits, at most, that an objective is mapped over at one time on a CPU."""


class TokenRows(flax.struct.PyTreeNode):
    """What the engine needs to know of the tokens of a batch, `[B, T]` or `[N]`, beside their hidden rows.

    Attributes:
        ghost: int32 `[B, T]`, y*.
        weight: float32 `[B, T]`; tokens with weight 0 are skipped.
        drawn: int32 `[B, T, G]`, drawn tokens that came with the batch, or None.
        uniform: float32 `[B, T, G]` in [0, 1), one random number for each token to draw here, or None.
        reference_hidden: `[B, T, D']`, the hidden rows of a frozen reference model, or None.
        drawn_log_prob, advantage: float32 `[B, T]`, of the drawn token, for objectives that want them, or None.
        top_ids, top_log_probs: int32 and float32 `[B, T, K]`, of the ghost's distribution, for objectives that want it, or None.
    """

    ghost: Int[Array, "*batch"]
    weight: Float[Array, "*batch"]
    drawn: Int[Array, "*batch G"] | None = None
    uniform: Float[Array, "*batch G"] | None = None
    reference_hidden: Float[Array, "*batch D"] | None = None
    drawn_log_prob: Float[Array, "*batch"] | None = None
    advantage: Float[Array, "*batch"] | None = None
    top_ids: Int[Array, "*batch K"] | None = None
    top_log_probs: Float[Array, "*batch K"] | None = None


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """How hidden rows become a distribution: the soft-cap, and how many columns of the head are real tokens."""

    softcap: float | None = None
    vocab_size: int | None = None

    def logits(self, rows_TD: Any, head_DV: Any) -> Any:
        """Float32 logits of a tile; columns that are no token get `MASKED_LOGIT`."""
        logits_TV = project(rows_TD, head_DV, self.softcap)
        return jnp.where(self.real(logits_TV), logits_TV, MASKED_LOGIT) if self.vocab_size else logits_TV

    def pull_back(self, logits_TV: Any, dlogits_TV: Any) -> Any:
        """The gradient before soft-cap and mask: d(c tanh(x / c)) = 1 - (logit / c)^2."""
        if self.softcap:
            dlogits_TV = dlogits_TV * (1.0 - jnp.square(logits_TV / self.softcap))
        # Last, since the soft-cap's derivative overflows at a masked logit.
        return jnp.where(self.real(logits_TV), dlogits_TV, 0.0) if self.vocab_size else dlogits_TV

    def real(self, logits_TV: Any) -> Any:
        return jnp.arange(logits_TV.shape[-1])[None, :] < jnp.asarray(self.vocab_size)


def tiled_loss(
    objective: Objective,
    hidden: Float[Array, "*batch D"],
    head_DV: Float[Array, "D V"] | None,
    rows: TokenRows,
    *,
    spec: HeadSpec = HeadSpec(),
    reference_head: Any = None,
    reference_spec: HeadSpec = HeadSpec(),
    tile_size: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`sum_n weight_n objective(logits_n, row_n)` and the weighted sums of its metrics, differentiable in `hidden` and `head`.

    Args:
        objective: see `cotgrpo.objectives`.
        hidden: the rows that the head reads, `[B, T, D]` or `[N, D]`, any float type.
        head_DV: the head in the compute type, or None where the hidden rows are logits.
        rows: ghost ids, weights and the rest, a row for each token.
        spec: soft-cap and real vocabulary size.
        reference_head: `[D', V]`, the frozen reference's head, where `rows.reference_hidden` is given.
        reference_spec: its soft-cap and vocabulary size.
        tile_size: tokens a tile; None chooses (see `default_tile_size`).

    Returns:
        The loss sum and a dict of metric sums, float32 scalars. Only the loss carries a gradient, and only to `hidden` and `head`.
    """
    walk = TiledLoss(objective, spec, reference_spec, tile_size)

    @jax.custom_vjp
    def total(hidden: Any, head: Any, rest: Any) -> Any:
        return walk.run(hidden, head, *rest, with_grad=False)[0]

    def forward(hidden: Any, head: Any, rest: Any) -> Any:
        return walk.run(hidden, head, *rest, with_grad=True)

    def backward(grads: Any, cotangents: Any) -> Any:
        scale = cotangents[0]
        scaled = jax.tree.map(lambda g, like: (scale * g).astype(like.dtype), grads, (hidden_like, head_like))
        return (*scaled, None)

    hidden_like = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
    head_like = None if head_DV is None else jax.ShapeDtypeStruct(head_DV.shape, head_DV.dtype)
    total.defvjp(forward, backward)
    return total(hidden, head_DV, (rows, reference_head))


def default_tile_size(num_tokens: int, vocab_size: int, platform: str | None = None) -> int:
    """Tokens a tile: float32 logits of at most 128 MiB on CPU and 1 GiB elsewhere, and an eighth of the tokens, the grain of skipping, or 512.

    Below 512 `d head` would be read and written too often for the products between.
    """
    budget = 2**27 if (platform or jax.default_backend()) == "cpu" else 2**30
    most = max(budget // (4 * vocab_size), 1)
    return min(most, max(-(-num_tokens // 8), 512), num_tokens)


@dataclasses.dataclass(frozen=True)
class TiledLoss:
    """The loop over tiles. Everything in here is static; arrays are arguments."""

    objective: Objective
    spec: HeadSpec
    reference_spec: HeadSpec
    tile_size: int | None

    def run(self, hidden: Any, head_DV: Any, rows: TokenRows, reference_head: Any, *, with_grad: bool) -> Any:
        """`((loss_sum, metric_sums), (d hidden, d head))`; each gradient is None without `with_grad`."""
        batch = hidden.shape[:-1]
        spec = partition_spec("BT"[: len(batch)], batch)
        shards, whole = axis_names(spec), jax.sharding.PartitionSpec()

        def one_shard(hidden: Any, head_DV: Any, rows: TokenRows, reference_head: Any) -> Any:
            flat = lambda x: x.reshape(-1, *x.shape[len(batch) :])
            sums, grads = self.walk(flat(hidden), head_DV, jax.tree.map(flat, rows), reference_head, with_grad, shards)
            return (sums, grads[1]), grads[0].reshape(hidden.shape) if with_grad else None

        def stacked(*arguments: Any) -> Any:
            partial, dhidden = one_shard(*arguments)
            return jax.tree.map(lambda x: x[None], partial), dhidden

        if not shards:
            (sums, dhead), dhidden = one_shard(hidden, head_DV, rows, reference_head)
            return sums, (dhidden, dhead)
        # Gathered here, and summed below, not by collectives inside: those made XLA gather over the tensor axis as well.
        head_DV, reference_head = jax.tree.map(lambda head: constrain(head, "DV"), (head_DV, reference_head))
        partial, dhidden = jax.shard_map(
            stacked,
            in_specs=(spec, whole, spec, whole),
            out_specs=(jax.sharding.PartitionSpec(shards), spec),
            axis_names=set(shards),
            check_vma=False,
        )(hidden, head_DV, rows, reference_head)
        sums, dhead = jax.tree.map(lambda x: jnp.sum(x, axis=0), partial)
        return sums, (dhidden, jax.tree.map(lambda x: constrain_param(x, "head"), dhead))

    def walk(
        self,
        hidden_ND: Any,
        head_DV: Any,
        rows: TokenRows,
        reference_head: Any,
        with_grad: bool,
        shards: tuple[str, ...] = (),
    ) -> Any:
        """`run` on the tokens of one of the shards over some mesh axes."""
        num_tokens, width = hidden_ND.shape
        tile = min(
            self.tile_size or default_tile_size(num_tokens, width if head_DV is None else head_DV.shape[1]), num_tokens
        )
        num_tiles = -(-num_tokens // tile)
        live_N = rows.weight != 0
        # Live tokens first, in their order; then the walk may stop after the last of them.
        order_N = jnp.argsort(~live_N, stable=True)
        order = jnp.pad(order_N, (0, num_tiles * tile - num_tokens))
        num_live = jnp.sum(live_N)

        def one_tile(index: Any, carry: Any) -> Any:
            sums, grads = carry
            start = index * tile
            picked_T = jax.lax.dynamic_slice_in_dim(order, start, tile)
            in_play_T = start + jnp.arange(tile) < num_live
            # What a skipped row holds, even NaN, must not reach `d head` as NaN * 0.
            hidden_TD = jnp.where(in_play_T[:, None], hidden_ND[picked_T], 0)
            tile_rows = jax.tree.map(lambda x: x[picked_T], rows)
            weight_T = jnp.where(in_play_T, tile_rows.weight, 0.0)
            tile_sums, dlogits_TV = self.tile_sums(
                hidden_TD, head_DV, tile_rows.replace(weight=weight_T), reference_head, with_grad
            )
            sums = jax.tree.map(jnp.add, sums, tile_sums)
            if not with_grad:
                return sums, grads
            dhidden, dhead = grads
            if head_DV is None:
                tile_dhidden = dlogits_TV
            else:
                dlogits_TV = dlogits_TV.astype(head_DV.dtype)
                tile_dhidden = jnp.matmul(dlogits_TV, head_DV.T, preferred_element_type=jnp.float32)
                dhead = dhead + outer_product_sum(hidden_TD, dlogits_TV, jnp.float32)
            dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, tile_dhidden.astype(dhidden.dtype), start, axis=0)
            return sums, (dhidden, dhead)

        sums = self.zero_sums(tile, hidden_ND, head_DV, rows, reference_head)
        grads: Any = (None, None)
        if with_grad:
            dhidden = jnp.zeros((num_tiles * tile, width), hidden_ND.dtype)
            grads = (dhidden, None if head_DV is None else jnp.zeros(head_DV.shape, jnp.float32))
        live_tiles = (num_live + tile - 1) // tile
        if shards:
            # A loop with collectives in it, those of the tensor axis, has to be as long on every device; all would wait for the longest anyway.
            live_tiles = jax.lax.pmax(live_tiles, shards)
        sums, grads = jax.lax.fori_loop(0, live_tiles, one_tile, (sums, grads))
        if with_grad:
            grads = (grads[0][jnp.argsort(order_N)], grads[1])
        return sums, grads

    def tile_sums(self, hidden_TD: Any, head_DV: Any, rows: TokenRows, reference_head: Any, with_grad: bool) -> Any:
        """`((loss_sum, metric_sums), dlogits_TV)` of one tile, weights applied."""
        logits_TV = self.spec.logits(hidden_TD, head_DV)
        reference_TV = None
        if rows.reference_hidden is not None:
            reference_TV = self.reference_spec.logits(rows.reference_hidden, reference_head)
        return jax.lax.platform_dependent(
            logits_TV,
            reference_TV,
            rows.replace(reference_hidden=None),
            cpu=functools.partial(self.tile_loss_blocked, with_grad),
            default=functools.partial(self.tile_loss, with_grad),
        )

    def tile_loss_blocked(self, with_grad: bool, logits_TV: Any, reference_TV: Any, rows: TokenRows) -> Any:
        """`tile_loss` of a few rows at a time, which stay in a CPU's caches; the gradient is written over the logits."""
        tile = logits_TV.shape[0]
        size = next(size for size in range(min(BLOCK_ROWS, tile), 0, -1) if tile % size == 0)
        cut = lambda x, index: jax.lax.dynamic_slice_in_dim(x, index * size, size)

        def one_block(index: Any, carry: Any) -> Any:
            sums, block_BV, tile_TV = carry
            known = jax.tree.map(lambda x: cut(x, index), (reference_TV, rows))
            of_block, dlogits_BV = self.tile_loss(with_grad, block_BV, *known)
            if with_grad:
                tile_TV = jax.lax.dynamic_update_slice_in_dim(tile_TV, dlogits_BV, index * size, axis=0)
            # The next block is read here, behind the write: read where it is used, it would make XLA copy the tile before each write.
            return jax.tree.map(jnp.add, sums, of_block), cut(tile_TV, index + 1), tile_TV

        sums, _ = zeros_like_result(functools.partial(self.tile_loss, False), logits_TV, reference_TV, rows)
        sums, _, tile_TV = jax.lax.fori_loop(0, tile // size, one_block, (sums, cut(logits_TV, 0), logits_TV))
        return sums, tile_TV if with_grad else None

    def tile_loss(self, with_grad: bool, logits_TV: Any, reference_TV: Any, rows: TokenRows) -> Any:
        """`tile_sums` of rows whose logits are there."""
        drawn_TG = rows.drawn
        if rows.uniform is not None:
            draw_TV = jax.vmap(lambda row: objectives.draw_logits(self.objective, row))(logits_TV)
            drawn_TG = jax.vmap(draw)(draw_TV, rows.uniform)

        token_rows = TokenInputs(
            ghost=rows.ghost,
            drawn=drawn_TG,
            weight=rows.weight,
            reference_logits=reference_TV,
            drawn_log_prob=rows.drawn_log_prob,
            advantage=rows.advantage,
            top_ids=rows.top_ids,
            top_log_probs=rows.top_log_probs,
        )
        one_token = lambda logits_V, row: self.one_token(logits_V, row, with_grad)
        values, dlogits_TV = jax.vmap(one_token)(logits_TV, token_rows)
        live_T = rows.weight != 0
        # A select and not only a product: what an objective makes of a skipped row, even NaN, must not reach the sums.
        weighted = jax.tree.map(lambda x: jnp.sum(jnp.where(live_T, rows.weight * x, 0.0)), values)
        if with_grad:
            dlogits_TV = jnp.where(live_T[:, None], rows.weight[:, None] * dlogits_TV, 0.0)
            dlogits_TV = self.spec.pull_back(logits_TV, dlogits_TV)
        return weighted, dlogits_TV

    def one_token(self, logits_V: Any, row: TokenInputs, with_grad: bool) -> Any:
        """`((loss, metrics), dlogits_V or None)` of one token: the mean over its drawn tokens, if there are any."""

        def evaluate(row: TokenInputs) -> Any:
            if with_grad:
                return objectives.value_and_grad(self.objective)(logits_V, row)
            return self.objective(logits_V, row), None

        if row.drawn is None:
            return evaluate(row)
        if row.drawn.shape == (1,):
            return evaluate(row.replace(drawn=row.drawn[0]))
        results = jax.vmap(lambda drawn: evaluate(row.replace(drawn=drawn)))(row.drawn)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), results)

    def zero_sums(self, tile: int, hidden_ND: Any, head_DV: Any, rows: TokenRows, reference_head: Any) -> Any:
        """Zeros in the shape of `tile_sums`'s first result."""

        def first_tile(hidden_ND: Any, head_DV: Any, rows: TokenRows, reference_head: Any) -> Any:
            rows_T = jax.tree.map(lambda x: x[:tile], rows)
            return self.tile_sums(hidden_ND[:tile], head_DV, rows_T, reference_head, False)[0]

        return zeros_like_result(first_tile, hidden_ND, head_DV, rows, reference_head)


def zeros_like_result(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shape of `function(*arguments)`, which is not computed."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))


def likeliest(logits_V: Float[Array, "V"]) -> Int[Array, ""]:
    """`argmax`, the first of equals (of NaNs, the last), as two reductions: XLA's CPU compiler vectorizes each, and `jnp.argmax` it does not."""
    id_V = jnp.arange(logits_V.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_V == jnp.max(logits_V), id_V, logits_V.shape[0] - 1))


def draw(logits_V: Float[Array, "V"], uniform_G: Float[Array, "G"]) -> Int[Array, "G"]:
    """Draws y ~ softmax(logits) by inverse CDF, one uniform number a token, in two levels.

    The unnormalised probabilities are summed in blocks; the block is found in the cumulative block sums, then the token in the
    cumulative sum of that block. One pass over the vocabulary, and the result depends only on the logits and the number.

    Args:
        logits_V: float32.
        uniform_G: in [0, 1).

    Returns:
        int32 token ids. A token whose probability underflows to 0 is never returned.
    """
    vocab = logits_V.shape[0]
    num_blocks = -(-vocab // DRAW_BLOCK)
    mass_V = jnp.exp(logits_V - jnp.max(logits_V))
    mass_blocks = jnp.pad(mass_V, (0, num_blocks * DRAW_BLOCK - vocab)).reshape(num_blocks, DRAW_BLOCK)
    block_sums = jnp.sum(mass_blocks, axis=1)
    block_G, rest_G = jax.vmap(invert, in_axes=(None, 0))(block_sums, uniform_G)
    token_G, _ = jax.vmap(invert)(mass_blocks[block_G], rest_G)
    return block_G * DRAW_BLOCK + token_G


def invert(mass_K: Float[Array, "K"], uniform: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The index k at which the cumulative mass passes `uniform * total`, and the uniform number left over inside k's share."""
    upper_K = jnp.cumsum(mass_K)
    target = uniform * upper_K[-1]
    # The last index with mass, so that a target rounded up to the total cannot fall off the end or onto mass 0.
    last = mass_K.shape[0] - 1 - jnp.argmax(mass_K[::-1] > 0)
    index = jnp.minimum(jnp.sum(upper_K <= target), last)
    share = mass_K[index]
    rest = (target - (upper_K[index] - share)) / share
    return index.astype(jnp.int32), jnp.clip(rest, 0.0, 1.0)
