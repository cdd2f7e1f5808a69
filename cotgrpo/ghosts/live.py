"""Ghost tokens at the student's own contexts: the choice of a frozen model after every prefix of the student's reply.

GRPO here is GhostRespond Policy Optimization, not Group Relative. A ghost reply that was written beforehand fits the
student's own reply only up to the first token that differs. After that, the token at the same index means nothing. A
*live* ghost is asked at each prefix. One forward pass of the frozen model over the student's reply asks it at all of
them. Two models can be asked, by the same function:

    teacher_model      another model with the same tokenizer, of any size. It reads the student's prompt and reply.
    privileged_self    the frozen student itself. It reads the ghost reply in its prompt, and then the student's reply.
                       So the text of a black-box teacher can guide the student's own prefixes.

A reply that ends too early or too late is corrected in the same way: the end is a token, and supervised like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cotgrpo.objectives import MASKED_LOGIT, draw, draw_uniform, likeliest, softmax
from cotgrpo.sampling import Prompts, Replies
from cotgrpo.tiled_loss import HeadSpec, map_live_tiles
from cotgrpo.token_shards import Shard
from cotgrpo.types import GhostBatch, Params, SftBatch, Student

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, Array, Bool, Float, Int, PRNGKeyArray, PyTree


def with_replies(prompts: Prompts, replies: Replies) -> SftBatch:
    """Return prompts and replies as contexts `[B, P + N]`, one a row, with the student's own next tokens as targets.

    Row b is its prompt, padded on the left to P columns, and its reply, padded on the right to N; padding is segment 0.
    The loss mask is 1 if the target is a token of the reply, its end included. So every row supervises
    `replies.lengths[b]` contexts.
    """
    P = prompts.tokens.shape[1]
    N = replies.tokens.shape[1]
    tokens_BT = jnp.concatenate([jnp.asarray(prompts.tokens), replies.tokens], axis=1)
    column_T = jnp.arange(P + N, dtype=jnp.int32)[None, :]
    first_B, end_B = P - jnp.asarray(prompts.lengths)[:, None], P + replies.lengths[:, None]
    real_BT = (column_T >= first_B) & (column_T < end_B)
    return SftBatch(
        tokens=tokens_BT,
        targets=jnp.roll(tokens_BT, -1, axis=1),
        positions=jnp.where(real_BT, column_T - first_B, 0),
        segment_ids=real_BT.astype(jnp.int32),
        loss_mask=((column_T >= P - 1) & (column_T < end_B - 1)).astype(jnp.float32),
    )


def live_ghosts(
    teacher: Student,
    params: Params,
    prompts: Prompts,
    replies: Replies,
    *,
    reads: Prompts | None = None,
    key: PRNGKeyArray | None = None,
    top_k: int = 0,
    rows: bool = False,
    tile_size: int | None = None,
) -> GhostBatch:
    """Return the student's replies with the ghost token at each of their prefixes.

        y*_t = argmax_v  q(v | reads, y_1 ... y_{t-1}),    or drawn from q

    Args:
        teacher: the frozen model q. Its `vocab_size` must not exceed the student's, so that every token it names is
            one of the student's.
        params: the teacher's parameters; no gradient reaches them.
        prompts: what the student read.
        replies: what the student wrote (`cotgrpo.sampling.make_sampler`).
        reads: what the teacher reads instead of `prompts`, a row for each reply, of any width; None: the same.
        key: draws each ghost token from the teacher's distribution; None: takes the likeliest, the first of equals.
        top_k: how many of the teacher's likeliest tokens come with their log-probabilities, for
            `cotgrpo.objectives.ForwardKl` and its kin; at most its vocabulary; 0: none.
        rows: whether the rows that the teacher's head reads come too. A step whose reference is the teacher takes them
            from the batch, for objectives with `top_k=None`, and does not run the teacher again.
        tile_size: rows whose logits exist at one time; None chooses.

    Returns:
        A batch `[B, P + N]` as `with_replies` lays it out. `drawn_tokens` are the student's own. With `top_k` its extra
        arrays are `top_ids` and `top_log_probs`, with `rows` float32 `reference_rows` `[B, T, D]`. All of them are 0 at
        contexts that are not supervised.
    """
    own = with_replies(prompts, replies)
    read = own if reads is None else with_replies(reads, replies)
    uniform_BT2 = None if key is None else draw_uniform(key, read.tokens.shape)

    def choose(logits_V: Float[Array, "V"], uniform: Float[Array, "2"] | None) -> tuple[Array, dict[str, Array]]:
        token = likeliest(logits_V) if uniform is None else draw(logits_V, uniform[None])[0]
        if not top_k:
            return token, {}
        top_K, ids_K = jax.lax.top_k(logits_V, top_k)
        return token, {"top_ids": ids_K, "top_log_probs": top_K - softmax(logits_V).log_z}

    fixed = jax.lax.stop_gradient(params)
    (ghost_BT, extra), read_BTD = map_contexts_and_rows(teacher, fixed, read, choose, uniform_BT2, tile_size=tile_size)
    if rows:
        supervised_BT1 = jnp.asarray(read.loss_mask)[..., None] != 0
        extra = extra | {"reference_rows": jnp.where(supervised_BT1, read_BTD, 0).astype(jnp.float32)}
    # In both batches the contexts are the last N + 1 columns but one: in a row of another width they only move.
    N = replies.tokens.shape[1]
    columns = ((0, 0), (own.tokens.shape[1] - N - 1, 0))
    move = lambda x: jnp.pad(x[:, -N - 1 :], (*columns, *((0, 0),) * (x.ndim - 2)))
    ghost_BT, extra = jax.tree.map(move, (ghost_BT, extra))
    return GhostBatch(
        tokens=own.tokens,
        ghost_tokens=ghost_BT,
        positions=own.positions,
        segment_ids=own.segment_ids,
        loss_mask=own.loss_mask,
        drawn_tokens=own.targets,
        extra=extra,
    )


def certain(batch: GhostBatch, top_k: int) -> GhostBatch:
    """Return a batch of text as the output of a teacher that puts all of q on the ghost token.

    It has the form of `live_ghosts(..., top_k=)`. `ForwardKl` of it is `Nll`.
    """
    shape = (*batch.ghost_tokens.shape, top_k)
    ids_BTK = jnp.broadcast_to(jnp.asarray(batch.ghost_tokens)[..., None], shape)
    log_probs_BTK = jnp.broadcast_to(jnp.where(jnp.arange(top_k) == 0, 0.0, MASKED_LOGIT), shape)
    return batch.replace(extra={**batch.extra, "top_ids": ids_BTK, "top_log_probs": log_probs_BTK})


def reply_rewards(student: Student, params: Params, ghosts: GhostBatch) -> Float[Array, "B T"]:
    """Return `R = log p(y*) - log p(y)` of every supervised context in nats, and 0 elsewhere.

    y is the token that follows the context. This is for logs; no step needs it.
    """
    reward = lambda logits_V, ids: logits_V[ids[0]] - logits_V[ids[1]]
    return map_contexts(student, params, ghosts, reward, (ghosts.ghost_tokens, own_targets(ghosts)))


def reweighted(
    student: Student,
    params: Params,
    ghosts: GhostBatch,
    log_probs: Float[Array, "B T"],
    own: Bool[Array, "B 1"],
    clip: float,
) -> GhostBatch:
    """Weight each context of an earlier student's replies by how much likelier it has become, within bounds.

        w_t = clip(prod_{s < t} p(y_s | c_s) / p_old(y_s | c_s), 1 - clip, 1 + clip)

    A context consists of the reply's tokens before it. So the ratio that turns the mean over the old student's contexts
    into that over the present one's is the product over those tokens. The token drawn at the context itself has no part
    in it. This takes one forward pass, without gradient. If the batch has `ghost_weights`, the weights go there, and
    not to the loss mask: a reward's likelihood ratio is its own weight.

    Args:
        student: the student.
        params: its present parameters.
        ghosts: the batch as it was made.
        log_probs: log p_old of the token that follows each context; 0 at contexts that are not supervised.
        own: which rows are the student's own replies; the others keep their weights.
        clip: in (0, 1).
    """
    log_prob = lambda logits_V, token: softmax(logits_V).log_prob(token)
    now_BT = map_contexts(student, jax.lax.stop_gradient(params), ghosts, log_prob, own_targets(ghosts))
    change_BT = jnp.where(jnp.asarray(ghosts.loss_mask) != 0, now_BT - log_probs.astype(now_BT.dtype), 0.0)
    before_BT = jnp.cumsum(change_BT, axis=1) - change_BT
    weight_BT = jnp.where(own, jnp.clip(jnp.exp(before_BT), 1 - clip, 1 + clip), 1.0)
    if "ghost_weights" in ghosts.extra:
        return ghosts.replace(extra={**ghosts.extra, "ghost_weights": ghosts.extra["ghost_weights"] * weight_BT})
    return ghosts.replace(loss_mask=ghosts.loss_mask * weight_BT)


def own_targets(batch: GhostBatch) -> Int[Array, "B T"]:
    """Return the token that follows each context of a row. That of the last column is meaningless and unsupervised."""
    return jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)


def map_contexts(
    student: Student,
    params: Params,
    batch: SftBatch | GhostBatch,
    function: Callable[[Float[Array, "V"], PyTree], PyTree],
    columns: PyTree,
    *,
    tile_size: int | None = None,
) -> PyTree:
    """Return `function(logits_V, columns[b, t])` at every supervised context, `[B, T, ...]`, and 0 elsewhere.

    The head runs over tiles of supervised contexts, as in `cotgrpo.tiled_loss`: no `[B, T, V]` array exists.

    Args:
        student: any model.
        params: its parameters.
        batch: contexts; those with a loss mask of 0 are skipped.
        function: of one row of logits and of one entry of `columns`; it returns a pytree of small arrays.
        columns: a pytree of `[B, T]` arrays, or None.
        tile_size: rows of logits at a time; None chooses.
    """
    return map_contexts_and_rows(student, params, batch, function, columns, tile_size=tile_size)[0]


def map_contexts_and_rows(
    student: Student,
    params: Params,
    batch: SftBatch | GhostBatch,
    function: Callable[[Float[Array, "V"], PyTree], PyTree],
    columns: PyTree,
    *,
    tile_size: int | None = None,
) -> tuple[PyTree, Float[AnyArray, "B T D"]]:
    """Return `map_contexts`, and the rows that the head reads."""
    spec = HeadSpec.of(student)

    def tile(
        rows: PyTree, head_DV: Float[Array, "D V"] | None, is_live_T: Bool[Array, "T"], shard: Shard
    ) -> tuple[None, PyTree]:
        hidden_TD, columns_T = rows
        values = jax.vmap(function)(spec.logits(hidden_TD, head_DV), columns_T)
        return None, jax.tree.map(lambda x: jnp.where(is_live_T.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), values)

    hidden_BTD = student.rows(params, batch.tokens, batch.positions, batch.segment_ids)
    head_DV = None if student.head is None else student.head(params)
    _, values = map_live_tiles(
        tile,
        (hidden_BTD, jax.tree.map(jnp.asarray, columns)),
        head_DV,
        jnp.asarray(batch.loss_mask) != 0,
        vocab_size=hidden_BTD.shape[-1] if head_DV is None else head_DV.shape[1],
        tile_size=tile_size,
    )
    return values, hidden_BTD
