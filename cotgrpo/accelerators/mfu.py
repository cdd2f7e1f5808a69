"""Model FLOPs utilization: the operations that a model's maths asks for, over those that the device could have done in the same time.

What the device could do is measured here, as the rate of large square matrix products in the compute type, and not read from a data sheet: the number then
means the same on a laptop, a GPU that throttles and a TPU, and the best that XLA reaches on the device is 1. A data sheet's peak, as papers quote it, gives
a smaller number, by the share of the peak that a plain matrix product reaches.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from cotgrpo.accelerators.roofline import Work
from cotgrpo.models.config import DecoderConfig


@functools.cache
def matrix_rate(dtype: str) -> float:
    """Operations a second of one device in a chain of large square matrix products: the best of five, after one to warm up. Once a process and type."""
    size, chain = (1_024, 4) if jax.default_backend() == "cpu" else (8_192, 16)
    square = jnp.full((size, size), 1 / size, dtype)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, chain, lambda _, y: y @ square, x)).lower(square).compile()
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run(square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return chain * 2 * size**3 / min(seconds[1:])


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """What a train step's operations are counted by.

    Attributes:
        token: model FLOPs of one token, the head aside, as if each row were one document; padding is none.
        supervised: those of the head, for each token that has a loss.
        rate: operations a second of all devices together.
    """

    token: float
    supervised: float
    rate: float

    @classmethod
    def of(cls, decoder: DecoderConfig, seq_len: int, *, frozen: bool = False, devices: int = 1) -> StepFlops:
        """The count of a decoder on so many devices like the one here; `frozen`: adapters are trained beside frozen weights."""
        without = Work(decoder, tokens=1, seq_len=seq_len, supervised=0.0, frozen=frozen)
        head = dataclasses.replace(without, supervised=1.0).model_flops - without.model_flops
        return cls(without.model_flops, head, devices * matrix_rate(decoder.dtype))

    def mfu(self, tokens: float, supervised: float, seconds: float) -> float:
        """The share of `rate` that a step of so many real and supervised tokens reached; what stands around the step (rollouts) counts as time alone."""
        return (self.token * tokens + self.supervised * supervised) / (seconds * self.rate)
