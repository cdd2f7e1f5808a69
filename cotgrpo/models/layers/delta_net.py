"""The gated delta rule, a linear recurrence in place of attention (Yang et al. 2024, arXiv:2412.06464).

Each head keeps a matrix `S` from keys to values. Token t forgets a part of it and corrects what it answers to its key:

    S_t = exp(g_t) S_(t-1) + k_t (b_t (v_t - exp(g_t) S_(t-1)^T k_t))^T          o_t = S_t^T q_t

with `g_t <= 0` and `0 <= b_t <= 1`. `chunked_delta_rule` computes it with matrix products over chunks of tokens, and
`delta_rule_steps` token by token. All sums are in float32. The state is zero at the first token of a segment. Padding,
which is segment 0, leaves it as it is.

`GatedDeltaNet` is the layer of Qwen3-Next and Qwen3.5 around it: a short convolution of queries, keys and values before
the rule, and a gated norm of each head after it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cotgrpo.models.layers.causal_conv import ConvWindow, causal_conv
from cotgrpo.models.layers.options import DELTA_CHUNK, DeltaNet
from cotgrpo.models.norm_and_gate import broadcast_last, rms_norm
from cotgrpo.sharding import constrain, vary_alike

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from cotgrpo.types import Array, Bool, Float, Int, PRNGKeyArray


NORM_EPS = 1e-6
"""Added to the squared length of a query or a key that is brought to length 1."""

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


class DeltaState(flax.struct.PyTreeNode):
    """What the tokens read so far leave behind.

    Attributes:
        memory: float32 `[B, K, R, A, E]`, S.
        segment_ids: int32 `[B]`, the segment of the last token. 0: there was none.
    """

    memory: Float[Array, "B K R A E"]
    segment_ids: Int[Array, "B"]

    @classmethod
    def empty(cls, batch: int, options: DeltaNet) -> DeltaState:
        """Return the state before the first token."""
        K, R = options.num_key_heads, options.num_value_heads // options.num_key_heads
        memory = jnp.zeros((batch, K, R, options.key_dim, options.value_dim), jnp.float32)
        return cls(memory, jnp.zeros((batch,), jnp.int32))

    @classmethod
    def before(cls, tokens: DeltaTokens) -> DeltaState:
        """Return the state before the first of some tokens."""
        B, _, K, R, E = tokens.value.shape
        return cls.empty(B, DeltaNet(K, K * R, tokens.key.shape[-1], E))


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
    index = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1])[None], -1), axis=1)  # of the last token up to here
    seen = jnp.where(index < 0, last[:, None], jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1))
    before = jnp.concatenate([last[:, None], seen[:, :-1]], axis=1)
    return real & (segment_ids != before), seen[:, -1]


def delta_rule_steps(
    tokens: DeltaTokens, segment_ids: Int[Array, "B T"], state: DeltaState | None = None
) -> tuple[Float[Array, "B T K R E"], DeltaState]:
    """Return the outputs in float32 and the state after the last token, computed token by token."""
    state = DeltaState.before(tokens) if state is None else state
    tokens, segment_ids, state = vary_alike(tokens, segment_ids, state)
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
    tokens: DeltaTokens, segment_ids: Int[Array, "B T"], state: DeltaState | None = None, chunk: int = DELTA_CHUNK
) -> tuple[Float[Array, "B T K R E"], DeltaState]:
    """Return what `delta_rule_steps` does, with matrix products over chunks of tokens.

    The backward pass keeps one state per chunk and computes the rest of a chunk again.
    """
    state = DeltaState.before(tokens) if state is None else state
    tokens, segment_ids, state = vary_alike(tokens, segment_ids, state)
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
    log_decay, strength = jnp.moveaxis(log_decay, 1, -1), jnp.moveaxis(strength, 1, -1)  # [B, K, R, C]
    pairs = (*log_decay.shape, log_decay.shape[-1])
    sums = jnp.cumsum(jnp.tril(jnp.broadcast_to(log_decay[..., None], pairs), -1), axis=-2)
    seen = jnp.tril(begun[:, :, None] == begun[:, None, :])
    decay = jnp.where(seen[:, None, None], jnp.exp(sums), 0)  # [B, K, R, C, C]
    of_state = (begun == before[:, None])[:, None, None] * jnp.exp(jnp.cumsum(log_decay, axis=-1))  # [B, K, R, C]
    similar = einsum("bika,bjka->bkij", key, key)[:, :, None]
    inverse = unit_lower_inverse(jnp.tril(strength[..., None] * decay * similar, -1))
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
    C, shape = strictly_lower.shape[-1], strictly_lower.shape
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis) for axis in (-2, -1))
    inverse = jnp.broadcast_to(jnp.eye(C, dtype=strictly_lower.dtype).reshape((1,) * (len(shape) - 2) + (C, C)), shape)
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


class DeltaCache(flax.struct.PyTreeNode):
    """What a layer keeps while tokens are decoded: the window of its convolution and the state of the rule."""

    window: ConvWindow
    state: DeltaState

    @classmethod
    def empty(cls, batch: int, options: DeltaNet, dtype: DTypeLike) -> DeltaCache:
        """Return the cache of rows without a token."""
        window = ConvWindow.empty(batch, options.taps, options.channels, dtype)
        return cls(
            window.replace(inputs=constrain(window.inputs, "BNF")),
            lay_out_state(DeltaState.empty(batch, options)),
        )


def lay_out_state(state: DeltaState) -> DeltaState:
    """Lay out a state by key heads on the ambient mesh."""
    return state.replace(memory=constrain(state.memory, "BKRHN"))


def start_decay(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "K"]:
    """Return fresh logarithms of decays, which are uniform in (0.01, 16)."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0))


class GatedDeltaNet(nn.Module):
    """The projections of a layer's input to what is projected into the residual stream.

    The decays and the norm's scale are float32 in every storage type: they are few, and a decay of bfloat16 forgets
    at another rate.

    Attributes:
        saved_name: what remat policies call the result.
    """

    options: DeltaNet
    norm_eps: float
    param_dtype: DTypeLike
    init_scale: float
    saved_name: str

    @nn.compact
    def __call__(
        self,
        mixed: Float[Array, "B T channels"],
        gate: Float[Array, "B T values"],
        strength: Float[Array, "B T heads"],
        decay: Float[Array, "B T heads"],
        segment_ids: Int[Array, "B T"],
        cache: DeltaCache | None,
    ) -> tuple[Float[Array, "B T values"], DeltaCache | None]:
        """Return the result, and `cache` after the new tokens.

        Args:
            mixed: queries, keys and values side by side, before the convolution.
            gate: of the result.
            strength, decay: before their activations.
            segment_ids: of the tokens.
            cache: of the tokens before these. None: there are none, and none is returned.
        """
        own, heads = self.options, (self.options.num_value_heads,)
        filters = self.param(
            "filters", nn.initializers.normal(self.init_scale), (own.channels, 1, own.taps), self.param_dtype
        )
        decay_log = self.param("decay_log", start_decay, heads)
        decay_bias = self.param("decay_bias", nn.initializers.ones, heads, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (own.value_dim,), jnp.float32)
        # All tokens of a sequence lie on one device: each of them reads the state of those before it.
        mixed, filters = vary_alike(constrain(mixed, "BSF"), filters.astype(jnp.float32))
        mixed, window = causal_conv(mixed, filters, segment_ids, None if cache is None else cache.window)
        decay, decay_log, decay_bias = vary_alike(decay.astype(jnp.float32), decay_log, decay_bias)
        decay = -broadcast_last(jnp.exp(decay_log), decay) * jax.nn.softplus(decay + broadcast_last(decay_bias, decay))
        tokens = self.by_head(jax.nn.silu(mixed), decay, jax.nn.sigmoid(strength.astype(jnp.float32)))
        rule = delta_rule_steps if mixed.shape[1] == 1 else chunked_delta_rule
        out, state = rule(tokens, segment_ids, None if cache is None else cache.state)
        out = rms_norm(*vary_alike(out, scale.astype(jnp.float32)), self.norm_eps)
        out = out.reshape(gate.shape) * jax.nn.silu(gate.astype(jnp.float32))
        out = checkpoint_name(constrain(out.astype(gate.dtype), "BTF"), self.saved_name)
        if cache is None or window is None:
            return out, None
        return out, DeltaCache(window, lay_out_state(state))

    def by_head(
        self,
        mixed: Float[Array, "B T channels"],
        log_decay: Float[Array, "B T heads"],
        strength: Float[Array, "B T heads"],
    ) -> DeltaTokens:
        """Return what the rule reads: queries and keys of length 1 by key head, the rest by value head."""
        own = self.options
        B, T, K = *mixed.shape[:2], own.num_key_heads
        query, key, value = jnp.split(mixed.astype(jnp.float32), (own.keys, 2 * own.keys), axis=-1)
        query, key = (unit_length(constrain(x.reshape(B, T, K, own.key_dim), "BSKH")) for x in (query, key))
        return DeltaTokens(
            query * own.key_dim**-0.5,
            key,
            constrain(value.reshape(B, T, K, -1, own.value_dim), "BSKRH"),
            *(constrain(x.reshape(B, T, K, -1), "BSKR") for x in (log_decay, strength)),
        )


def unit_length(x: Float[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Return `x / sqrt(sum(x^2) + eps)`."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
