"""Choosing a token from logits: the likeliest, or one drawn from their distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cotgrpo.sharding import constrain
from cotgrpo.types import at_least_float32

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int, PRNGKeyArray

    Units = tuple[Int[Array, "*shape"], Float[Array, "*shape"]]
    """A number as the sum of an int32 and a float, which has more digits than either."""

DRAW_BLOCK = 256
"""Block width of the two-level inverse CDF: one cumulative sum over V / 256 block sums, then one over a block."""

UNITS = 2**30
"""The total probability, about. A unit has `PARTS` parts. Both are int32, so cumulative sums are exact to 2^-42."""
PARTS = 2**12

NUMBERS = 2**23
"""The numbers in [0, 1) that `jax.random.uniform` returns in float32."""
LOWER_BITS = 0x6C6F7762
"""Folded into a key for the bits below."""


def likeliest(logits_V: Float[Array, "V"]) -> Int[Array, ""]:
    """Return `argmax`: the first of equal logits, the last of NaNs.

    It is written as two reductions, since XLA's CPU compiler vectorizes each of them but not `jnp.argmax`.
    """
    id_V = jnp.arange(logits_V.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_V == jnp.max(logits_V), id_V, logits_V.shape[0] - 1))


def draw_uniform(key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Float[Array, "*shape 2"]:
    """Return random numbers in [0, 1) for `draw`, float32 pairs: 23 random bits, and the next 23 bits."""
    keys = (key, jax.random.fold_in(key, LOWER_BITS))
    return jnp.stack([jax.random.uniform(k, shape, jnp.float32) for k in keys], axis=-1)


def draw(
    logits_V: Float[Array, "V"], uniform_G: Float[Array, "G"] | Float[Array, "G 2"], parts: int = 1
) -> Int[Array, "G"]:
    """Draw y ~ softmax(logits) by inverse CDF, from one uniform number a token.

    The unnormalized probabilities are summed in blocks. The block is found in the cumulative block sums, then the
    token in the cumulative sum of that block. This is one pass over the vocabulary. The result depends only on the
    logits and the number.

    One float32 number has 23 random bits. So a token of probability 1e-6 is drawn up to 12 % too often or too rarely.
    With the 46 bits of a pair the error is below 0.1 % for every probability above 1e-9.

    Args:
        logits_V: float32 or float64.
        uniform_G: u in [0, 1), or pairs `(high, low)` of such numbers from `draw_uniform`: u = high + 2^-23 low.
        parts: number of equal parts of the vocabulary on devices of their own. A block lies on one device then, and
            only block sums and one block travel. It divides V.

    Returns:
        int32 token ids. A token whose probability underflows to 0 is never returned.
    """
    logits_V = logits_V.astype(at_least_float32(logits_V))
    vocab = logits_V.shape[0]
    part = vocab // parts
    num_blocks = -(-part // DRAW_BLOCK)  # of each part
    mass_V = jnp.exp(logits_V - jnp.max(logits_V))
    mass_parts = mass_V if parts == 1 else mass_V.reshape(parts, part)
    padding = ((0, 0),) * (parts > 1) + ((0, num_blocks * DRAW_BLOCK - part),)
    mass_blocks = jnp.pad(mass_parts, padding).reshape(parts * num_blocks, DRAW_BLOCK)
    block_sums = jnp.sum(mass_blocks, axis=1)
    if parts > 1:
        block_sums = constrain(block_sums, "N")
    scale = UNITS / jnp.sum(block_sums)
    uniform_G2 = uniform_G if uniform_G.ndim == 2 else jnp.stack([uniform_G, jnp.zeros_like(uniform_G)], axis=-1)
    high_G, low_G = jnp.moveaxis(uniform_G2, -1, 0)
    # A product with a power of two is exact.
    whole_G, rest_G = split(UNITS * high_G)
    target_G = (whole_G, (rest_G + (UNITS // NUMBERS) * low_G).astype(mass_V.dtype))
    find = jax.vmap(invert_cdf, in_axes=(None, None, 0))
    block_G, within_G = find(block_sums * scale, jnp.asarray(UNITS, mass_V.dtype), target_G)
    token_G, _ = jax.vmap(invert_cdf)(mass_blocks[block_G] * scale, block_sums[block_G] * scale, within_G)
    first_G = block_G * DRAW_BLOCK
    if parts > 1:  # each part before this one has padding behind it
        first_G = first_G - block_G // num_blocks * (num_blocks * DRAW_BLOCK - part)
    return jnp.minimum(first_G + token_G, vocab - 1)  # NaN logits may lead behind the vocabulary


def split(units: Float[Array, "*shape"]) -> Units:
    """Return the integer below a number, and the rest in [0, 1)."""
    whole = jnp.floor(units)
    return whole.astype(jnp.int32), units - whole


def invert_cdf(mass_K: Float[Array, "K"], total: Float[Array, ""], target: Units) -> tuple[Int[Array, ""], Units]:
    """Return the first index k at which the cumulative mass is above a target, and how far the target is in k's share.

    The cumulative sum is made of integers. In float32 it would lose each mass below 2^-24 of the total, and be another
    one on another device.

    Args:
        mass_K: masses in units, whose sum is below 2^31.
        total: about the sum of the masses. It is what the target is a part of.
        target: in [0, total).
    """
    whole_K, rest_K = split(mass_K)
    part_K = jnp.floor(PARTS * rest_K).astype(jnp.int32)
    whole_upto_K, part_upto_K = jnp.cumsum(whole_K, dtype=jnp.int32), jnp.cumsum(part_K, dtype=jnp.int32)
    whole_upto_K, part_upto_K = whole_upto_K + part_upto_K // PARTS, part_upto_K % PARTS
    as_float = lambda x: x.astype(mass_K.dtype)

    # The total was rounded, and the masses too. The target moves along, so that all of [0, total) is covered evenly.
    whole, rest = split(total)
    excess = as_float(whole_upto_K[-1] - whole) + (as_float(part_upto_K[-1]) / PARTS - rest)
    whole, rest = target
    more, rest = split(rest + as_float(whole) * (excess / total))
    whole, part = whole + more, jnp.floor(PARTS * rest).astype(jnp.int32)

    below_K = (whole_upto_K < whole) | ((whole_upto_K == whole) & (part_upto_K <= part))
    has_share_K = (whole_K > 0) | (part_K > 0)
    possible_K = jnp.where(jnp.any(has_share_K), has_share_K, mass_K > 0)
    # The last index with mass, so that a target rounded up to the total cannot fall off the end or onto mass 0.
    last = jnp.max(jnp.where(possible_K, jnp.arange(mass_K.shape[0], dtype=jnp.int32), 0))
    index = jnp.minimum(jnp.sum(below_K, dtype=jnp.int32), last)
    whole_before = whole_upto_K[index] - whole_K[index]
    part_before = part_upto_K[index] - part_K[index]
    return index, (whole - whole_before, rest - as_float(part_before) / PARTS)
