"""Choosing a token from logits: the likeliest, or one drawn from their distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

DRAW_BLOCK = 256
"""Block width of the two-level inverse CDF: one cumulative sum over V / 256 block sums, then one over a block."""


def likeliest(logits_V: Float[Array, "V"]) -> Int[Array, ""]:
    """Return `argmax`: the first of equal logits, the last of NaNs.

    It is written as two reductions, since XLA's CPU compiler vectorizes each of them but not `jnp.argmax`.
    """
    id_V = jnp.arange(logits_V.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_V == jnp.max(logits_V), id_V, logits_V.shape[0] - 1))


def draw(logits_V: Float[Array, "V"], uniform_G: Float[Array, "G"]) -> Int[Array, "G"]:
    """Draw y ~ softmax(logits) by inverse CDF, from one uniform number a token.

    The unnormalized probabilities are summed in blocks. The block is found in the cumulative block sums, then the
    token in the cumulative sum of that block. This is one pass over the vocabulary. The result depends only on the
    logits and the number.

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
    block_G, rest_G = jax.vmap(invert_cdf, in_axes=(None, 0))(block_sums, uniform_G)
    token_G, _ = jax.vmap(invert_cdf)(mass_blocks[block_G], rest_G)
    return block_G * DRAW_BLOCK + token_G


def invert_cdf(mass_K: Float[Array, "K"], uniform: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Return the index k at which the cumulative mass passes `uniform * total`, and the rest inside k's share."""
    upper_K = jnp.cumsum(mass_K)
    target = uniform * upper_K[-1]
    # The last index with mass, so that a target rounded up to the total cannot fall off the end or onto mass 0.
    last = mass_K.shape[0] - 1 - jnp.argmax(mass_K[::-1] > 0)
    index = jnp.minimum(jnp.sum(upper_K <= target), last)
    share = mass_K[index]
    rest = (target - (upper_K[index] - share)) / share
    return index.astype(jnp.int32), jnp.clip(rest, 0.0, 1.0)
