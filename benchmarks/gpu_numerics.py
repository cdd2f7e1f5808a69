"""Check this device's numbers: the tiled loss, whole steps, drawing and the key/value cache against the CPU in float32.

    python benchmarks/gpu_numerics.py --json FILE

There is one row for each number compared: the loss and every gradient, for each objective and precision.

    float32     matrix products at precision "highest": true float32
    tf32        float32 arrays at the default precision, for which a GPU may use TF32 (10 bits); not on a CPU
    bfloat16    bfloat16 compute, float32 parameters

All start from the same values, rounded to bfloat16 where the tiled loss reads them. So a row shows what computing lost.
The error of an array is `|got - want| / |want|` (Euclidean norms). The error of a loss is the difference of its mean
over tokens, divided by the mean if that is above 1. The exit code is 1 if a row is above its tolerance.

The CPU must be visible as a second backend: leave JAX_PLATFORMS unset, or set it to "cuda,cpu". The script needs only
jax, flax, optax and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cotgrpo
from cotgrpo import ForwardKl, Nll, Pair, ReferenceKl, Reinforce, RewardGradient, TokenInputs, ghost_reward, objectives
from cotgrpo.models.config import Dtype
from cotgrpo.models.decoder import DecoderConfig, decode, init_cache, init_params, make_student
from cotgrpo.tiled_loss import Reference, tiled_loss

OBJECTIVES: dict[str, Any] = {
    "nll": Nll(),
    "pair": Pair(),
    "pair_calibrated": Pair(beta=0.5, negatives="calibrated"),
    "pair_drawn": Pair(estimator="drawn", samples=2),
    "reward_gradient": RewardGradient(samples=2),
    "reinforce": Reinforce(),
    "reference_kl": ReferenceKl(Pair(), 0.3),
    "forward_kl": ForwardKl(),
    "plain_function": lambda logits_V, row: (-ghost_reward(logits_V, row.ghost, row.drawn), {}),
}
PRECISIONS = {"float32": "highest", "tf32": None, "bfloat16": None}
TOLERANCES = {
    # Sums in another order. A step's gradients pass through all layers, forward and backward.
    "float32": {"engine": 2e-5, "step": 1e-4, "decode": 1e-4},
    "tf32": {"engine": 3e-3, "step": 2e-2, "decode": 2e-2},
    "bfloat16": {"engine": 1e-2, "step": 6e-2, "decode": 6e-2},
}
DRAW_TOLERANCE = 1e-2
"""Share of tokens that may be drawn differently.

Their uniform number lies within rounding (1e-7) of one of the V edges between tokens.
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is compared."""

    tokens: int
    width: int
    vocab: int
    batch: int
    seq: int
    decoder: DecoderConfig


FULL = Sizes(2_048, 512, 32_768, 4, 256, DecoderConfig(8_192, 512, 4, 8, 2, 64, 1_536, init_scale=0.05))
SMOKE = Sizes(64, 32, 300, 2, 16, DecoderConfig(128, 32, 2, 4, 2, 8, 64, init_scale=0.1))


def row(part: str, objective: str, precision: str, value: str, error: float, tolerance: float) -> dict[str, Any]:
    return {
        "part": part,
        "objective": objective,
        "precision": precision,
        "value": value,
        "error": error if math.isfinite(error) else None,  # JSON has no NaN
        "tolerance": tolerance,
        "passed": bool(error <= tolerance),  # an error that is NaN fails
    }


def show(row: dict[str, Any]) -> None:
    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    verdict = "yes" if row["passed"] else "NO"
    names = f"{row['part']:8}{row['objective']:17}{row['precision']:11}{row['value']:28}"
    print(f"{names}{error:>10}{row['tolerance']:11.0e}  {verdict}", flush=True)


def precisions(device: Any) -> dict[str, str | None]:
    return {name: matmul for name, matmul in PRECISIONS.items() if name != "tf32" or device.platform != "cpu"}


def compute(function: Callable[..., Any], *args: Any, device: Any, precision: str | None = "highest") -> Any:
    """Run `function(*args)` jitted on `device`; return its results as NumPy arrays in float64."""
    context = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    with jax.default_device(device), context:
        result = jax.jit(function)(*jax.device_put(args, device))
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), result)


def array_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def loss_error(got_sum: Any, want_sum: Any, weight: float) -> float:
    return float(abs(got_sum - want_sum) / weight / max(1.0, abs(want_sum) / weight))


def distribution(rng: np.random.Generator, shape: tuple[int, ...], vocab: int, top_k: int) -> dict[str, Any]:
    """Return the likeliest tokens of a ghost at each context, for objectives that read them."""
    if not top_k:
        return {}
    ids = (rng.integers(0, vocab, (*shape, 1)) + 37 * np.arange(top_k)) % vocab
    q = rng.dirichlet(np.ones(top_k + 1), shape)[..., :top_k]
    return {"top_ids": ids.astype(np.int32), "top_log_probs": np.log(q).astype(np.float32)}


def check_engine(name: str, sizes: Sizes, device: Any, cpu: Any) -> list[dict[str, Any]]:
    """Check `tiled_loss` and its gradients on given draws, so that both sides see the same tokens."""
    rng, objective = np.random.default_rng(0), OBJECTIVES[name]
    N, D, V = sizes.tokens, sizes.width, sizes.vocab
    normal = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
    draws, with_reference = objectives.num_draws(objective), objectives.needs_reference(objective)
    as_inputs: Any = TokenInputs  # NumPy arrays do here
    inputs = as_inputs(
        ghost=rng.integers(0, V, N, dtype=np.int32),
        weight=np.where(rng.random(N) < 0.7, rng.random(N), 0.0).astype(np.float32),
        drawn=rng.integers(0, V, (N, draws), dtype=np.int32) if draws else None,
        extra=distribution(rng, (N,), V, objectives.top_k(objective)),
    )
    rounded: Any = lambda x: x.astype(jnp.bfloat16).astype(np.float32)
    hidden, head = rounded(normal(N, D)), rounded(normal(D, V) * 2 / D**0.5)
    as_reference: Any = Reference
    reference = as_reference(normal(N, D), rounded(normal(D, V) * 2 / D**0.5)) if with_reference else None

    def run(hidden: Any, head: Any, inputs: TokenInputs, reference: Reference | None) -> Any:
        loss = lambda h, w: tiled_loss(objective, h, w, inputs, reference=reference)[0]
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    found = []
    want, want_grads = compute(run, hidden, head, inputs, reference, device=cpu)
    for precision, matmul in precisions(device).items():
        cast = (lambda x: x.astype(jnp.bfloat16)) if precision == "bfloat16" else (lambda x: x)
        got, grads = compute(run, cast(hidden), cast(head), inputs, reference, device=device, precision=matmul)
        tolerance = TOLERANCES[precision]["engine"]
        found.append(row("engine", name, precision, "loss", loss_error(got, want, inputs.weight.sum()), tolerance))
        for value, mine, theirs in zip(("d hidden", "d head"), grads, want_grads, strict=True):
            found.append(row("engine", name, precision, value, array_error(mine, theirs), tolerance))
    return found


def check_step(name: str, sizes: Sizes, device: Any, cpu: Any) -> list[dict[str, Any]]:
    """Check one whole step. The optimizer only keeps the gradient, so the real step made what is compared."""
    rng, objective = np.random.default_rng(1), OBJECTIVES[name]
    B, T, V = sizes.batch, sizes.seq, sizes.decoder.vocab_size
    draws, with_reference = objectives.num_draws(objective), objectives.needs_reference(objective)
    ids = rng.integers(0, V, (B, T + 1), dtype=np.int32)
    half = np.arange(T) >= T // 2  # two documents a row
    batch = cotgrpo.GhostBatch(
        tokens=ids[:, :-1],
        ghost_tokens=ids[:, 1:],
        positions=np.broadcast_to(np.where(half, np.arange(T) - T // 2, np.arange(T)), (B, T)).astype(np.int32),
        segment_ids=np.broadcast_to(1 + half, (B, T)).astype(np.int32),
        loss_mask=(rng.random((B, T)) < 0.7).astype(np.float32),
        drawn_tokens=rng.integers(0, V, (B, T, draws), dtype=np.int32) if draws else None,
        extra=distribution(rng, (B, T), V, objectives.top_k(objective)),
    )
    keep = optax.trace(decay=0.0)
    with jax.default_device(cpu):
        params, other = (init_params(sizes.decoder, jax.random.key(seed)) for seed in (0, 1))
        state = cotgrpo.TrainState.create(params=params, tx=keep, key=0)

    def gradient(dtype: Dtype, at: Any, precision: str | None) -> Any:
        student = make_student(dataclasses.replace(sizes.decoder, dtype=dtype))
        step = cotgrpo.make_grpo_step(student, keep, objective, reference=student if with_reference else None)

        def run(*args: Any) -> Any:
            new_state, metrics = step(*args)
            return metrics["loss"], new_state.opt_state.trace

        args = (state, batch, other) if with_reference else (state, batch)
        return compute(run, *args, device=at, precision=precision)

    found = []
    want, want_grads = gradient("float32", cpu, "highest")
    for precision, matmul in precisions(device).items():
        got, grads = gradient("bfloat16" if precision == "bfloat16" else "float32", device, matmul)
        tolerance = TOLERANCES[precision]["step"]
        error = loss_error(got.total, want.total, float(want.weight))
        found.append(row("step", name, precision, "loss", error, tolerance))
        flat = jax.tree_util.tree_leaves_with_path
        for (path, mine), (_, theirs) in zip(flat(grads), flat(want_grads), strict=True):
            value = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(row("step", name, precision, value, array_error(mine, theirs), tolerance))
    return found


def check_draws(sizes: Sizes, device: Any, cpu: Any) -> list[dict[str, Any]]:
    """Check that the same logits and uniform numbers draw the same tokens."""
    rng = np.random.default_rng(2)
    logits = (3 * rng.normal(size=(sizes.tokens, sizes.vocab))).astype(np.float32)
    uniform = rng.random((sizes.tokens, 2), dtype=np.float32)
    want, got = (compute(jax.vmap(objectives.draw), logits, uniform, device=at) for at in (cpu, device))
    return [row("draw", "-", "float32", "tokens drawn otherwise", float(np.mean(got != want)), DRAW_TOLERANCE)]


def check_decode(sizes: Sizes, device: Any, cpu: Any) -> list[dict[str, Any]]:
    """Check that decoding token by token with the cache gives the forward pass's logits."""
    B, T = sizes.batch, min(sizes.seq, 64)
    tokens = np.random.default_rng(3).integers(0, sizes.decoder.vocab_size, (B, T), dtype=np.int32)
    positions, ones = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), np.ones((B, T), np.int32)
    with jax.default_device(cpu):
        params = init_params(sizes.decoder, jax.random.key(0))
    want = compute(make_student(sizes.decoder).hidden, params, tokens, positions, ones, device=cpu)
    found = []
    for precision, matmul in precisions(device).items():
        dtype: Dtype = "bfloat16" if precision == "bfloat16" else "float32"
        config = dataclasses.replace(sizes.decoder, dtype=dtype)

        def run(params: Any, tokens: Any, config: DecoderConfig = config) -> Any:
            def one(cache: Any, at: Any) -> Any:
                column = lambda x: jnp.broadcast_to(x, (B, 1))
                token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
                rows, cache = decode(config, params, token, column(at), column(jnp.int32(1)), cache, at)
                return cache, rows[:, 0]

            rows_TBD = jax.lax.scan(one, init_cache(config, B, T), jnp.arange(T, dtype=jnp.int32))[1]
            return rows_TBD.swapaxes(0, 1)

        got = compute(run, params, tokens, device=device, precision=matmul)
        error, tolerance = array_error(got, want), TOLERANCES[precision]["decode"]
        found.append(row("decode", "-", precision, "rows", error, tolerance))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", choices=sorted(OBJECTIVES), nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--threads", type=int, default=4, help="checks that compile at the same time")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
    args = parser.parse_args(argv)
    sizes = SMOKE if args.smoke else FULL
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    start = time.perf_counter()
    print(f"{device.device_kind} with jax {jax.__version__}, against float32 on the CPU")
    print(f"{'part':8}{'objective':17}{'precision':11}{'value':28}{'error':>10}{'tolerance':>11}  passed")
    rows: list[dict[str, Any]] = []
    raised: list[str] = []

    def write(complete: bool) -> None:
        """Write the result after each check, so that an interrupted run keeps what it had."""
        if args.json:
            result = {
                "device": device.device_kind,
                "backend": device.platform,
                "jax": jax.__version__,
                "seconds": time.perf_counter() - start,
                "complete": complete,
                "failed": sum(not row["passed"] for row in rows),
                "raised": raised,
                "rows": rows,
            }
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    with ThreadPoolExecutor(args.threads) as pool:
        running = {"draw": pool.submit(check_draws, sizes, device, cpu)}
        running["decode"] = pool.submit(check_decode, sizes, device, cpu)
        for name in args.objectives:
            running[f"engine {name}"] = pool.submit(check_engine, name, sizes, device, cpu)
            running[f"step {name}"] = pool.submit(check_step, name, sizes, device, cpu)
        for name, future in running.items():
            if future.exception() is None:
                for found in future.result():
                    rows.append(found)
                    show(found)
            else:
                raised.append(name)
                print(f"{name} RAISED:")
                traceback.print_exception(future.exception())
            write(complete=False)
    write(complete=True)
    failed = sum(not row["passed"] for row in rows)
    print(
        f"{len(rows)} rows, {failed} above their tolerance, {len(raised)} checks raised, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if failed or raised else 0


if __name__ == "__main__":
    raise SystemExit(main())
