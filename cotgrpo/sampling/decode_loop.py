"""Continuous batching in one jitted program: prefill prompts, decode one token per reply, harvest finished replies.

The log-probabilities are those of the student's own distribution, softmax(logits), as a train step computes them.
Temperature and filters choose the token; they do not change its log-probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp

from cotgrpo.models.decoder import DecoderConfig, KvCache, decode, head_of, init_cache, make_student
from cotgrpo.models.lora import apply_adapters
from cotgrpo.objectives import draw, draw_uniform, likeliest, softmax
from cotgrpo.sampling.decoding_layout import (
    DecodingLayout,
    ambient_layout,
    laid_out,
    lay_out,
    row_parts,
    vocab_parts,
    whole_rows,
)
from cotgrpo.sampling.prompts import Prompts, Replies
from cotgrpo.sampling.settings import SamplingSettings, filter_logits
from cotgrpo.tiled_loss import HeadSpec
from cotgrpo.types import Params
from cotgrpo.xla_cpu import project_few_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, Shaped

QUEUE = 4
"""Prompts per row of the decode batch in one call. With this many, few rows are idle at the end."""

Sampler = Callable[[Params, Prompts, jax.Array], Replies]
"""`sample(params, prompts, key) -> replies`."""


def make_sampler(
    config: DecoderConfig,
    settings: SamplingSettings,
    vocab_size: int | None = None,
    decode_batch_size: int | None = None,
    on_layout: Callable[[DecodingLayout], None] = lambda layout: None,
) -> Sampler:
    """Return a pure function that writes replies. Wrap it in `jax.jit`; it compiles once per shape of the prompts.

    A reply depends on its own prompt and random numbers only, not on padding, other rows or `decode_batch_size`.
    The loop stops once every reply has finished.

    With a decode batch smaller than the number of prompts, rows with a finished reply take the next prompts.
    They do so an eighth of the batch at a time, so prefill runs on batches. No row waits for the longest reply,
    and the cache has `decode_batch_size` rows.

    Args:
        config: the student's decoder.
        settings: how tokens are drawn.
        vocab_size: the tokenizer's size if the decoder's vocabulary is padded. Padded ids are never drawn.
        decode_batch_size: replies decoded at a time. None: all.
        on_layout: called with the layout of the token loop each time the sampler is traced on a mesh, to print it.

    Returns:
        `sample(params, prompts, key) -> Replies`. Row b draws with `fold_in(key, b)`, or with `key[b]` if there is one
        key for each row, so that its draws do not depend on its place. Greedy sampling ignores the key.
        `params` may be `cotgrpo.models.lora.AdaptedParams`, whose adapters are applied as a train step does.
        Each call copies the layers with `cotgrpo.models.decoder.unstack_layers`. To copy them once for many calls,
        pass the result of that function as `params`. On a mesh each call lays out a copy of the weights once, before
        its loop (`cotgrpo.sampling.decoding_layout`).

    Raises:
        ValueError: `decode_batch_size` is below 1.
    """
    if decode_batch_size is not None and decode_batch_size < 1:
        raise ValueError(f"make_sampler: decode_batch_size must be at least 1 or None, got {decode_batch_size}.")
    student = make_student(config, vocab_size)
    spec = HeadSpec.of(student)

    def sample(params: Params, prompts: Prompts, key: Key[Array, "..."]) -> Replies:
        prompts = jax.tree.map(jnp.asarray, prompts)
        count = len(prompts.lengths)
        batch_size = count if decode_batch_size is None else min(decode_batch_size, count)
        layout = ambient_layout(config, params, batch_size, prompts.tokens.shape[1], settings.max_new_tokens)
        if layout is not None:
            on_layout(layout)
        with (
            apply_adapters(params) as (whole, _),
            laid_out(config, whole, layout, prompts, key) as (own, prompts, key),
        ):
            replies = DecodeLoop(
                config=config.for_length(prompts.tokens.shape[1] + settings.max_new_tokens),
                settings=settings,
                spec=spec,
                params=own,
                head_VD=head_of(config, own).T,  # a tied head is the embedding: no copy
                prompts=prompts,
                key=key,
                batch_size=batch_size,
                admit_size=admit_size(batch_size, count),
            ).run()
        return replies if layout is None else jax.tree.map(lambda x: lay_out(x, "BT"[: x.ndim]), replies)

    return sample


def admit_size(batch_size: int, num_prompts: int) -> int:
    """Return how many prompts are prefilled at a time: all, or an eighth of the batch, a multiple of its shards."""
    if batch_size == num_prompts:
        return batch_size
    shards = row_parts()
    return min(-(-batch_size // (8 * shards)) * shards, batch_size)


class DecodeState(flax.struct.PyTreeNode):
    """The decode batch: one reply per row. Rows without a reply, or with an ended one, wait for the next prompt.

    The cache holds a row's prompt in its first P columns. The other N columns are a ring buffer. At each step all rows
    write at the same column of the ring, however long their replies are. A reply has at most N tokens, so it never
    overwrites itself. Keys of an earlier reply belong to another segment, so no query reads them.

    Attributes:
        column: int32, tokens decoded so far per row. The next one goes to column `column % N` of the ring.
        prompt_index: int32 `[B]`, row of the prompt; the number of prompts if the row has none.
        start: int32 `[B]`, column of the ring with the reply's first token.
        length: int32 `[B]`, tokens of the reply so far.
        position: int32 `[B]`, position of the next token, counted from the first token of the prompt.
        ended: bool `[B]`, True if the reply is complete or the row has none.
        finished: bool `[B]`, True if the reply ends with eos.
        hidden: `[B, D]`, the hidden row from which the head predicts the next token.
        tokens: int32 `[B, T]`, the ring.
        log_probs: float32 `[B, T]`, in the same columns as `tokens`.
        cache: keys and values of the prompt and the ring.
    """

    column: Int[Array, ""]
    prompt_index: Int[Array, "B"]
    start: Int[Array, "B"]
    length: Int[Array, "B"]
    position: Int[Array, "B"]
    ended: Bool[Array, "B"]
    finished: Bool[Array, "B"]
    hidden: Float[Array, "B D"]
    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    cache: KvCache


class LoopCarry(flax.struct.PyTreeNode):
    """What the outer loop carries.

    Attributes:
        next_prompt: int32, the first prompt that no row has taken yet.
        state: the decode batch.
        replies: harvested replies, one row per prompt.
    """

    next_prompt: Int[Array, ""]
    state: DecodeState
    replies: Replies


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """One call of a sampler while it is traced. The attributes do not change during the loop.

    Attributes:
        params: as `unstack_layers` returns them.
        batch_size: rows of the decode batch.
        admit_size: prompts that are prefilled at a time.
    """

    config: DecoderConfig
    settings: SamplingSettings
    spec: HeadSpec
    params: Params
    head_VD: Float[Array, "V D"]
    prompts: Prompts
    key: Key[Array, "..."]
    batch_size: int
    admit_size: int

    def run(self) -> Replies:
        """Return the replies to all prompts."""
        carry = LoopCarry(jnp.int32(0), self.empty_state(), self.empty_replies())
        carry = jax.lax.while_loop(self.has_work, self.admit_and_decode, carry)
        return harvest(carry.state, carry.replies, self.settings.pad_id)

    def empty_state(self) -> DecodeState:
        """Return a decode batch without replies."""
        zeros = jnp.zeros((self.batch_size,), jnp.int32)
        ring = (self.batch_size, self.settings.max_new_tokens)
        return DecodeState(
            column=jnp.int32(0),
            prompt_index=zeros + len(self.prompts.lengths),
            start=zeros,
            length=zeros,
            position=zeros,
            ended=jnp.ones((self.batch_size,), bool),
            finished=jnp.zeros((self.batch_size,), bool),
            hidden=lay_out(jnp.zeros((self.batch_size, self.config.width), jnp.dtype(self.config.dtype)), "BD"),
            tokens=lay_out(jnp.zeros(ring, jnp.int32), "BN"),
            log_probs=lay_out(jnp.zeros(ring, jnp.float32), "BN"),
            cache=init_cache(self.config, self.batch_size, self.prompts.tokens.shape[1] + ring[1]),
        )

    def empty_replies(self) -> Replies:
        """Return a row of padding for each prompt."""
        count, N = len(self.prompts.lengths), self.settings.max_new_tokens
        return Replies(
            tokens=jnp.full((count, N), self.settings.pad_id, jnp.int32),
            log_probs=jnp.zeros((count, N), jnp.float32),
            lengths=jnp.zeros((count,), jnp.int32),
            finished=jnp.zeros((count,), bool),
        )

    def num_waiting(self, next_prompt: Int[Array, ""]) -> Int[Array, ""]:
        """Return how many prompts have not been taken yet."""
        return jnp.sum(self.prompts.lengths > 0, dtype=jnp.int32) - next_prompt

    def has_work(self, carry: LoopCarry) -> Bool[Array, ""]:
        """Return whether prompts wait or replies are unfinished."""
        return (self.num_waiting(carry.next_prompt) > 0) | ~jnp.all(carry.state.ended)

    def admit_and_decode(self, carry: LoopCarry) -> LoopCarry:
        """Harvest finished replies, admit the next prompts, and decode until the next prompts can be admitted."""
        replies = harvest(carry.state, carry.replies, self.settings.pad_id)
        next_prompt, state = self.admit_prompts(carry.state, carry.next_prompt)

        def keep_decoding(state: DecodeState) -> Bool[Array, ""]:
            waiting = self.num_waiting(next_prompt)
            ended = jnp.sum(state.ended, dtype=jnp.int32)
            admit = (waiting > 0) & (ended >= jnp.minimum(self.admit_size, waiting))
            return ~jnp.all(state.ended) & ~admit

        return LoopCarry(next_prompt, jax.lax.while_loop(keep_decoding, self.decode_token, state), replies)

    def admit_prompts(self, state: DecodeState, next_prompt: Int[Array, ""]) -> tuple[Int[Array, ""], DecodeState]:
        """Prefill the next `admit_size` prompts as one batch and put each into a row without an unfinished reply.

        Returns:
            The next prompt to take after these, and the state.
        """
        count = len(self.prompts.tokens)
        rank_B = jnp.cumsum(state.ended, dtype=jnp.int32) - 1  # of each free row among the free ones
        admitted_B = state.ended & (rank_B < self.admit_size) & (rank_B < self.num_waiting(next_prompt))
        index_R = jnp.minimum(next_prompt + jnp.arange(self.admit_size, dtype=jnp.int32), count - 1)
        hidden_RD, cache = self.prefill(index_R)

        def scatter(new: Shaped[Array, "R ..."], old: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
            if self.admit_size < self.batch_size:  # else the order is the same, and on a mesh no row moves
                new = jnp.take(new, rank_B, axis=0, mode="clip")
            return jnp.where(admitted_B.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

        def scatter_prefix(new: Shaped[Array, "R ..."], old: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
            """Scatter into the columns of the prompt, the first ones."""
            prefix = jax.lax.slice(old, (0,) * old.ndim, (len(old), *new.shape[1:]))
            return jax.lax.dynamic_update_slice(old, scatter(new, prefix), (0,) * old.ndim)

        zero_R = jnp.zeros_like(index_R)
        return next_prompt + jnp.sum(admitted_B, dtype=jnp.int32), state.replace(
            prompt_index=scatter(index_R, jnp.where(state.ended, count, state.prompt_index)),
            start=scatter(zero_R + state.column % self.settings.max_new_tokens, state.start),
            length=scatter(zero_R, state.length),
            position=scatter(self.prompts.lengths[index_R], state.position),
            ended=state.ended & ~admitted_B,
            finished=state.finished & ~admitted_B,
            hidden=scatter(hidden_RD, state.hidden),
            cache=jax.tree.map(scatter_prefix, cache, state.cache),
        )

    def prefill(self, index_R: Int[Array, "R"]) -> tuple[Float[Array, "R D"], KvCache]:
        """Return the last hidden row of each of these prompts, and their keys and values."""
        tokens_RP, lengths_R = self.prompts.tokens[index_R], self.prompts.lengths[index_R]
        P = tokens_RP.shape[1]
        # Positions count from the first token of the prompt. Padding before it is segment 0, which no reply reads.
        positions_RP = jnp.arange(P, dtype=jnp.int32)[None, :] - (P - lengths_R[:, None])
        segments_RP = jnp.where(positions_RP >= 0, index_R[:, None] + 1, 0)
        hidden_RPD, cache = decode(
            self.config,
            self.params,
            tokens_RP,
            jnp.maximum(positions_RP, 0),
            segments_RP,
            init_cache(self.config, len(index_R), P),
            0,
        )
        return hidden_RPD[:, -1], cache

    def keys_of(self, index_B: Int[Array, "B"]) -> Key[Array, "B"]:
        """Return the keys that the rows of these prompts draw with; any for a row without a prompt."""
        if self.key.ndim:
            return self.key[jnp.minimum(index_B, len(self.key) - 1)]
        return jax.vmap(lambda index: jax.random.fold_in(self.key, index))(index_B)

    def decode_token(self, state: DecodeState) -> DecodeState:
        """Draw the next token of every row and run the decoder on it."""
        settings, P = self.settings, self.prompts.tokens.shape[1]
        keys_B = self.keys_of(state.prompt_index)
        logits_BV = self.spec.logits(project_few_tokens(state.hidden, self.head_VD, jnp.float32), None)
        token_B, log_prob_B = sample_tokens(settings, logits_BV, keys_B, state.length, vocab_parts(logits_BV.shape[1]))
        active_B = ~state.ended
        ring_column = state.column % settings.max_new_tokens

        def write(ring_BT: Shaped[Array, "B T"], new_B: Shaped[Array, "B"]) -> Shaped[Array, "B T"]:
            old_B = jax.lax.dynamic_index_in_dim(ring_BT, ring_column, axis=1, keepdims=False)
            return ring_BT.at[:, ring_column].set(jnp.where(active_B, new_B, old_B))

        eos_E = jnp.asarray(settings.eos_ids, jnp.int32)
        is_eos_B = jnp.any(token_B[:, None] == eos_E[None, :], axis=-1)
        segments_B = jnp.where(active_B, state.prompt_index + 1, 0)
        hidden_B1D, cache = decode(
            self.config,
            self.params,
            token_B[:, None],
            state.position[:, None],
            segments_B[:, None],
            state.cache,
            P + ring_column,
        )
        length_B = state.length + active_B.astype(jnp.int32)
        return state.replace(
            column=state.column + 1,
            length=length_B,
            position=state.position + active_B.astype(jnp.int32),
            ended=state.ended | is_eos_B | (length_B == settings.max_new_tokens),
            finished=state.finished | (active_B & is_eos_B),
            hidden=hidden_B1D[:, 0],
            tokens=write(state.tokens, token_B),
            log_probs=write(state.log_probs, log_prob_B),
            cache=cache,
        )


def harvest(state: DecodeState, replies: Replies, pad_id: int) -> Replies:
    """Copy the ended replies of the decode batch into `replies`, each to the row of its prompt."""
    N = replies.tokens.shape[1]
    column_N = jnp.arange(N, dtype=jnp.int32)[None, :]
    ring_column_BN = (state.start[:, None] + column_N) % N
    is_reply_BN = column_N < state.length[:, None]
    # An index past the last prompt is dropped.
    index_B = jnp.where(state.ended, state.prompt_index, len(replies.lengths))

    def unroll(ring_BN: Shaped[Array, "B N"], fill: float) -> Shaped[Array, "B N"]:
        return jnp.where(is_reply_BN, jnp.take_along_axis(ring_BN, ring_column_BN, axis=1), fill)

    def put(whole: Shaped[Array, "M ..."], new: Shaped[Array, "B ..."]) -> Shaped[Array, "M ..."]:
        return whole.at[index_B].set(new, mode="drop")

    return Replies(
        tokens=put(replies.tokens, unroll(state.tokens, pad_id)),
        log_probs=put(replies.log_probs, unroll(state.log_probs, 0.0)),
        lengths=put(replies.lengths, state.length),
        finished=put(replies.finished, state.finished),
    )


def sample_tokens(
    settings: SamplingSettings,
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, "B"],
    index_B: Int[Array, "B"],
    parts: int = 1,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw token number `index_B` of each reply.

    `parts` is how many equal parts of the vocabulary lie on devices of their own.

    Returns:
        The tokens and their log-probabilities in softmax(logits).
    """
    if settings.temperature == 0:
        token_B = jax.vmap(likeliest)(logits_BV)
    else:
        uniform_B2 = jax.vmap(lambda key, index: draw_uniform(jax.random.fold_in(key, index)))(keys_B, index_B)
        drawn_BV = logits_BV
        if parts > 1 and (settings.top_k is not None or settings.top_p < 1):
            drawn_BV, parts = whole_rows(logits_BV), 1  # a filter sorts a whole row
        filtered_BV = jax.vmap(lambda logits_V: filter_logits(logits_V, settings))(drawn_BV)
        token_B = jax.vmap(lambda logits_V, u: draw(logits_V, u[None], parts)[0])(filtered_BV, uniform_B2)
        token_B = lay_out(token_B, "B")
    return token_B, jax.vmap(lambda logits_V, token: softmax(logits_V).log_prob(token))(logits_BV, token_B)
