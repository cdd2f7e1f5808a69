"""Print what one update does to p(y*), p(y) and the reward, and where objectives rest: the tables of docs/method.md.

    python benchmarks/objective_facts.py
    python benchmarks/objective_facts.py --student FOLDER --rows FILE [--separator TOKEN] [--learning_rate 1e-5]

- free logits: random contexts, a small step on the logits of each.
- fixed points: the distribution at which the mean gradient over ghosts y* ~ q vanishes.
- student: one AdamW step of a pretrained student on one batch of rows, instead of these. Needs the whole package.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo import Nll, Objective, Pair, TokenInputs, TrainState, make_optimizer, make_sft_step
from cotgrpo.objectives import num_draws

OBJECTIVES: Mapping[str, Objective] = {
    "`Nll()`": Nll(),
    "`Pair()`, the default": Pair(),
    "`Pair(nll_weight=0, pair_weight=1)`": Pair(nll_weight=0.0, pair_weight=1.0),
    '`Pair(beta=0.5, negatives="calibrated")`': Pair(beta=0.5, negatives="calibrated"),
    'the pair alone, `estimator="drawn"`': Pair(nll_weight=0.0, pair_weight=1.0, estimator="drawn"),
}
CONTEXTS, VOCABULARY = 20_000, 50


def free_logits(objective: Objective, sharpness: float) -> tuple[float, float, float]:
    """Return how often p(y*) and R rise and p(y) falls by a small step, for y ~ p other than the random ghost."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(sharpness * rng.normal(size=(CONTEXTS, VOCABULARY)))
    p = np.asarray(jax.nn.softmax(logits))
    ghosts = rng.integers(VOCABULARY, size=CONTEXTS)
    drawn = np.array([rng.choice(VOCABULARY, p=row / row.sum()) for row in p])

    @jax.jit
    @jax.vmap
    def change(z: jax.Array, ghost: jax.Array, y: jax.Array) -> jax.Array:
        token = TokenInputs(ghost, jnp.float32(1.0), y if num_draws(objective) else None)
        slope = jax.grad(lambda z: objective(z, token)[0])(z)
        gain = jax.nn.log_softmax(z - 1e-5 * slope) - jax.nn.log_softmax(z)
        return jnp.stack([gain[ghost], gain[y]])

    other = drawn != ghosts
    ghost_gain, drawn_gain = np.asarray(change(logits, jnp.asarray(ghosts), jnp.asarray(drawn)))[other].T
    return shares(ghost_gain, drawn_gain)


def shares(ghost_gain: np.ndarray, drawn_gain: np.ndarray) -> tuple[float, float, float]:
    """Return how often p(y*) and R rise and p(y) falls."""
    rises, gains, falls = ghost_gain > 0, ghost_gain > drawn_gain, drawn_gain < 0
    return float(np.mean(rises)), float(np.mean(gains)), float(np.mean(falls))


def resting_point(q: np.ndarray, objective: Objective) -> np.ndarray:
    """Return the distribution that gradient descent over ghosts y* ~ q comes to."""

    def mean_gradient(z: jax.Array) -> jax.Array:
        one = lambda ghost: jax.grad(lambda z: objective(z, TokenInputs(ghost, jnp.float32(1.0)))[0])(z)
        return jnp.asarray(q) @ jax.vmap(one)(jnp.arange(len(q)))

    scale = jnp.asarray(1 / (q + 1 / len(q)))  # unlikely tokens move as fast as likely ones
    descend = jax.jit(lambda z: jax.lax.fori_loop(0, 20_000, lambda _, z: z - 0.3 * scale * mean_gradient(z), z))
    return np.asarray(jax.nn.softmax(descend(jnp.log(jnp.asarray(q)))))


def entropy(q: np.ndarray) -> float:
    return float(-np.sum(q * np.log(q)))


def fixed_points() -> list[str]:
    """Return rows: a ghost distribution q, and for each objective the likeliest token's p, entropy and KL(q || p)."""
    zipf = 1 / np.arange(1, 201) ** 1.5
    ghosts = {
        "0.9, 0.1": np.array([0.9, 0.1]),
        "0.5, 0.3, 0.2": np.array([0.5, 0.3, 0.2]),
        "0.99, 0.01": np.array([0.99, 0.01]),
        "200 tokens, rank^-1.5": zipf / zipf.sum(),
    }
    rows = []
    for name, q in ghosts.items():
        for which, objective in OBJECTIVES.items():
            if num_draws(objective) or isinstance(objective, Nll):
                continue
            p = resting_point(q, objective)
            kl = float(np.sum(q * np.log(q / p)))
            numbers = (f"{x:.3f}" for x in (q[0], p[0], entropy(q), entropy(p)))
            rows.append(f"| {name} | {which} | {' | '.join(numbers)} | {max(kl, 0):.4f} |")
    return rows


def one_update(args: argparse.Namespace, objective: Objective) -> tuple[float, float, float, int]:
    """Return how often p(y*) and R rise and p(y) falls in a batch by one AdamW step on it, and the contexts."""
    from cotgrpo.data.batches import make_batches, make_examples
    from cotgrpo.data.template import Template
    from cotgrpo.data.tokenizer import load_tokenizer
    from cotgrpo.data.triples import read_triples
    from cotgrpo.models import load_pretrained

    model = load_pretrained(args.student, "float32")
    template = Template(load_tokenizer(args.tokenizer or args.student), args.separator, "completion")
    examples, _ = make_examples(read_triples(args.rows)[0][:50], template, 512, too_long="drop")
    batch = next(make_batches(examples, batch_size=1, seq_len=512, packing=True, seed=0))
    tx = make_optimizer(learning_rate=args.learning_rate, total_steps=10, schedule="constant")

    def log_probs(params: object) -> jax.Array:
        logits = model.student.logits(params, batch.tokens, batch.positions, batch.segment_ids)
        return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))

    before = jax.jit(log_probs)(model.params)
    drawn = jax.random.categorical(jax.random.key(1), before)
    state, _ = jax.jit(make_sft_step(model.student, tx, objective))(
        TrainState.create(params=model.params, tx=tx, key=0), batch
    )
    gain = jax.jit(log_probs)(state.params) - before
    counted = (np.asarray(batch.loss_mask) > 0) & (np.asarray(drawn) != np.asarray(batch.targets))
    ghost_gain, drawn_gain = (
        np.take_along_axis(np.asarray(gain), np.asarray(ids)[..., None], -1)[..., 0][counted]
        for ids in (batch.targets, drawn)
    )
    return (*shares(ghost_gain, drawn_gain), int(counted.sum()))


def print_head(*columns: str) -> None:
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="folder of a pretrained student")
    parser.add_argument("--tokenizer", help="folder of its tokenizer (default: the student's)")
    parser.add_argument("--rows", help="file of question, rationale, answer")
    parser.add_argument("--separator", default="<sep>", help="between question, rationale and answer")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args(argv)
    if (args.student is None) != (args.rows is None):
        parser.error("--student and --rows belong together.")
    if args.student is None:
        with jax.enable_x64(True):
            print_head("objective", "logits", "p(y*) rises", "R rises", "p(y) falls")
            for name, objective in OBJECTIVES.items():
                for sharpness in (0.5, 2.0, 5.0):
                    found = free_logits(objective, sharpness)
                    print(f"| {name} | {sharpness:g} N(0, 1) | " + " | ".join(f"{x:.1%}" for x in found) + " |")
            print_head("ghosts q", "objective", "q of the first", "p", "entropy of q", "of p", "KL(q, p)")
            print("\n".join(fixed_points()))
        return
    print_head("objective, one AdamW step", "contexts with y != y*", "p(y*) rises", "R rises", "p(y) falls")
    for name, objective in OBJECTIVES.items():
        if not num_draws(objective):
            *parts, count = one_update(args, objective)
            print(f"| {name} | {count} | " + " | ".join(f"{x:.0%}" for x in parts) + " |")


if __name__ == "__main__":
    main()
