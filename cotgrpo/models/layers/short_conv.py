"""A gated short convolution, which mixes the tokens in place of attention (LFM2, arXiv:2511.23404).

With b, c, v three projections of the layer's input, it is `out(c * conv(b * v))`: the convolution is causal, has one
filter for each channel, and reads a few tokens of the same segment. While tokens are decoded, a layer keeps the inputs
of the last of them, its `ConvWindow`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from cotgrpo.models.layers.causal_conv import ConvWindow, causal_conv
from cotgrpo.models.norm_and_gate import broadcast_last
from cotgrpo.sharding import constrain, vary_alike

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from cotgrpo.models.layers.options import ShortConv
    from cotgrpo.types import Array, Float, Int


class GatedShortConv(nn.Module):
    """The three projections, side by side, to what is projected into the residual stream."""

    options: ShortConv
    param_dtype: DTypeLike
    init_scale: float

    @nn.compact
    def __call__(
        self, projected: Float[Array, "B T three_D"], segment_ids: Int[Array, "B T"], window: ConvWindow | None
    ) -> tuple[Float[Array, "B T D"], ConvWindow | None]:
        before, after, value = (constrain(x, "BTF") for x in jnp.split(projected, 3, axis=-1))
        channels = value.shape[-1]
        start = nn.initializers.normal(self.init_scale)
        filters = self.param("filters", start, (channels, 1, self.options.taps), self.param_dtype)
        inputs, filters = vary_alike(before * value, filters.astype(jnp.float32))
        mixed, window = causal_conv(inputs, filters, segment_ids, window)
        if self.options.bias:
            bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
            mixed = mixed + broadcast_last(bias.astype(mixed.dtype), mixed)
        return after * mixed, window
