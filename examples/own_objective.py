"""Write an objective of your own, with a per-token array of its own, check it, and train with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotgrpo import SftBatch, TokenInputs, TrainState, jit_step, make_sft_step
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.testing import check_objective

V, B, T = 32, 8, 24
CONFIG = DecoderConfig(vocab_size=V, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96)


@dataclasses.dataclass(frozen=True)
class Focal:
    """-trust (1 - p(y*))^gamma log p(y*): likely ghosts count less (Lin et al. 2017), and each token has its trust."""

    gamma: float = 1.0

    num_draws = 0  # no token y is drawn
    batch_fields = ("trust",)  # must be in the batch's `extra`

    def __call__(self, logits_V: jax.Array, token: TokenInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of one token, and what is to be averaged over tokens."""
        log_p = jax.nn.log_softmax(logits_V)[token.ghost]
        rest = jnp.maximum(1 - jnp.exp(log_p), 0.0)
        return -token["trust"] * rest**self.gamma * log_p, {"ghost_prob": jnp.exp(log_p)}


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V. A tenth of the targets is wrong, and trusted less."""
    rng = np.random.default_rng(seed)
    text = np.asarray((rng.integers(V, size=(B, 1)) + np.arange(T + 1)) % V, np.int32)
    wrong = rng.random((B, T)) < 0.1
    targets = np.where(wrong, rng.integers(V, size=(B, T)), text[:, 1:]).astype(np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T), np.int32)
    return SftBatch(text[:, :-1], targets, places, ones, ones.astype(np.float32), {"trust": np.float32(~wrong)})


def main() -> tuple[float, float]:
    """Train for 60 steps. Return the first and the last loss."""
    check_objective(Focal(), extra={"trust": 0.5}, num_cases=3)  # belongs into your tests
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(make_student(CONFIG), tx, Focal(), micro_batches=2))
    state = TrainState.create(params=init_params(CONFIG, jax.random.key(0)), tx=tx, key=0)
    losses = []
    for number in range(60):
        state, metrics = step(state, count_up(number))
        losses.append(metrics["loss"].mean())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, p(y*) {metrics['ghost_prob'].mean():.2f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
