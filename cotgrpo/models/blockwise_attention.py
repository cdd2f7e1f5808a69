"""Blockwise attention for training, in plain XLA, with its own gradient.

It computes what `cotgrpo.models.attention` computes for whole sequences, in blocks of queries. A block reads the keys
up to its own end, so about 7/16 of the scores, most of the masked half, are never computed. The forward pass keeps its
result and one number per query: the log of the softmax's denominator. The backward pass recomputes each block's scores
from it (Dao et al. 2022, arXiv:2205.14135). No array holds all scores or the whole mask.

The rule of `cotgrpo.models.attention` compares positions. Skipping also compares places in the row. Both agree if every
document is contiguous and its positions count up, as in packed rows.

Dimensions besides those of `cotgrpo.types`: G = Q / K query heads share a key/value head, and N = G * rows are the
queries of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cotgrpo.models.attention import MASKED, causal_segment_mask
from cotgrpo.models.config import ATTENTION_RESULT
from cotgrpo.sharding import axes_size, axis_names, partition_spec, vary_alike

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int, PyTree

KEY_LENGTH_BUCKETS = 8
"""Number of key lengths a sequence is split into. Each is one loop of the program.

With n buckets, `(n + 1) / (2 n)` of all scores are computed.
"""
ROWS = 64
"""Least rows of a block. Longer blocks are multiples of it."""


def block_attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "Q"] | None = None,
) -> Float[Array, "B T Q H"]:
    """Return `softmax(cap(q k^T * scale) + mask) v`: causal grouped-query attention inside segments.

    Scores and softmax are float32.

    Args:
        query, key, value: any float type. Heads and groups are those of `attention`.
        positions, segment_ids: of queries and keys, as in `causal_segment_mask`.
        window: a query sees keys at most `window - 1` positions before it. None: all keys before it.
        scale: None: `1 / sqrt(H)`.
        softcap, sinks: as in `attention`.
    """
    B, T, Q, H = query.shape
    schedule = BlockSchedule.of(B, T, Q, softcap)
    query = query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, schedule.length - T)) + ((0, 0),) * (x.ndim - 2))
    visibility = Visibility(pad(positions), pad(segment_ids + 1) - 1, window)
    return attend(schedule, *vary_alike(*map(pad, (query, key, value)), visibility, sinks))[:, :T]


class Bucket(NamedTuple):
    """Consecutive blocks that read the same keys: all keys before the bucket's end.

    Attributes:
        start: first row.
        rows: rows of each block.
        blocks: number of blocks.
    """

    start: int
    rows: int
    blocks: int

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.start + self.rows * self.blocks


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """How a sequence is split into blocks.

    Attributes:
        length: rows of the padded sequence.
        buckets: in order, covering the sequence.
        softcap: as in `attention`.
    """

    length: int
    buckets: tuple[Bucket, ...]
    softcap: float | None = None

    @classmethod
    def of(cls, batch: int, length: int, heads: int, softcap: float | None) -> BlockSchedule:
        """Choose blocks whose scores take 4 MiB on a CPU, about the size of its caches, and 256 MiB elsewhere.

        A block has at least ROWS rows. Sequences whose tokens are sharded are one block: the queries of a block would
        lie on one device.
        """
        if partition_spec("BT", (batch, length))[1] is not None or length <= ROWS:
            return cls(length, (Bucket(0, length, 1),), softcap)
        shards = axes_size(axis_names(partition_spec("BTQH", (batch, length, heads, 1))))
        budget = 2**22 if jax.default_backend() == "cpu" else 2**28
        most = budget // (4 * batch * heads * length // shards)
        rows = max(ROWS, most // ROWS * ROWS)
        bucket = -(-length // KEY_LENGTH_BUCKETS)
        rows = min(rows, -(-bucket // ROWS) * ROWS)
        blocks = -(-bucket // rows)
        total = -(-length // rows)
        starts = range(0, total, blocks)
        return cls(total * rows, tuple(Bucket(s * rows, rows, min(blocks, total - s)) for s in starts), softcap)


class Visibility(flax.struct.PyTreeNode):
    """What decides which keys a query sees, as in `causal_segment_mask`."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    window: Int[Array, ""] | int | None


class Residuals(flax.struct.PyTreeNode):
    """What the backward pass reads: the inputs, the result, and the log of each query's sum of exponentials.

    That sum has the sink's.
    """

    query: Float[Array, "B T Q H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]
    visibility: Visibility
    sinks: Float[Array, "Q"] | None
    mixed: Float[Array, "B T Q H"]
    log_sum_BKGT1: Float[Array, "B K G T 1"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    schedule: BlockSchedule,
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    visibility: Visibility,
    sinks: Float[Array, "Q"] | None,
) -> Float[Array, "B T Q H"]:
    """Return the attention of all blocks, bucket by bucket. `query` is scaled already."""
    return attend_forward(schedule, query, key, value, visibility, sinks)[0]


def attend_forward(
    schedule: BlockSchedule,
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    visibility: Visibility,
    sinks: Float[Array, "Q"] | None,
) -> tuple[Float[Array, "B T Q H"], Residuals]:
    """Return the result of `attend` and what its gradient needs."""
    B, T, Q, H = query.shape
    by_head = None if sinks is None else sinks.astype(jnp.float32).reshape(1, key.shape[2], -1, 1, 1)
    query_BKGTH, key_BKSH, value_BKSH = group_heads(query, key.shape[2]), heads_first(key), heads_first(value)
    mixed, logs = [], []
    for bucket in schedule.buckets:
        keys, values = key_BKSH[:, :, : bucket.end], value_BKSH[:, :, : bucket.end]
        own_mixed, own_logs = bucket_forward(schedule.softcap, bucket, query_BKGTH, keys, values, visibility, by_head)
        mixed.append(own_mixed)
        logs.append(own_logs)
    mixed_BKGTH = jnp.concatenate(mixed, axis=3)
    mixed_BTQH = jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, Q, H).astype(value.dtype)
    mixed_BTQH = checkpoint_name(mixed_BTQH, ATTENTION_RESULT)
    log_sum_BKGT1 = checkpoint_name(jnp.concatenate(logs, axis=3), ATTENTION_RESULT)
    return mixed_BTQH, Residuals(query, key, value, visibility, sinks, mixed_BTQH, log_sum_BKGT1)


def bucket_forward(
    softcap: float | None,
    bucket: Bucket,
    query_BKGTH: Float[Array, "B K G T H"],
    key_BKSH: Float[Array, "B K S H"],
    value_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    sinks: Float[Array, "1 K G 1 1"] | None,
) -> tuple[Float[Array, "B K G rows H"], Float[Array, "B K G rows 1"]]:
    """Return the attention and the log-sums of a bucket's rows, in float32. Keys and values end with the bucket."""

    def one_block(carry: tuple[()], start: int | Int[Array, ""]) -> tuple[tuple[()], tuple[Array, Array]]:
        query_BKNH = take_rows(query_BKGTH, start, bucket.rows)
        scores, _ = block_scores(softcap, query_BKNH, key_BKSH, visibility, start, bucket.rows)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            own_sinks = jnp.repeat(sinks[..., 0, 0], bucket.rows, axis=2)[..., None]  # of the queries in their order
            highest = jnp.maximum(highest, own_sinks)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(own_sinks - highest)
        mixed = einsum_f32("bkns,bksh->bknh", weights.astype(value_BKSH.dtype), value_BKSH)
        return carry, (
            split_groups(mixed / total, bucket.rows),
            split_groups(highest + jnp.log(total), bucket.rows),
        )

    _, (mixed, logs) = scan_blocks(bucket, one_block, ())
    return join_blocks(mixed), join_blocks(logs)


def attend_backward(
    schedule: BlockSchedule, saved: Residuals, dmixed: Float[Array, "B T Q H"]
) -> tuple[Float[Array, "B T Q H"], Float[Array, "B T K H"], Float[Array, "B T K H"], None, Float[Array, "Q"] | None]:
    """Return the gradients of query, key, value and sinks; `visibility` has none.

    With weights `w = softmax(s)`: `dw = dmixed v^T` and `ds = w (dw - sum_s w dw)`. The rest are gradients of products.
    The value of a sink is 0, so its own dw is 0.
    """
    query, key, value = saved.query, saved.key, saved.value
    B, T, Q, H = query.shape
    K = key.shape[2]
    # The softmax's gradient needs sum_s w dw, which equals the inner product of the result and its gradient.
    inner = jnp.sum(saved.mixed.astype(jnp.float32) * dmixed.astype(jnp.float32), axis=-1)
    rows = QueryRows(
        query=group_heads(query, K),
        dmixed=group_heads(dmixed, K),
        log_sum=saved.log_sum_BKGT1,
        inner=jnp.moveaxis(inner.reshape(B, T, K, Q // K), 1, 3)[..., None],
    )
    key_BKSH, value_BKSH = heads_first(key), heads_first(value)
    dkey, dvalue, _ = vary_alike(*(jnp.zeros(x.shape, jnp.float32) for x in (key_BKSH, value_BKSH)), key)
    dquery = []
    for bucket in schedule.buckets:
        keys, values, own_dkey, own_dvalue = (x[:, :, : bucket.end] for x in (key_BKSH, value_BKSH, dkey, dvalue))
        own_dquery, own_dkey, own_dvalue = bucket_backward(
            schedule.softcap, bucket, rows, keys, values, saved.visibility, (own_dkey, own_dvalue)
        )
        dquery.append(own_dquery)
        dkey, dvalue = (
            jax.lax.dynamic_update_slice_in_dim(whole, new, 0, axis=2)
            for whole, new in ((dkey, own_dkey), (dvalue, own_dvalue))
        )
    dquery_BTQH = jnp.moveaxis(jnp.concatenate(dquery, axis=3), 3, 1).reshape(B, T, Q, H)
    dkey_BTKH, dvalue_BTKH = jnp.swapaxes(dkey, 1, 2), jnp.swapaxes(dvalue, 1, 2)
    return (
        dquery_BTQH.astype(query.dtype),
        dkey_BTKH.astype(key.dtype),
        dvalue_BTKH.astype(value.dtype),
        None,
        None if saved.sinks is None else sinks_gradient(saved.sinks, rows),
    )


def sinks_gradient(sinks: Float[Array, "Q"], rows: QueryRows) -> Float[Array, "Q"]:
    """Return the gradient of the sinks, summed over all queries of each head."""
    scores = sinks.astype(jnp.float32).reshape(1, *rows.log_sum.shape[1:3], 1, 1)
    return jnp.sum(-jnp.exp(scores - rows.log_sum) * rows.inner, axis=(0, 3, 4)).reshape(-1).astype(sinks.dtype)


class QueryRows(flax.struct.PyTreeNode):
    """What the backward pass reads of every query.

    Attributes:
        query: scaled.
        dmixed: the gradient of the result.
        log_sum: the log of the sum of exponentials.
        inner: `sum_h mixed_h dmixed_h`.
    """

    query: Float[Array, "B K G T H"]
    dmixed: Float[Array, "B K G T H"]
    log_sum: Float[Array, "B K G T 1"]
    inner: Float[Array, "B K G T 1"]


def bucket_backward(
    softcap: float | None,
    bucket: Bucket,
    rows: QueryRows,
    key_BKSH: Float[Array, "B K S H"],
    value_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    sums: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
) -> tuple[Float[Array, "B K G rows H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Return the gradient of a bucket's queries, and `sums`, the gradients of keys and values, with its part added."""

    def one_block(sums: tuple[Array, Array], start: int | Int[Array, ""]) -> tuple[tuple[Array, Array], Array]:
        own = jax.tree.map(lambda x: take_rows(x, start, bucket.rows), rows)
        scores, slope = block_scores(softcap, own.query, key_BKSH, visibility, start, bucket.rows)
        weights = jnp.exp(scores - own.log_sum)
        dweights = einsum_f32("bknh,bksh->bkns", own.dmixed, value_BKSH)
        dscores = weights * (dweights - own.inner)
        if slope is not None:
            dscores = dscores * slope
        weights, dscores = weights.astype(value_BKSH.dtype), dscores.astype(own.query.dtype)
        dkey = einsum_f32("bkns,bknh->bksh", dscores, own.query)
        dvalue = einsum_f32("bkns,bknh->bksh", weights, own.dmixed)
        dquery = einsum_f32("bkns,bksh->bknh", dscores, key_BKSH)
        return (sums[0] + dkey, sums[1] + dvalue), split_groups(dquery, bucket.rows)

    (dkey, dvalue), dquery = scan_blocks(bucket, one_block, sums)
    return join_blocks(dquery), dkey, dvalue


attend.defvjp(attend_forward, attend_backward)


def block_scores(
    softcap: float | None,
    query_BKNH: Float[Array, "B K N H"],
    key_BKSH: Float[Array, "B K S H"],
    visibility: Visibility,
    start: int | Int[Array, ""],
    rows: int,
) -> tuple[Float[Array, "B K N S"], Float[Array, "B K N S"] | None]:
    """Return the capped and masked scores of a block, and the slope of the cap (None without a cap)."""
    B, K, S = query_BKNH.shape[0], query_BKNH.shape[1], key_BKSH.shape[2]
    scores = einsum_f32("bknh,bksh->bkns", query_BKNH, key_BKSH)
    slope = None
    if softcap is not None:
        tanh = jnp.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1.0 - jnp.square(tanh)
    positions, segment_ids = visibility.positions, visibility.segment_ids
    own_positions, own_segments = (
        jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1) for x in (positions, segment_ids)
    )
    seen = causal_segment_mask(own_positions, own_segments, positions[:, :S], segment_ids[:, :S], visibility.window)
    return jnp.where(seen[:, None, None], scores.reshape(B, K, -1, rows, S), MASKED).reshape(scores.shape), slope


def scan_blocks(
    bucket: Bucket, one_block: Callable[[PyTree, int | Int[Array, ""]], tuple[PyTree, PyTree]], carry: PyTree
) -> tuple[PyTree, PyTree]:
    """Scan `one_block(carry, start) -> (carry, result)` over a bucket: the last carry and the stacked results."""
    if bucket.blocks == 1:
        carry, result = one_block(carry, bucket.start)
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(one_block, carry, bucket.start + bucket.rows * jnp.arange(bucket.blocks))


def take_rows(x_BKGTH: Float[Array, "B K G T H"], start: int | Int[Array, ""], rows: int) -> Float[Array, "B K N H"]:
    """Return a block of rows, all groups in one dimension, so that products with it need no transposed copy."""
    B, K, G, _, H = x_BKGTH.shape
    return jax.lax.dynamic_slice_in_dim(x_BKGTH, start, rows, axis=3).reshape(B, K, G * rows, H)


def split_groups(x_BKNH: Float[Array, "B K N H"], rows: int) -> Float[Array, "B K G rows H"]:
    """Undo the flattening of `take_rows`."""
    B, K, _, H = x_BKNH.shape
    return x_BKNH.reshape(B, K, -1, rows, H)


def join_blocks(blocks: Float[Array, "blocks B K G rows H"]) -> Float[Array, "B K G T H"]:
    """Concatenate stacked blocks along their rows."""
    count, B, K, G, rows, H = blocks.shape
    return jnp.moveaxis(blocks, 0, 3).reshape(B, K, G, count * rows, H)


def heads_first(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    """Swap tokens and heads."""
    return jnp.swapaxes(x, 1, 2)


def group_heads(x: Float[Array, "B T Q H"], num_kv_heads: int) -> Float[Array, "B K G T H"]:
    """Group query heads by the key/value head they read."""
    B, T, Q, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, num_kv_heads, Q // num_kv_heads, H), 1, 3)


def einsum_f32(subscripts: str, left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return a matrix product with float32 sums."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)
