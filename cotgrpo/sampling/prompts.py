"""What a sampler reads and writes: left-padded prompts and right-padded replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import flax.struct
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from cotgrpo.types import AnyArray


class Prompts(flax.struct.PyTreeNode):
    """Prompts of different length in one array. They are padded on the left, so all replies start in the same column.

    Attributes:
        tokens: int32 `[B, T]`.
        lengths: int32 `[B]`. The last `lengths[b]` tokens of row b are its prompt.
            A row of length 0 has no prompt and gets no reply. Such rows come last.
    """

    tokens: Int[AnyArray, "B T"]
    lengths: Int[AnyArray, "B"]


class Replies(flax.struct.PyTreeNode):
    """What a sampler wrote.

    Attributes:
        tokens: int32 `[B, T]`. The eos token is part of a reply, and `pad_id` follows it.
        log_probs: float32 `[B, T]`, log p(token) in the student's own distribution; 0 after the end.
        lengths: int32 `[B]`, tokens of each reply, the eos token included.
        finished: bool `[B]`, True if the reply ends with eos, False if it was cut off at `max_new_tokens`.
    """

    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]


def pad_prompts(
    prompts: Sequence[np.ndarray], *, length: int | None = None, rows: int | None = None, pad_id: int = 0
) -> Prompts:
    """Pad prompts on the left into one NumPy array.

    Fix `length` and `rows` to keep a jitted sampler from compiling for each new shape.

    Args:
        prompts: int `[n]` each, n >= 1.
        length: columns of the array. None: the length of the longest prompt.
        rows: rows of the array, at least one per prompt. The others hold no prompt. None: one per prompt.
        pad_id: any token. It is never read.

    Raises:
        ValueError: no prompts or too many prompts, or a prompt is empty or longer than `length`.
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
