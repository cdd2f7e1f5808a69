"""The gated delta rule, a linear recurrence in place of attention (Yang et al. 2024, arXiv:2412.06464).

Each head keeps a matrix `S` from keys to values. Token t forgets a part of it and corrects what it answers to its key:

    S_t = exp(g_t) S_(t-1) + k_t (b_t (v_t - exp(g_t) S_(t-1)^T k_t))^T          o_t = S_t^T q_t

with `g_t <= 0` and `0 <= b_t <= 1`. `chunked_delta_rule` computes it with matrix products over chunks of tokens, and
`delta_rule_steps` token by token. All sums are in float32. The state is zero at the first token of a segment. Padding,
which is segment 0, leaves it as it is.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int

CHUNK = 64
"""Tokens of a chunk."""

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
"""Products in float32 on every device. The defaults of TPUs and GPUs round their factors."""


class DeltaTokens(NamedTuple):
    """What the delta rule reads of each token. Key head n serves R value heads.

    Attributes:
        query, key: `[B, T, K, A]`.
        value: `[B, T, K, R, E]`.
        log_decay: `[B, T, K, R]`, g, not above 0.
        strength: `[B, T, K, R]`, b, from 0 to 1.
    """

    query: Float[Array, "B T K A"]
    key: Float[Array, "B T K A"]
    value: Float[Array, "B T K R E"]
    log_decay: Float[Array, "B T K R"]
    strength: Float[Array, "B T K R"]


class DeltaState(NamedTuple):
    """What the tokens read so far leave behind.

    Attributes:
        memory: float32 `[B, K, R, A, E]`, S.
        segment_ids: int32 `[B]`, the segment of the last token. 0: there was none.
    """

    memory: Float[Array, "B K R A E"]
    segment_ids: Int[Array, "B"]

    @classmethod
    def empty(cls, tokens: DeltaTokens) -> DeltaState:
        """Return the state before the first token."""
        B, _, K, R, E = tokens.value.shape
        return cls(jnp.zeros((B, K, R, tokens.key.shape[-1], E), jnp.float32), jnp.zeros((B,), jnp.int32))


def without_padding(tokens: DeltaTokens, segment_ids: Int[Array, "B T"]) -> DeltaTokens:
    """Return the tokens in float32. Padding forgets nothing and writes nothing."""
    tokens = DeltaTokens(*(x.astype(jnp.float32) for x in tokens))
    real = (segment_ids > 0)[:, :, None, None]
    return tokens._replace(log_decay=jnp.where(real, tokens.log_decay, 0), strength=jnp.where(real, tokens.strength, 0))


def segment_starts(segment_ids: Int[Array, "B T"], last: Int[Array, "B"]) -> tuple[Bool[Array, "B T"], Int[Array, "B"]]:
    """Return which tokens begin another segment than that of the token before them, and the last token's segment.

    Padding is skipped: it begins none, and the token after it is compared with the one before it.
    """
    real = segment_ids > 0
    index = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), -1), axis=1)  # of the last token up to here
    seen = jnp.where(index < 0, last[:, None], jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1))
    before = jnp.concatenate([last[:, None], seen[:, :-1]], axis=1)
    return real & (segment_ids != before), seen[:, -1]


def delta_rule_steps(
    tokens: DeltaTokens, segment_ids: Int[Array, "B T"], state: DeltaState | None = None
) -> tuple[Float[Array, "B T K R E"], DeltaState]:
    """Return the outputs in float32 and the state after the last token, computed token by token."""
    state = DeltaState.empty(tokens) if state is None else state
    starts, last = segment_starts(segment_ids, state.segment_ids)
    tokens = without_padding(tokens, segment_ids)

    def step(
        memory: Float[Array, "B K R A E"], now: tuple[DeltaTokens, Bool[Array, "B"]]
    ) -> tuple[Float[Array, "B K R A E"], Float[Array, "B K R E"]]:
        (query, key, value, log_decay, strength), start = now
        memory = jnp.where(start[:, None, None, None, None], 0, memory * jnp.exp(log_decay)[..., None, None])
        error = strength[..., None] * (value - einsum("bkrae,bka->bkre", memory, key))
        memory += einsum("bka,bkre->bkrae", key, error)
        return memory, einsum("bkrae,bka->bkre", memory, query)

    if len(starts[0]) == 1:
        memory, out = step(state.memory, (DeltaTokens(*(x[:, 0] for x in tokens)), starts[:, 0]))
        return out[:, None], DeltaState(memory, last)
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, starts))
    memory, out = jax.lax.scan(step, state.memory, by_time)
    return jnp.moveaxis(out, 0, 1), DeltaState(memory, last)


def chunked_delta_rule(
    tokens: DeltaTokens, segment_ids: Int[Array, "B T"], state: DeltaState | None = None, chunk: int = CHUNK
) -> tuple[Float[Array, "B T K R E"], DeltaState]:
    """Return what `delta_rule_steps` does, with matrix products over chunks of tokens.

    The backward pass keeps one state per chunk and computes the rest of a chunk again.
    """
    state = DeltaState.empty(tokens) if state is None else state
    starts, last = segment_starts(segment_ids, state.segment_ids)
    tokens, T = without_padding(tokens, segment_ids), segment_ids.shape[1]
    chunk = min(chunk, T)
    padding = -T % chunk
    # The number of segments begun so far tells whether two tokens, or a token and the state, lie in one segment.
    begun = jnp.cumsum(starts, axis=1, dtype=jnp.int32)

    def chunks(x: Array, mode: str = "constant") -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    begun = chunks(begun, "edge")
    before = jnp.concatenate([jnp.zeros_like(begun[:1, :, 0]), begun[:-1, :, -1]])
    body = jax.checkpoint(one_chunk, prevent_cse=False)
    memory, out = jax.lax.scan(body, state.memory, (DeltaTokens(*map(chunks, tokens)), begun, before))
    out = jnp.moveaxis(out, 0, 1).reshape(len(segment_ids), -1, *out.shape[3:])
    return out[:, :T], DeltaState(memory, last)


def one_chunk(
    memory: Float[Array, "B K R A E"], now: tuple[DeltaTokens, Int[Array, "B C"], Int[Array, "B"]]
) -> tuple[Float[Array, "B K R A E"], Float[Array, "B C K R E"]]:
    """Return the state after a chunk and the chunk's outputs.

    With `e_i` the correction that token i writes and `D_ij = exp(g_(j+1) + ... + g_i)` what is left of it at token j:

        e_i = b_i (v_i - D_i0 S^T k_i - sum_(j<i) D_ij (k_i . k_j) e_j)

    This is a unit triangular system, whose inverse is a handful of matrix products. Sums of g between two tokens are
    added up for each pair. A difference of two running sums would lose digits after a token that forgets everything.

    Args:
        memory: the state before the chunk.
        now: the tokens, the number of segments begun up to each, and up to the end of the chunk before.
    """
    (query, key, value, log_decay, strength), begun, before = now
    C = key.shape[1]
    row, column = jnp.arange(C)[:, None], jnp.arange(C)
    log_decay, strength = jnp.moveaxis(log_decay, 1, -1), jnp.moveaxis(strength, 1, -1)  # [B, K, R, C]
    sums = jnp.cumsum(jnp.where(row > column, log_decay[..., :, None], 0), axis=-2)
    seen = (row >= column) & (begun[:, :, None] == begun[:, None, :])
    decay = jnp.where(seen[:, None, None], jnp.exp(sums), 0)  # [B, K, R, C, C]
    of_state = (begun == before[:, None])[:, None, None] * jnp.exp(jnp.cumsum(log_decay, axis=-1))  # [B, K, R, C]
    similar = einsum("bika,bjka->bkij", key, key)[:, :, None]
    inverse = unit_lower_inverse(jnp.where(row > column, strength[..., None] * decay * similar, 0))
    answers = of_state[..., None] * einsum("bika,bkrae->bkrie", key, memory)
    error = strength[..., None] * (jnp.moveaxis(value, 1, 3) - answers)
    error = einsum("bkrij,bkrje->bkrie", inverse, error)
    attended = decay * einsum("bika,bjka->bkij", query, key)[:, :, None]
    out = of_state[..., None] * einsum("bika,bkrae->bkrie", query, memory)
    out += einsum("bkrij,bkrje->bkrie", attended, error)
    written = einsum("bjka,bkrje->bkrae", key, decay[..., -1, :, None] * error)
    return memory * of_state[..., -1, None, None] + written, jnp.moveaxis(out, 3, 1)


@jax.custom_vjp
def unit_lower_inverse(strictly_lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return `(I + A)^-1` for a strictly lower triangular A.

    Blocks on the diagonal are inverted in pairs, `[[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]`, in
    log2(C) rounds. Unlike a power series of A, it is as stable as substitution. Unlike substitution, which TPUs and
    GPUs do row by row, it is matrix products, and a sharded batch stays sharded.
    """
    C = strictly_lower.shape[-1]
    row, column = jnp.arange(C)[:, None], jnp.arange(C)
    inverse = jnp.broadcast_to(jnp.eye(C, dtype=strictly_lower.dtype), strictly_lower.shape)
    size = 1
    while size < C:
        below = (row // size % 2 == 1) & (column // size == row // size - 1)
        block = jnp.where(below, strictly_lower, 0)
        # In the first round the blocks are single ones.
        inverse -= block if size == 1 else einsum("...ij,...jk,...kl->...il", inverse, block, inverse)
        size *= 2
    return inverse


def unit_lower_inverse_forward(
    strictly_lower: Float[Array, "*batch C C"],
) -> tuple[Float[Array, "*batch C C"], Float[Array, "*batch C C"]]:
    """Return the inverse, which its gradient needs."""
    inverse = unit_lower_inverse(strictly_lower)
    return inverse, inverse


def unit_lower_inverse_backward(
    inverse: Float[Array, "*batch C C"], slopes: Float[Array, "*batch C C"]
) -> tuple[Float[Array, "*batch C C"]]:
    """With `T = (I + A)^-1`: `dA = -T^T dT T^T`."""
    return (-einsum("...ji,...jk,...lk->...il", inverse, slopes, inverse),)


unit_lower_inverse.defvjp(unit_lower_inverse_forward, unit_lower_inverse_backward)
