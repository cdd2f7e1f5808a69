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

from cotgrpo.models.decoder import DecoderConfig, decode, init_cache, make_student
from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.token_engine import HeadSpec, draw
from cotgrpo.types import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

    from cotgrpo.types import AnyArray


class Prompts(flax.struct.PyTreeNode):
    """Prompts of different length in one array, padded on the left, so that every reply begins in the same column.

    Attributes:
        tokens: int32 `[B, T]`.
        lengths: int32 `[B]`, at least 1: the last `lengths[b]` tokens of row b are its prompt.
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


Sampler = Callable[[Params, Prompts, Any], Replies]
"""`sample(params, prompts, key) -> replies`."""


def make_sampler(config: DecoderConfig, settings: SamplingSettings, vocab_size: int | None = None) -> Sampler:
    """A pure function that writes replies; wrap it in `jax.jit`. It compiles once for each shape of the prompts.

    A reply depends on its own prompt and random numbers alone, not on padding or on the other rows. The loop ends when every row has.

    Args:
        config: the student's decoder.
        settings: how tokens are drawn.
        vocab_size: the tokenizer's size where the decoder's is padded beyond it; padded ids are never drawn.

    Returns:
        `sample(params, prompts, key) -> Replies`. Row b draws with `fold_in(key, b)`; greedy sampling does not look at the key.
    """
    student = make_student(config, vocab_size)
    spec = HeadSpec(student.softcap, student.vocab_size)
    eos_E = jnp.asarray(settings.eos_ids, jnp.int32)

    def sample(params: Params, prompts: Prompts, key: PRNGKeyArray) -> Replies:
        B, P = prompts.tokens.shape
        N = settings.max_new_tokens
        head_DV = None if student.head is None else student.head(params)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
        # Positions count from the first token of the prompt; padding before it is segment 0, which no token of segment 1 reads.
        lengths_B = jnp.asarray(prompts.lengths)
        positions_BP = jnp.arange(P)[None, :] - (P - lengths_B[:, None])
        segments_BP = (positions_BP >= 0).astype(jnp.int32)
        cache = init_cache(config, B, P + N)
        hidden_BPD, cache = decode(
            config, params, jnp.asarray(prompts.tokens), jnp.maximum(positions_BP, 0), segments_BP, cache, jnp.int32(0)
        )
        start = (
            jnp.int32(0),
            cache,
            hidden_BPD[:, -1],
            Replies(
                tokens=jnp.full((B, N), settings.pad_id, jnp.int32),
                log_probs=jnp.zeros((B, N), jnp.float32),
                lengths=jnp.zeros((B,), jnp.int32),
                finished=jnp.zeros((B,), bool),
            ),
        )

        def going_on(carry: Any) -> Any:
            index, _, _, replies = carry
            return (index < N) & ~jnp.all(replies.finished)

        def one_token(carry: Any) -> Any:
            index, cache, hidden_BD, replies = carry
            ended_B = replies.finished
            token_B, log_prob_B = choose(settings, spec.logits(hidden_BD, head_DV), keys_B, index)
            replies = replies.replace(
                tokens=replies.tokens.at[:, index].set(jnp.where(ended_B, settings.pad_id, token_B)),
                log_probs=replies.log_probs.at[:, index].set(jnp.where(ended_B, 0.0, log_prob_B)),
                lengths=replies.lengths + ~ended_B,
                finished=ended_B | jnp.any(token_B[:, None] == eos_E[None, :], axis=-1),
            )
            ones_B1 = jnp.ones((B, 1), jnp.int32)
            at_B1 = (lengths_B + index)[:, None]
            hidden_B1D, cache = decode(config, params, token_B[:, None], at_B1, ones_B1, cache, P + index)
            return index + 1, cache, hidden_B1D[:, 0], replies

        return jax.lax.while_loop(going_on, one_token, start)[-1]

    return sample


def choose(settings: SamplingSettings, logits_BV: Any, keys_B: Any, index: Any) -> tuple[Any, Any]:
    """The next token of each row, `[B]`, and its log-probability in softmax(logits)."""
    if settings.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(keys_B)
        filtered_BV = jax.vmap(lambda logits_V: filter_logits(logits_V, settings))(logits_BV)
        token_B = jax.vmap(lambda logits_V, u: draw(logits_V, u[None])[0])(filtered_BV, uniform_B)
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, picked_B - jax.nn.logsumexp(logits_BV, axis=-1)


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


def pad_prompts(prompts: Sequence[np.ndarray], *, length: int | None = None, pad_id: int = 0) -> Prompts:
    """Prompts of different length as one NumPy array, padded on the left.

    Args:
        prompts: int `[n]` each, n >= 1.
        length: columns; None: the longest prompt's. A fixed length keeps a sampler from compiling anew.
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
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row_T, prompt in zip(tokens, prompts, strict=True):
        row_T[length - len(prompt) :] = prompt
    return Prompts(tokens=tokens, lengths=np.asarray(lengths, np.int32))
