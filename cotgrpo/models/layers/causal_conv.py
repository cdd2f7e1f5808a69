"""A causal depthwise convolution over packed sequences, with a window that the next tokens start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.struct
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from cotgrpo.types import Array, Float, Int


class ConvWindow(flax.struct.PyTreeNode):
    """The last inputs of each row, which the convolution of the next tokens reads.

    Attributes:
        inputs: `[B, W, C]`, W is the number of taps less one.
        segment_ids: int32 `[B, W]`, the segment of each input. 0: no input.
    """

    inputs: Float[Array, "B W C"]
    segment_ids: Int[Array, "B W"]

    @classmethod
    def empty(cls, batch: int, taps: int, channels: int, dtype: DTypeLike) -> ConvWindow:
        """Return the window of rows without a token."""
        return cls(jnp.zeros((batch, taps - 1, channels), dtype), jnp.zeros((batch, taps - 1), jnp.int32))


def causal_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "C one taps"],
    segment_ids: Int[Array, "B T"],
    window: ConvWindow | None = None,
) -> tuple[Float[Array, "B T C"], ConvWindow | None]:
    """Return `y_t = sum_d kernel[:, 0, taps - 1 - d] * x_(t - d)` over tokens of t's segment, and the next window.

    A token of segment 0 is padding: its result is 0
    and no token reads it. Padding lies before or after a segment, never inside.

    Args:
        x: the inputs.
        kernel: one filter for each channel, as torch stores them.
        segment_ids: of the tokens.
        window: the inputs before these. None: there are none, and none are returned.
    """
    taps, T = kernel.shape[2], x.shape[1]
    before = ConvWindow.empty(len(x), taps, x.shape[2], x.dtype) if window is None else window
    inputs = jnp.concatenate([before.inputs.astype(x.dtype), x], axis=1)
    segments = jnp.concatenate([before.segment_ids, segment_ids], axis=1)
    y = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        same = (segments[:, tap : tap + T] == segment_ids) & (segment_ids > 0)
        y += jnp.where(same[:, :, None], inputs[:, tap : tap + T] * kernel[None, None, :, 0, tap], 0)
    return y.astype(x.dtype), None if window is None else last_inputs(inputs, segments, taps - 1)


def last_inputs(x: Float[Array, "B S C"], segment_ids: Int[Array, "B S"], count: int) -> ConvWindow:
    """Return the `count` columns of each row that end with its last token, or its last columns if it has none."""
    columns = x.shape[1]
    padding = jnp.argmax(segment_ids[:, ::-1] > 0, axis=1)  # columns after the last token
    index = jnp.maximum(columns - count + jnp.arange(count)[None] - padding[:, None], 0)
    return ConvWindow(
        jnp.take_along_axis(x, index[:, :, None], axis=1), jnp.take_along_axis(segment_ids, index, axis=1)
    )
