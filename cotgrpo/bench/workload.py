"""Decoders with the shapes of known models, and batches of random tokens."""

from __future__ import annotations

import numpy as np

from cotgrpo.models.config import DecoderConfig
from cotgrpo.types import SftBatch

SHAPES = {
    "tiny": DecoderConfig(512, 64, 2, 4, 2, 16, 192),
    "16m": DecoderConfig(8_192, 384, 8, 6, 2, 64, 1_024),
    "smollm2-135m": DecoderConfig(49_152, 576, 30, 9, 3, 64, 1_536),
    "qwen2.5-0.5b": DecoderConfig(151_936, 896, 24, 14, 2, 64, 4_864, biases=("query", "key", "value")),
    "llama-3.2-1b": DecoderConfig(128_256, 2_048, 16, 32, 8, 64, 8_192),
    "qwen3-1.7b": DecoderConfig(151_936, 2_048, 28, 16, 8, 128, 6_144, qk_norm=True),
    "llama-3-8b": DecoderConfig(128_256, 4_096, 32, 32, 8, 128, 14_336, tied_head=False),
}
"""Sizes only. Rotary base, norm epsilon and context length are the defaults, which cost the same."""


def random_batch(config: DecoderConfig, batch: int, seq: int, supervised: float = 1.0, seed: int = 0) -> SftBatch:
    """Return full rows of random tokens, one document each, as NumPy arrays.

    The last `supervised` share of each row carries a loss.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (batch, seq + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (batch, seq))
    return SftBatch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=positions,
        segment_ids=np.ones((batch, seq), np.int32),
        loss_mask=(positions >= round(seq * (1 - supervised))).astype(np.float32),
    )
