"""Ghost tokens at the contexts that the student itself makes: what a frozen model says after every prefix of the student's own reply.

GRPO here is GhostRespond Policy Optimization, not Group Relative. A ghost reply written beforehand fits the student's own reply only up to the first
token in which they differ; what stands at the same index behind that means nothing. A *live* ghost is asked at each prefix, and one forward
pass of the frozen model over the student's reply asks it at all of them. Two models can be asked, by the same function:

    teacher_model      another model with the same tokenizer, any size: it reads the student's prompt and reply
    privileged_self    the frozen student itself, which reads the ghost reply in its prompt, and behind that the student's reply: how the text of a
                       teacher that can only be asked for text guides the student's own prefixes

A reply that ends too early or goes on too long is corrected in the same way: the end is a token, and supervised like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from cotgrpo.objectives import MASKED_LOGIT, softmax
from cotgrpo.sampling import Prompts, Replies
from cotgrpo.sharding import axis_names, constrain, partition_spec
from cotgrpo.tiled_loss import HeadSpec, default_tile_size, draw, likeliest
from cotgrpo.types import GhostBatch, Params, SftBatch, Student

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int


def with_replies(prompts: Prompts, replies: Replies) -> SftBatch:
    """The student's prompts and replies as contexts `[B, P + N]`, one a row: the target of each is the student's own next token.

    Row b is its prompt, padded on the left to P columns, and its reply, padded on the right to N; padding is segment 0. The loss mask is 1 where the
    target is a token of the reply, its end included, so every row supervises `replies.lengths[b]` contexts.
    """
    P = prompts.tokens.shape[1]
    N = replies.tokens.shape[1]
    tokens_BT = jnp.concatenate([jnp.asarray(prompts.tokens), replies.tokens], axis=1)
    column_T = jnp.arange(P + N)[None, :]
    first_B, behind_B = P - jnp.asarray(prompts.lengths)[:, None], P + replies.lengths[:, None]
    real_BT = (column_T >= first_B) & (column_T < behind_B)
    return SftBatch(
        tokens=tokens_BT,
        targets=jnp.roll(tokens_BT, -1, axis=1),
        positions=jnp.where(real_BT, column_T - first_B, 0),
        segment_ids=real_BT.astype(jnp.int32),
        loss_mask=((column_T >= P - 1) & (column_T < behind_B - 1)).astype(jnp.float32),
    )


def live_ghosts(
    teacher: Student,
    params: Params,
    prompts: Prompts,
    replies: Replies,
    *,
    reads: Prompts | None = None,
    key: Any = None,
    top_k: int = 0,
    tile_size: int | None = None,
) -> GhostBatch:
    """The student's replies with the ghost token at each of their prefixes.

        y*_t = argmax_v  q(v | reads, y_1 ... y_{t-1}),    or drawn from q

    Args:
        teacher: the frozen model q; its `vocab_size` must not exceed the student's, so that it names no token that the student lacks.
        params: the teacher's parameters; no gradient reaches them.
        prompts: what the student read.
        replies: what the student wrote (`cotgrpo.sampling.decode_loop.make_sampler`).
        reads: what the teacher reads instead of `prompts`, a row for each reply, of any width; None: the same.
        key: draws each ghost token from the teacher's distribution; None: takes the likeliest, the first of equals.
        top_k: this many of the teacher's likeliest tokens come with their log-probabilities (`cotgrpo.objectives.divergences.ForwardKl`), at most its vocabulary; 0: none.
        tile_size: rows whose logits exist at one time; None chooses.

    Returns:
        A batch `[B, P + N]` as `with_replies` lays it out, `drawn_tokens` being the student's own. Ghost and top tokens are 0 where nothing is supervised.
    """
    own = with_replies(prompts, replies)
    read = own if reads is None else with_replies(reads, replies)
    uniform_BT = None if key is None else jax.random.uniform(key, read.tokens.shape)

    def choose(logits_V: Any, uniform: Any) -> Any:
        token = likeliest(logits_V) if uniform is None else draw(logits_V, uniform[None])[0]
        if not top_k:
            return token, None, None
        top_K, ids_K = jax.lax.top_k(logits_V, top_k)
        return token, ids_K, top_K - softmax(logits_V).log_z

    said = map_contexts(teacher, jax.lax.stop_gradient(params), read, choose, uniform_BT, tile_size=tile_size)
    # The contexts are the last N + 1 columns but one in both: in a row of another width they are moved, never reordered.
    N = replies.tokens.shape[1]
    columns = ((0, 0), (own.tokens.shape[1] - N - 1, 0))
    moved = lambda x: jnp.pad(x[:, -N - 1 :], (*columns, *((0, 0),) * (x.ndim - 2)))
    ghost_BT, ids_BTK, log_probs_BTK = jax.tree.map(moved, said)
    return GhostBatch(
        tokens=own.tokens,
        ghost_tokens=ghost_BT,
        positions=own.positions,
        segment_ids=own.segment_ids,
        loss_mask=own.loss_mask,
        drawn_tokens=own.targets,
        top_ids=ids_BTK,
        top_log_probs=log_probs_BTK,
    )


def certain(batch: GhostBatch, top_k: int) -> GhostBatch:
    """Text as the word of a teacher that is sure of it: all of q is on the ghost token, in the form of `live_ghosts(..., top_k=)`. `ForwardKl` of it is `Nll`."""
    shape = (*batch.ghost_tokens.shape, top_k)
    ids_BTK = jnp.broadcast_to(jnp.asarray(batch.ghost_tokens)[..., None], shape)
    log_probs_BTK = jnp.broadcast_to(jnp.where(jnp.arange(top_k) == 0, 0.0, MASKED_LOGIT), shape)
    return batch.replace(top_ids=ids_BTK, top_log_probs=log_probs_BTK)


def reply_rewards(student: Student, params: Params, ghosts: GhostBatch) -> Float[Array, "B T"]:
    """`R = log p(y*) - log p(y)` of every supervised context, y being the token that stands behind it, in nats; 0 elsewhere. For logs: no step needs it."""
    reward = lambda logits_V, ids: logits_V[ids[0]] - logits_V[ids[1]]
    rewards_BT: Any = map_contexts(student, params, ghosts, reward, (ghosts.ghost_tokens, own_targets(ghosts)))
    return rewards_BT


def reweighted(
    student: Student,
    params: Params,
    ghosts: GhostBatch,
    log_probs: Float[Array, "B T"],
    own: Bool[Array, "B 1"],
    clip: float,
) -> GhostBatch:
    """Replies of an earlier student for the present one: each context weighted by how much likelier it has become, within bounds.

        w_t = clip(prod_{s < t} p(y_s | c_s) / p_old(y_s | c_s), 1 - clip, 1 + clip)

    A context is the reply's tokens before it, so the ratio that turns the mean over the old student's contexts into that over the present one's is the product
    over those tokens; the token drawn at the context itself has no part in it. One forward pass, no gradient.

    Args:
        student: the student.
        params: its present parameters.
        ghosts: the batch as it was made.
        log_probs: log p_old of the token behind each context; 0 where nothing is supervised.
        own: which rows are the student's own replies; the others keep their weights.
        clip: in (0, 1).
    """
    log_prob = lambda logits_V, token: softmax(logits_V).log_prob(token)
    now_BT = map_contexts(student, jax.lax.stop_gradient(params), ghosts, log_prob, own_targets(ghosts))
    change_BT = jnp.where(jnp.asarray(ghosts.loss_mask) != 0, now_BT - log_probs, 0.0)
    before_BT = jnp.cumsum(change_BT, axis=1) - change_BT
    weight_BT = jnp.where(own, jnp.clip(jnp.exp(before_BT), 1 - clip, 1 + clip), 1.0)
    return ghosts.replace(loss_mask=ghosts.loss_mask * weight_BT)


def own_targets(batch: GhostBatch) -> Int[Array, "B T"]:
    """The token that stands behind each context of a row (the last column's is meaningless, and supervised nowhere)."""
    return jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)


def map_contexts(
    student: Student,
    params: Params,
    batch: SftBatch | GhostBatch,
    function: Callable[[Any, Any], Any],
    columns: Any,
    *,
    tile_size: int | None = None,
) -> Any:
    """`function(logits_V, columns[b, t])` at every supervised context, `[B, T, ...]`; 0 elsewhere.

    As in the token engine, supervised contexts come first and the loop over tiles ends behind them: the head costs what the replies cost, and no
    `[B, T, V]` array exists. On a mesh every shard of the batch walks over its own.

    Args:
        student: any model.
        params: its parameters.
        batch: contexts; those with a loss mask of 0 are skipped.
        function: of one row of logits and of one entry of `columns`; a pytree of small arrays.
        columns: a pytree of `[B, T]` arrays, or None.
        tile_size: rows of logits at a time; None chooses.
    """
    hidden_BTD = student.hidden(params, batch.tokens, batch.positions, batch.segment_ids)
    head_DV = None if student.head is None else constrain(student.head(params), "DV")
    live_BT, columns = jax.tree.map(jnp.asarray, (batch.loss_mask, columns))
    walk = functools.partial(map_live, HeadSpec(student.softcap, student.vocab_size), function, tile_size)
    rows = partition_spec("BT", batch.tokens.shape)
    shards, whole = axis_names(rows), jax.sharding.PartitionSpec()
    if not shards:
        return walk(shards, hidden_BTD, head_DV, live_BT != 0, columns)
    return jax.shard_map(
        functools.partial(walk, shards),
        in_specs=(rows, whole, rows, rows),
        out_specs=rows,
        axis_names=set(shards),
        check_vma=False,
    )(hidden_BTD, head_DV, live_BT != 0, columns)


def map_live(
    spec: HeadSpec,
    function: Callable[[Any, Any], Any],
    tile_size: int | None,
    shards: tuple[str, ...],
    hidden_BTD: Any,
    head_DV: Any,
    live_BT: Any,
    columns: Any,
) -> Any:
    """`map_contexts` on the contexts of one of the shards over some mesh axes, those of `live_BT`."""
    flat = lambda x: jnp.reshape(x, (live_BT.size, *x.shape[2:]))
    hidden_ND, live_N, columns_N = jax.tree.map(flat, (hidden_BTD, live_BT, columns))
    num_tokens, width = hidden_ND.shape
    tile = min(tile_size or default_tile_size(num_tokens, width if head_DV is None else head_DV.shape[1]), num_tokens)
    num_tiles = -(-num_tokens // tile)
    order_N = jnp.argsort(~live_N, stable=True)
    order = jnp.pad(order_N, (0, num_tiles * tile - num_tokens))

    def of_tile(picked_T: Any) -> Any:
        logits_TV = spec.logits(hidden_ND[picked_T], head_DV)
        return jax.vmap(function)(logits_TV, jax.tree.map(lambda x: x[picked_T], columns_N))

    def one_tile(index: Any, values: Any) -> Any:
        picked_T = jax.lax.dynamic_slice_in_dim(order, index * tile, tile)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index * tile, axis=0)
        return jax.tree.map(put, values, of_tile(picked_T))

    like = jax.eval_shape(of_tile, order[:tile])
    values = jax.tree.map(lambda x: jnp.zeros((num_tiles * tile, *x.shape[1:]), x.dtype), like)
    live_tiles = (jnp.sum(live_N) + tile - 1) // tile
    if shards:
        # A loop with collectives in it, those of the tensor axis, has to be as long on every device.
        live_tiles = jax.lax.pmax(live_tiles, shards)
    values = jax.lax.fori_loop(0, live_tiles, one_tile, values)
    place_N = jnp.argsort(order_N)

    def in_place(x: Any) -> Any:
        rows = jnp.where(live_N.reshape(-1, *(1,) * (x.ndim - 1)), x[place_N], 0)
        return rows.reshape(*live_BT.shape, *x.shape[1:])

    return jax.tree.map(in_place, values)
