"""Attention in blocks of queries, in plain XLA: what `cotgrpo.models.attention` computes, for whole sequences, with half the scores and none kept.

A block of queries reads the keys up to its own end, so of the masked upper half of the scores about 7/16 are never computed. The forward pass keeps
its result and one number a query, the log of the softmax's denominator; the backward pass makes each block's scores again from it (Dao et al. 2022,
arXiv:2205.14135). No array has all scores, or the mask of all of them.

Where the rule in `attention` compares positions, skipping compares places in the row as well. That is the same for documents that lie in one piece with
positions that count up, as packing writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cotgrpo.models.attention import MASKED, causal_segment_mask
from cotgrpo.models.config import SAVED_NAMES
from cotgrpo.sharding import axis_names, open_axes, partition_spec

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

KEY_LENGTH_BUCKETS = 8
"""Into how many lengths of keys a sequence is cut: the program has this many loops, and (LEVELS + 1) / (2 LEVELS) of all scores are computed."""
ROWS = 64
"""The least rows of a block, and what longer blocks are multiples of."""


def block_attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T Q H"]:
    """Causal grouped-query attention inside segments, `softmax(cap(q k^T * scale) + mask) v`; scores and softmax in float32.

    Args:
        query, key, value: any float type, heads and groups as in `attention`.
        positions, segment_ids: of queries and keys, as in `causal_segment_mask`.
        window: a query sees the keys less than this before it; None: all keys before it.
        scale: None: `1 / sqrt(H)`.
        softcap: as in `attention`.
    """
    B, T, Q, H = query.shape
    cut = BlockSchedule.of(B, T, Q, softcap)
    query = query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)
    padded = lambda x: jnp.pad(x, ((0, 0), (0, cut.length - T)) + ((0, 0),) * (x.ndim - 2))
    marks = (padded(positions), padded(segment_ids + 1) - 1, window)
    return attend(cut, *map(padded, (query, key, value)), marks)[:, :T]


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """How a sequence is cut: `levels` of (first row, rows of a block, number of blocks), in order. A block sees the keys up to its level's end."""

    length: int
    levels: tuple[tuple[int, int, int], ...]
    softcap: float | None = None

    @classmethod
    def of(cls, batch: int, length: int, heads: int, softcap: float | None) -> BlockSchedule:
        """Blocks whose scores take 4 MiB on a CPU, about what its caches hold, and 256 MiB elsewhere; not below ROWS rows.

        Queries that a mesh spreads by their place in the row are not cut: each device would need another's.
        """
        if partition_spec("BT", (batch, length))[1] is not None or length <= ROWS:
            return cls(length, ((0, length, 1),), softcap)
        sizes = open_axes()
        shards = math.prod(sizes[axis] for axis in axis_names(partition_spec("BTQH", (batch, length, heads, 1))))
        budget = 2**22 if jax.default_backend() == "cpu" else 2**28
        most = budget // (4 * batch * heads * length // shards)
        rows = max(ROWS, most // ROWS * ROWS)
        level = -(-length // KEY_LENGTH_BUCKETS)
        rows = min(rows, -(-level // ROWS) * ROWS)
        blocks = -(-level // rows)
        total = -(-length // rows)
        starts = range(0, total, blocks)
        return cls(total * rows, tuple((s * rows, rows, min(blocks, total - s)) for s in starts), softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(cut: BlockSchedule, query: Any, key: Any, value: Any, marks: Any) -> Any:
    """The blocks one after the other; `query` is scaled, and `marks` are positions, segments and the window."""
    return forward(cut, query, key, value, marks)[0]


def forward(cut: BlockSchedule, query: Any, key: Any, value: Any, marks: Any) -> Any:
    """The result, and what `backward` needs: it, the inputs, and the log of each query's sum of exponentials."""
    B, T, Q, H = query.shape
    K = key.shape[2]
    query_BKGTH, key_BKSH, value_BKSH = by_head(query, K), by_head(key), by_head(value)
    mixed, logs = [], []
    for start, rows, blocks in cut.levels:
        end = start + rows * blocks
        keys, values = key_BKSH[:, :, :end], value_BKSH[:, :, :end]

        def one_block(at: Any, keys: Any = keys, values: Any = values, rows: int = rows) -> Any:
            scores = block_scores(cut, part(query_BKGTH, at, rows), keys, marks, at, rows)[0]
            most = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - most)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            own = product("bkns,bksh->bknh", weights.astype(value.dtype), values)
            return groups(own / total, rows), groups(most + jnp.log(total), rows)

        own, log = each_block(one_block, start, rows, blocks)
        mixed.append(join(own))
        logs.append(join(log))
    mixed_BKGTH = jnp.concatenate(mixed, axis=3)
    mixed_BTQH = checkpoint_name(jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, Q, H).astype(value.dtype), SAVED_NAMES)
    log_BKGT1 = checkpoint_name(jnp.concatenate(logs, axis=3), SAVED_NAMES)
    return mixed_BTQH, (query, key, value, marks, mixed_BTQH, log_BKGT1)


def backward(cut: BlockSchedule, kept: Any, dmixed: Any) -> Any:
    """With w = softmax(s): `ds = w (dw - sum_s w dw)`, `dw = dmixed v^T`; from there the products' own gradients."""
    query, key, value, marks, mixed, log_BKGT1 = kept
    B, T, Q, H = query.shape
    K = key.shape[2]
    query_BKGTH, key_BKSH, value_BKSH, dmixed_BKGTH = (
        by_head(query, K),
        by_head(key),
        by_head(value),
        by_head(dmixed, K),
    )
    # d softmax needs sum_s weight_s dweight_s, which is the product of the result and its gradient.
    inner = jnp.sum(mixed.astype(jnp.float32) * dmixed.astype(jnp.float32), axis=-1)
    inner_BKGT1 = jnp.moveaxis(inner.reshape(B, T, K, Q // K), 1, 3)[..., None]
    dkey, dvalue = (jnp.zeros(x.shape, jnp.float32) for x in (key_BKSH, value_BKSH))
    dquery = []
    for start, rows, blocks in cut.levels:
        end = start + rows * blocks
        keys, values = key_BKSH[:, :, :end], value_BKSH[:, :, :end]

        def one_block(at: Any, sums: Any, keys: Any = keys, values: Any = values, rows: int = rows) -> Any:
            own_query, own_dmixed, own_log, own_inner = (
                part(x, at, rows) for x in (query_BKGTH, dmixed_BKGTH, log_BKGT1, inner_BKGT1)
            )
            scores, slope = block_scores(cut, own_query, keys, marks, at, rows)
            weights = jnp.exp(scores - own_log)
            dweights = product("bknh,bksh->bkns", own_dmixed, values)
            dscores = weights * (dweights - own_inner)
            if slope is not None:
                dscores = dscores * slope
            weights, dscores = weights.astype(value.dtype), dscores.astype(query.dtype)
            own = (product("bkns,bknh->bksh", dscores, own_query), product("bkns,bknh->bksh", weights, own_dmixed))
            return groups(product("bkns,bksh->bknh", dscores, keys), rows), jax.tree.map(jnp.add, sums, own)

        sums = dkey[:, :, :end], dvalue[:, :, :end]
        own, sums = each_block(one_block, start, rows, blocks, sums)
        dquery.append(join(own))
        dkey, dvalue = (
            jax.lax.dynamic_update_slice_in_dim(whole, new, 0, axis=2)
            for whole, new in zip((dkey, dvalue), sums, strict=True)
        )
    dquery_BTQH = jnp.moveaxis(jnp.concatenate(dquery, axis=3), 3, 1).reshape(B, T, Q, H)
    dkey_BTKH, dvalue_BTKH = jnp.swapaxes(dkey, 1, 2), jnp.swapaxes(dvalue, 1, 2)
    return (dquery_BTQH.astype(query.dtype), dkey_BTKH.astype(key.dtype), dvalue_BTKH.astype(value.dtype), None)


attend.defvjp(forward, backward)


def block_scores(cut: BlockSchedule, query_BKNH: Any, key_BKSH: Any, marks: Any, at: Any, rows: int) -> tuple[Any, Any]:
    """Capped and masked scores `[B, K, N, S]`, N queries of all groups, and the slope of the cap, or None without one."""
    positions, segment_ids, window = marks
    B, K = query_BKNH.shape[:2]
    reach = key_BKSH.shape[2]
    scores = product("bknh,bksh->bkns", query_BKNH, key_BKSH)
    slope = None
    if cut.softcap is not None:
        tanh = jnp.tanh(scores / cut.softcap)
        scores, slope = cut.softcap * tanh, 1.0 - jnp.square(tanh)
    own_positions, own_segments = (jax.lax.dynamic_slice_in_dim(x, at, rows, axis=1) for x in (positions, segment_ids))
    seen = causal_segment_mask(own_positions, own_segments, positions[:, :reach], segment_ids[:, :reach], window)
    return jnp.where(seen[:, None, None], scores.reshape(B, K, -1, rows, reach), MASKED).reshape(scores.shape), slope


def each_block(one_block: Any, start: int, rows: int, blocks: int, sums: Any = None) -> Any:
    """`one_block` at every block of a level: results stacked on a first axis, and the sums that it carries on, if it does."""
    if blocks == 1:
        result = one_block(start) if sums is None else one_block(start, sums)
        own, sums = (result, None) if sums is None else result
        own = jax.tree.map(lambda x: x[None], own)
        return own if sums is None else (own, sums)
    starts = start + rows * jnp.arange(blocks)
    if sums is None:
        return jax.lax.map(one_block, starts)
    sums, own = jax.lax.scan(lambda sums, at: one_block(at, sums)[::-1], sums, starts)
    return own, sums


def part(x_BKGTH: Any, at: Any, rows: int) -> Any:
    """A block of rows of all groups behind each other, `[B, K, G rows, H]`: one dimension, so that no product with it needs a transposed copy."""
    B, K, G, _, H = x_BKGTH.shape
    return jax.lax.dynamic_slice_in_dim(x_BKGTH, at, rows, axis=3).reshape(B, K, G * rows, H)


def groups(x_BKNH: Any, rows: int) -> Any:
    """The reverse of `part`, `[B, K, G, rows, H]`."""
    B, K, _, H = x_BKNH.shape
    return x_BKNH.reshape(B, K, -1, rows, H)


def join(blocks_NBKGTH: Any) -> Any:
    """Blocks of rows `[N, B, K, G, rows, H]` behind each other, `[B, K, G, N rows, H]`."""
    N, B, K, G, rows, H = blocks_NBKGTH.shape
    return jnp.moveaxis(blocks_NBKGTH, 0, 3).reshape(B, K, G, N * rows, H)


def by_head(x: Any, num_kv_heads: int | None = None) -> Any:
    """`[B, T, K, H]` as `[B, K, T, H]`; with `num_kv_heads`, `[B, T, Q, H]` as `[B, K, G, T, H]`."""
    if num_kv_heads is None:
        return jnp.swapaxes(x, 1, 2)
    B, T, Q, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, num_kv_heads, Q // num_kv_heads, H), 1, 3)


def product(letters: str, left: Any, right: Any) -> Any:
    """A matrix product with its sums in float32."""
    return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)
