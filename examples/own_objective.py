"""Write an objective of your own with a per-token array, and a loss of whole replies on top of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cotgrpo import SequenceInputs, SftBatch, TokenInputs, TrainState, jit_step, make_sft_step
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.testing import check_objective

V, B, T = 32, 8, 24
CONFIG = DecoderConfig(vocab_size=V, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96)


@dataclasses.dataclass(frozen=True)
class Focal:
    """-trust (1 - p(y*))^gamma log p(y*): likely ghosts count less (Lin et al. 2017), and each token has its trust."""

    gamma: float = 1.0
    num_draws, batch_fields = 0, ("trust",)  # no token y is drawn; "trust" must be in the batch's `extra`

    def __call__(self, logits_V: jax.Array, token: TokenInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_p = jax.nn.log_softmax(logits_V)[token.ghost]
        return -token["trust"] * (1 - jnp.exp(log_p)) ** self.gamma * log_p, {"ghost_prob": jnp.exp(log_p)}


def valued(reply: SequenceInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean loss of a reply's tokens, times the value of the reply: long replies count no more than short."""
    return reply.field("value") * reply.mean(reply.losses), {"value": reply.field("value")}


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V. A tenth of the targets is wrong, and not trusted."""
    rng = np.random.default_rng(seed)
    text = np.asarray((rng.integers(V, size=(B, 1)) + np.arange(T + 1)) % V, np.int32)
    wrong = rng.random((B, T)) < 0.1
    targets = np.where(wrong, rng.integers(V, size=(B, T), dtype=np.int32), text[:, 1:])
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones, value = np.ones((B, T), np.int32), np.tile(np.linspace(0.5, 1.5, B, dtype=np.float32)[:, None], T)
    fields = {"trust": np.float32(~wrong), "value": value}  # what is of a reply stands at each of its tokens
    return SftBatch(text[:, :-1], targets, places, ones, np.float32(ones), fields)


def main() -> tuple[float, float]:
    """Train for 60 steps. Return the first and the last loss."""
    check_objective(Focal(), extra={"trust": 0.5}, num_cases=3)  # belongs into your tests
    tx = optax.adamw(3e-3)
    step = jit_step(make_sft_step(make_student(CONFIG), tx, Focal(), sequence_loss=valued))
    state = TrainState.create(params=init_params(CONFIG, jax.random.key(0)), tx=tx, key=0)
    state, start = step(state, count_up(0))
    for seed in range(1, 60):
        state, metrics = step(state, count_up(seed))
    first, last = start["loss"].mean(), metrics["loss"].mean()
    print(f"loss {first:.3f} -> {last:.3f}, p(y*) {metrics['ghost_prob'].mean():.2f}")
    return first, last


if __name__ == "__main__":
    main()
