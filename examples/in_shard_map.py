"""Use the tiled loss in a `shard_map` of your own: each device has its rows, and you add up what they found."""

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from cotgrpo import Pair, SftBatch, TokenInputs
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.tiled_loss import tiled_loss

V, B, T = 32, 16, 24


def count_up(seed: int) -> SftBatch:
    """Return sequences that count up by one, modulo V."""
    rng = np.random.default_rng(seed)
    text = np.asarray((rng.integers(V, size=(B, 1)) + np.arange(T + 1)) % V, np.int32)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones((B, T), np.int32)
    return SftBatch(text[:, :-1], text[:, 1:], places, ones, ones.astype(np.float32))


def main() -> tuple[float, float]:
    """Train for 40 steps. Return the first and the last loss."""
    config = DecoderConfig(vocab_size=V, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=96)
    student, params = make_student(config), init_params(config, jax.random.key(0))
    mesh, tx = jax.make_mesh((jax.device_count(),), ("shard",)), optax.adamw(3e-3)

    def loss_sum(params: dict, batch: SftBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows = student.hidden(params, batch.tokens, batch.positions, batch.segment_ids)
        inputs = TokenInputs(ghost=batch.targets, weight=batch.loss_mask)
        return tiled_loss(Pair(), rows, student.head(params), inputs)

    @jax.shard_map(mesh=mesh, in_specs=(P(), P("shard")), out_specs=P())
    def loss_and_grads(params: dict, batch: SftBatch) -> tuple[jax.Array, dict, jax.Array]:
        (loss, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, batch)
        loss, reward, weight = jax.lax.psum((loss, sums["reward"], batch.loss_mask.sum()), "shard")
        # JAX has added up the gradient of `params`, which are the same on each device.
        return loss / weight, jax.tree.map(lambda g: g / weight, grads), reward / weight

    @jax.jit
    def step(params: dict, opt_state: optax.OptState, batch: SftBatch) -> tuple:
        loss, grads, reward = loss_and_grads(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, reward

    opt_state, losses = tx.init(params), []
    for number in range(40):
        batch = jax.device_put(count_up(number), jax.NamedSharding(mesh, P("shard")))
        params, opt_state, loss, reward = step(params, opt_state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, reward {float(reward):.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
