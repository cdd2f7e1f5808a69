"""Model FLOPs utilization (MFU): a model's operations over those that the device could do in the same time.

The device's rate is measured: that of large square matrix products in the compute type.
The best that XLA reaches is then 1 on any device, be it a laptop, a GPU that throttles or a TPU.
Papers divide by the data sheet's peak instead, which gives a smaller number.
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
    """Measure the operations per second of one device in a chain of large square matrix products.

    It is the best of five runs after one to warm up, and is measured once per process and type.
    """
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
    """Operations of a train step, per token.

    Attributes:
        token: model FLOPs of one token without the head, as if each row were one document. Padding does not count.
        supervised: model FLOPs of the head for one token with a loss.
        rate: operations per second of all devices together.
    """

    token: float
    supervised: float
    rate: float

    @classmethod
    def of(cls, decoder: DecoderConfig, seq_len: int, *, frozen: bool = False, devices: int = 1) -> StepFlops:
        """Count the operations of a decoder, on `devices` devices like this one.

        `frozen` means that adapters are trained and the decoder's own weights are not.
        """
        without = Work(decoder, tokens=1, seq_len=seq_len, supervised=0.0, frozen=frozen)
        head = dataclasses.replace(without, supervised=1.0).model_flops - without.model_flops
        return cls(without.model_flops, head, devices * matrix_rate(decoder.dtype))

    def mfu(self, tokens: float, supervised: float, seconds: float) -> float:
        """Return the share of `rate` that a step with these numbers of real and supervised tokens reached.

        Work around the step, such as rollouts, counts as time but not as operations.
        """
        return (self.token * tokens + self.supervised * supervised) / (seconds * self.rate)
