"""Jitted generation with a key/value cache: greedy, temperature, top-k, top-p, over prompts of different length.

The log-probabilities that come back are those of the student's own distribution, softmax(logits), as a train step computes it; temperature
and filters choose which token is drawn, not what its log-probability is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.models.decoder import DecoderConfig, KvCache, decode, head_of, init_cache, make_student, unstack_layers
from cotgrpo.objectives import MASKED_LOGIT, softmax
from cotgrpo.sharding import batch_shards, open_axes
from cotgrpo.tiled_loss import HeadSpec, draw, likeliest
from cotgrpo.types import Params
from cotgrpo.xla_cpu import project_few_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

    from cotgrpo.types import AnyArray


class Prompts(flax.struct.PyTreeNode):
    """Prompts of different length in one array, padded on the left, so that every reply begins in the same column.

    Attributes:
        tokens: int32 `[B, T]`.
        lengths: int32 `[B]`: the last `lengths[b]` tokens of row b are its prompt. 0: there is none and gets no reply; such rows come last.
    """

    tokens: Int[AnyArray, "B T"]
    lengths: Int[AnyArray, "B"]


class Replies(flax.struct.PyTreeNode):
    """What a sampler wrote.

    Attributes:
        tokens: int32 `[B, T]`; the eos token is part of a reply, and `pad_id` follows it.
        log_probs: float32 `[B, T]`, log p(token) in the student's own distribution; 0 behind the end.
        lengths: int32 `[B]`, tokens of each reply, the eos token included.
        finished: bool `[B]`, whether eos came; False: the reply was cut off after `max_new_tokens`.
    """

    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How replies are drawn. Filters apply in this order: temperature, top-k, top-p.

    Attributes:
        max_new_tokens: >= 1.
        eos_ids: tokens that end a reply; empty: every reply runs to `max_new_tokens`.
        temperature: >= 0; 0 is greedy (the likeliest token, the first of equals).
        top_k: draw from the k likeliest tokens (and those equal to the k-th), or None.
        top_p: in (0, 1]; draw from the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020, arXiv:1904.09751).
        pad_id: fills a row behind its end.

    Raises:
        ValueError: a setting outside its range.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingSettings.max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"SamplingSettings.temperature must be at least 0, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"SamplingSettings.top_k must be at least 1 or None, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingSettings.top_p must lie in (0, 1], got {self.top_p}.")


QUEUE = 4
"""Prompts for each slot, where there is a long queue of them that could be given in one call: few slots run dry in the end, and finished replies come often."""

Sampler = Callable[[Params, Prompts, Any], Replies]
"""`sample(params, prompts, key) -> replies`."""


class DecodeState(flax.struct.PyTreeNode):
    """The replies that are being written, one a slot. Fields of a slot without one, or whose reply has ended, wait for the next prompt.

    The cache holds a slot's prompt in its first P columns. The N behind them are a ring in which every slot writes at the same column, whatever it has written: a reply of
    at most N tokens never meets itself there, and what an earlier reply left belongs to another segment.

    Attributes:
        row: int32 `[B]`, the prompt; the number of prompts where the slot has none.
        start: int32 `[B]`, the ring's column of the reply's first token.
        length: int32 `[B]`, its tokens so far.
        position: int32 `[B]`, of its next token, counted from the prompt's first.
        ended: bool `[B]`, whether it is complete, or there is none.
        finished: bool `[B]`, whether eos came.
        hidden: `[B, D]`, the row that the head reads for its next token.
        tokens: int32 `[B, T]`, the ring.
        log_probs: float32 `[B, T]`, likewise.
        cache: of the prompt and the ring.
    """

    row: Int[Array, "B"]
    start: Int[Array, "B"]
    length: Int[Array, "B"]
    position: Int[Array, "B"]
    ended: Bool[Array, "B"]
    finished: Bool[Array, "B"]
    hidden: Float[Array, "B D"]
    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    cache: KvCache


def make_sampler(
    config: DecoderConfig,
    settings: SamplingSettings,
    vocab_size: int | None = None,
    decode_batch_size: int | None = None,
) -> Sampler:
    """A pure function that writes replies; wrap it in `jax.jit`. It compiles once for each shape of the prompts.

    A reply depends on its own prompt and random numbers alone, not on padding, the other rows, or the number of slots. The loop ends when every row has.

    With fewer slots than prompts, slots whose reply has ended take the next prompts, an eighth of the slots at a time, so that reading those is one batch: nothing waits for
    the longest reply, and the cache is that of the slots.

    Args:
        config: the student's decoder.
        settings: how tokens are drawn.
        vocab_size: the tokenizer's size where the decoder's is padded beyond it; padded ids are never drawn.
        decode_batch_size: replies that are written at a time; None: all.

    Returns:
        `sample(params, prompts, key) -> Replies`. Row b draws with `fold_in(key, b)`; greedy sampling does not look at the key. Each call makes a copy of the layers
        with `cotgrpo.models.decoder.by_layer`; parameters that do not change between calls may be given as that function returns them.

    Raises:
        ValueError: `decode_batch_size` below 1.
    """
    if decode_batch_size is not None and decode_batch_size < 1:
        raise ValueError(f"make_sampler: decode_batch_size must be at least 1 or None, got {decode_batch_size}.")
    student = make_student(config, vocab_size)
    spec = HeadSpec(student.softcap, student.vocab_size)

    def sample(params: Params, prompts: Prompts, key: PRNGKeyArray) -> Replies:
        prompts = jax.tree.map(jnp.asarray, prompts)
        head_VD = head_of(config, params).T  # of a tied head no copy: the embedding
        return DecodeLoop(config, settings, spec, unstack_layers(config, params), head_VD, prompts, key).replies(
            decode_batch_size
        )

    return sample


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """One call of a sampler, while it is traced: what all of its loops read."""

    config: DecoderConfig
    settings: SamplingSettings
    spec: HeadSpec
    params: Params
    head_VD: Any
    prompts: Prompts
    key: Any

    @property
    def total(self) -> Any:
        """How many of the rows hold a prompt."""
        return jnp.sum(self.prompts.lengths > 0)

    def replies(self, slots: int | None) -> Replies:
        """The replies to all prompts, written in so many slots."""
        count, N = len(self.prompts.lengths), self.settings.max_new_tokens
        width = count if slots is None else min(slots, count)
        share = batch_shards(open_axes())
        group = width if width == count else min(-(-width // (8 * share)) * share, width)

        def to_go(taken: Any, slots: DecodeState) -> Any:
            """Whether slots have replies to write before the next prompts are read."""
            left = self.total - taken
            waiting = (left > 0) & (jnp.sum(slots.ended) >= jnp.minimum(group, left))
            return ~jnp.all(slots.ended) & ~waiting

        def one_round(carry: Any) -> Any:
            taken, column, slots, replies = carry
            replies = harvest(slots, replies, self.settings.pad_id)
            taken, slots = self.admit_prompts(slots, taken, column, group)
            column, slots = jax.lax.while_loop(
                lambda inner: to_go(taken, inner[1]), lambda inner: self.one_token(*inner), (column, slots)
            )
            return taken, column, slots, replies

        none = Replies(
            tokens=jnp.full((count, N), self.settings.pad_id, jnp.int32),
            log_probs=jnp.zeros((count, N), jnp.float32),
            lengths=jnp.zeros((count,), jnp.int32),
            finished=jnp.zeros((count,), bool),
        )
        start = (jnp.int32(0), jnp.int32(0), self.empty(width), none)
        going_on = lambda carry: (carry[0] < self.total) | ~jnp.all(carry[2].ended)
        _, _, slots_left, replies = jax.lax.while_loop(going_on, one_round, start)
        return harvest(slots_left, replies, self.settings.pad_id)

    def empty(self, width: int) -> DecodeState:
        """So many slots without a reply."""
        P, N = self.prompts.tokens.shape[1], self.settings.max_new_tokens
        zeros = jnp.zeros((width,), jnp.int32)
        return DecodeState(
            row=zeros + len(self.prompts.lengths),
            start=zeros,
            length=zeros,
            position=zeros,
            ended=jnp.ones((width,), bool),
            finished=jnp.zeros((width,), bool),
            hidden=jnp.zeros((width, self.config.width), jnp.dtype(self.config.dtype)),
            tokens=jnp.zeros((width, N), jnp.int32),
            log_probs=jnp.zeros((width, N), jnp.float32),
            cache=init_cache(self.config, width, P + N),
        )

    def admit_prompts(self, slots: DecodeState, taken: Any, column: Any, group: int) -> tuple[Any, DecodeState]:
        """The next `group` prompts, read as one batch, each into a slot without a reply; and how many are taken now."""
        count = len(self.prompts.tokens)
        rank_B = jnp.cumsum(slots.ended) - 1
        gets_B = slots.ended & (rank_B < group) & (taken + rank_B < self.total)
        row_R = jnp.minimum(taken + jnp.arange(group), count - 1)
        hidden_RD, cache = self.read(row_R)

        def take(new: Any, old: Any) -> Any:
            if group < len(gets_B):  # else they are in order, so that on a mesh none has to travel
                new = jnp.take(new, rank_B, axis=0, mode="clip")
            return jnp.where(gets_B.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

        def prompt_columns(new: Any, old: Any) -> Any:
            before = jax.lax.slice(old, (0,) * old.ndim, (len(old), *new.shape[1:]))
            return jax.lax.dynamic_update_slice(old, take(new, before), (0,) * old.ndim)

        zero_R = jnp.zeros_like(row_R)
        return taken + jnp.sum(gets_B), slots.replace(
            row=take(row_R, jnp.where(slots.ended, count, slots.row)),
            start=take(zero_R + column % self.settings.max_new_tokens, slots.start),
            length=take(zero_R, slots.length),
            position=take(self.prompts.lengths[row_R], slots.position),
            ended=slots.ended & ~gets_B,
            finished=slots.finished & ~gets_B,
            hidden=take(hidden_RD, slots.hidden),
            cache=jax.tree.map(prompt_columns, cache, slots.cache),
        )

    def read(self, row_R: Any) -> tuple[Any, KvCache]:
        """The prompts of these rows: the last one's hidden row of each, and their keys and values."""
        tokens_RP, lengths_R = self.prompts.tokens[row_R], self.prompts.lengths[row_R]
        P = tokens_RP.shape[1]
        # Positions count from the first token of the prompt; padding before it is segment 0, which no token of a reply reads.
        positions_RP = jnp.arange(P)[None, :] - (P - lengths_R[:, None])
        segments_RP = jnp.where(positions_RP >= 0, row_R[:, None] + 1, 0)
        hidden_RPD, cache = decode(
            self.config,
            self.params,
            tokens_RP,
            jnp.maximum(positions_RP, 0),
            segments_RP,
            init_cache(self.config, len(row_R), P),
            0,
        )
        return hidden_RPD[:, -1], cache

    def one_token(self, column: Any, slots: DecodeState) -> tuple[Any, DecodeState]:
        """The next token of every slot, and the column of the one behind it."""
        settings, P = self.settings, self.prompts.tokens.shape[1]
        keys_B = jax.vmap(lambda row: jax.random.fold_in(self.key, row))(slots.row)
        logits_BV = self.spec.logits(project_few_tokens(slots.hidden, self.head_VD, jnp.float32), None)
        token_B, log_prob_B = choose(settings, logits_BV, keys_B, slots.length)
        writes_B = ~slots.ended
        at = column % settings.max_new_tokens

        def put(ring_BT: Any, new_B: Any) -> Any:
            old_B = jax.lax.dynamic_index_in_dim(ring_BT, at, axis=1, keepdims=False)
            return ring_BT.at[:, at].set(jnp.where(writes_B, new_B, old_B))

        eos_E = jnp.asarray(settings.eos_ids, jnp.int32)
        is_eos_B = jnp.any(token_B[:, None] == eos_E[None, :], axis=-1)
        segments_B = jnp.where(writes_B, slots.row + 1, 0)
        hidden_B1D, cache = decode(
            self.config,
            self.params,
            token_B[:, None],
            slots.position[:, None],
            segments_B[:, None],
            slots.cache,
            P + at,
        )
        length_B = slots.length + writes_B
        slots = slots.replace(
            length=length_B,
            position=slots.position + writes_B,
            ended=slots.ended | is_eos_B | (length_B == settings.max_new_tokens),
            finished=slots.finished | (writes_B & is_eos_B),
            hidden=hidden_B1D[:, 0],
            tokens=put(slots.tokens, token_B),
            log_probs=put(slots.log_probs, log_prob_B),
            cache=cache,
        )
        return column + 1, slots


def harvest(slots: DecodeState, replies: Replies, pad_id: int) -> Replies:
    """The replies with those that have ended in the slots, each at its prompt's row."""
    N = replies.tokens.shape[1]
    column_N = jnp.arange(N)[None, :]
    ring_BN = (slots.start[:, None] + column_N) % N
    own_BN = column_N < slots.length[:, None]
    row_B = jnp.where(slots.ended, slots.row, len(replies.lengths))  # one behind the last: dropped
    unrolled = lambda ring_BT, fill: jnp.where(own_BN, jnp.take_along_axis(ring_BT, ring_BN, axis=1), fill)
    put = lambda whole, new: whole.at[row_B].set(new, mode="drop")
    return Replies(
        tokens=put(replies.tokens, unrolled(slots.tokens, pad_id)),
        log_probs=put(replies.log_probs, unrolled(slots.log_probs, 0.0)),
        lengths=put(replies.lengths, slots.length),
        finished=put(replies.finished, slots.finished),
    )


def choose(settings: SamplingSettings, logits_BV: Any, keys_B: Any, index_B: Any) -> tuple[Any, Any]:
    """Token number `index_B` of each reply, `[B]`, and its log-probability in softmax(logits)."""
    if settings.temperature == 0:
        token_B = jax.vmap(likeliest)(logits_BV)
    else:
        uniform_B = jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(keys_B, index_B)
        filtered_BV = jax.vmap(lambda logits_V: filter_logits(logits_V, settings))(logits_BV)
        token_B = jax.vmap(lambda logits_V, u: draw(logits_V, u[None])[0])(filtered_BV, uniform_B)
    return token_B, jax.vmap(lambda logits_V, token: softmax(logits_V).log_prob(token))(logits_BV, token_B)


def filter_logits(logits_V: Float[Array, "V"], settings: SamplingSettings) -> Float[Array, "V"]:
    """The logits of the distribution that is drawn from: divided by a temperature > 0, tokens outside top-k and top-p masked."""
    real_V = logits_V > MASKED_LOGIT
    logits_V = jnp.where(real_V, logits_V / settings.temperature, MASKED_LOGIT)
    vocab = logits_V.shape[0]
    if settings.top_k is not None and settings.top_k < vocab:
        least = jax.lax.top_k(logits_V, settings.top_k)[0][-1]
        logits_V = jnp.where(logits_V >= least, logits_V, MASKED_LOGIT)
    if settings.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        p_V = jax.nn.softmax(sorted_V)
        # A token stays while those before it hold less than top_p; the likeliest one always does.
        stays_V = jnp.cumsum(p_V) - p_V < settings.top_p
        least = jnp.min(jnp.where(stays_V, sorted_V, jnp.inf))
        logits_V = jnp.where(logits_V >= least, logits_V, MASKED_LOGIT)
    return logits_V


def pad_prompts(
    prompts: Sequence[np.ndarray], *, length: int | None = None, rows: int | None = None, pad_id: int = 0
) -> Prompts:
    """Prompts of different length as one NumPy array, padded on the left.

    Args:
        prompts: int `[n]` each, n >= 1.
        length: columns; None: the longest prompt's. A fixed length keeps a sampler from compiling anew, and so do
        rows: of the array, at least as many as there are prompts; those behind them hold none. None: one a prompt.
        pad_id: any token; it is never read.

    Raises:
        ValueError: no prompt, an empty one, or one that is longer than `length`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"Expected prompts of at least one token each, got lengths {lengths[:10]}.")
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        row = lengths.index(max(lengths))
        raise ValueError(f"Prompt {row} has {lengths[row]} tokens, but there are {length} columns: raise the length.")
    rows = len(prompts) if rows is None else rows
    if len(prompts) > rows:
        raise ValueError(f"Expected at most {rows} prompts, got {len(prompts)}: raise the rows.")
    tokens, counts = np.full((rows, length), pad_id, np.int32), np.zeros(rows, np.int32)
    counts[: len(prompts)] = lengths
    for row_T, prompt in zip(tokens, prompts, strict=False):
        row_T[length - len(prompt) :] = prompt
    return Prompts(tokens=tokens, lengths=counts)
