"""The pure steps: accumulation, packing, padding, causality, one compilation, no callbacks, skipped updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import cotgrpo
from cotgrpo import GhostBatch, Metric, Nll, Pair, ReferenceKl, Reinforce, RewardGradient, SftBatch, Student, TrainState
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, make_lora_step
from cotgrpo.objectives import GroupRelative
from cotgrpo.train_steps import COSTLY_UPDATE, primitives

CONFIG = DecoderConfig(vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
B, T = 8, 24


def make_batch(seed: int = 0, batch: int = B, seq: int = T) -> SftBatch:
    """Random documents of random length, one a row, padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (batch, seq + 1)).astype(np.int32)
    real = np.arange(seq)[None, :] < rng.integers(seq // 2, seq + 1, (batch, 1))
    mask = real & (np.arange(seq)[None, :] >= rng.integers(0, seq // 3, (batch, 1)))
    return SftBatch(
        tokens=jnp.asarray(np.where(real, ids[:, :-1], 0)),
        targets=jnp.asarray(np.where(real, ids[:, 1:], 0)),
        positions=jnp.asarray(np.where(real, np.arange(seq, dtype=np.int32), 0)),
        segment_ids=jnp.asarray(real.astype(np.int32)),
        loss_mask=jnp.asarray(mask.astype(np.float32)),
    )


def new_state(tx: optax.GradientTransformation, seed: int = 0) -> TrainState:
    return TrainState.create(params=init_params(CONFIG, jax.random.key(seed)), tx=tx, key=seed)


def run(make: Any, batch: Any, steps: int = 1, tx: Any = None, **options: Any) -> tuple[TrainState, dict[str, Metric]]:
    tx = tx or optax.sgd(0.1)
    step = cotgrpo.jit_step(make(make_student(CONFIG), tx, **options))
    state = new_state(tx)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def assert_same(got: Any, want: Any, **tolerance: float) -> None:
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want), strict=True
    ):
        np.testing.assert_allclose(
            a, b, err_msg=jax.tree_util.keystr(path), **(tolerance or {"rtol": 1e-5, "atol": 1e-6})
        )


def test_sft_step_is_the_mean_nll_and_its_gradient() -> None:
    batch = make_batch()
    params = init_params(CONFIG, jax.random.key(0))

    def mean_nll(params: Any) -> jax.Array:
        logits = make_student(CONFIG).logits(params, batch.tokens, batch.positions, batch.segment_ids)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nll * batch.loss_mask) / jnp.sum(batch.loss_mask)

    loss, grads = jax.value_and_grad(mean_nll)(params)
    state, metrics = run(cotgrpo.make_sft_step, batch, tx=optax.sgd(1.0))
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"].mean(), optax.tree.norm(grads), rtol=1e-5)
    assert_same(state.params, jax.tree.map(lambda p, g: p - g, params, grads))
    assert int(state.step) == 1


def test_sft_is_grpo_with_nll() -> None:
    batch = make_batch()
    sft, sft_metrics = run(cotgrpo.make_sft_step, batch)
    grpo, grpo_metrics = run(cotgrpo.make_grpo_step, GhostBatch.teacher_forced(batch), objective=Nll())
    assert_same(sft.params, grpo.params)
    assert_same(sft_metrics, grpo_metrics)


@pytest.mark.parametrize(
    "objective",
    [Nll(), Pair(), Pair(estimator="drawn", samples=2), RewardGradient(samples=2), Reinforce()],
    ids=["nll", "pair", "pair_drawn", "reward_gradient", "reinforce"],
)
def test_four_micro_batches_are_one_big_batch(objective: Any) -> None:
    """Rows have different numbers of supervised tokens, so a mean of means would be wrong. Draws are the same too."""
    batch = make_batch()
    whole, whole_metrics = run(cotgrpo.make_grpo_step, batch, objective=objective, steps=3)
    parts, parts_metrics = run(cotgrpo.make_grpo_step, batch, objective=objective, steps=3, micro_batches=4)
    assert_same(parts.params, whole.params, rtol=1e-4, atol=1e-6)
    assert_same(parts_metrics, whole_metrics, rtol=1e-4, atol=1e-4)


def test_packed_documents_have_their_own_losses() -> None:
    """Two documents in one row: loss and gradient are those of the two rows apart."""
    apart = make_batch(batch=2)
    lengths = np.asarray(apart.segment_ids.sum(axis=1))
    packed = SftBatch(
        **{
            name: jnp.concatenate([getattr(apart, name)[row, : lengths[row]] for row in range(2)])[None]
            for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask")
        }
    )
    packed = packed.replace(segment_ids=jnp.asarray(np.repeat([1, 2], lengths)[None].astype(np.int32)))
    packed_state, packed_metrics = run(cotgrpo.make_grpo_step, packed)
    state, metrics = run(cotgrpo.make_grpo_step, apart)
    assert_same(packed_state.params, state.params)
    for name in ("loss", "entropy", "reward", "tokens"):
        np.testing.assert_allclose(packed_metrics[name].mean(), metrics[name].mean(), rtol=1e-5)


def test_padding_changes_nothing() -> None:
    batch = make_batch()
    noise = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (B, 16)).astype(np.int32))
    longer = SftBatch(
        **{
            name: jnp.concatenate([getattr(batch, name), jnp.zeros((B, 16), getattr(batch, name).dtype)], axis=1)
            for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask")
        }
    ).replace(tokens=jnp.concatenate([batch.tokens, noise], axis=1))
    state, metrics = run(cotgrpo.make_grpo_step, batch)
    long_state, long_metrics = run(cotgrpo.make_grpo_step, longer)
    assert_same(long_state.params, state.params)
    np.testing.assert_allclose(long_metrics["loss"].mean(), metrics["loss"].mean(), rtol=1e-6)
    assert long_metrics["tokens"].mean() == metrics["tokens"].mean()


def test_one_compilation_over_a_run() -> None:
    traces = 0

    def counting(logits: jax.Array, row: Any) -> Any:
        nonlocal traces
        traces += 1
        return Pair()(logits, row)

    tx = cotgrpo.make_optimizer(learning_rate=1e-3, total_steps=10, warmup_steps=2)
    step = cotgrpo.jit_step(cotgrpo.make_grpo_step(make_student(CONFIG), tx, counting))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **labels: compiled.append(event) if "backend_compile" in event else None
    )
    batches = [make_batch(seed) for seed in range(8)]
    state, _ = step(new_state(tx), batches[0])
    first = traces, len(compiled)
    assert first[1] > 0, "the listener hears of compilations"
    for batch in batches[1:]:
        state, _ = step(state, batch)
    assert (traces, len(compiled)) == first


@pytest.mark.parametrize("make", [cotgrpo.make_sft_step, cotgrpo.make_grpo_step])
def test_no_host_callback_in_the_step(make: Any) -> None:
    tx = cotgrpo.make_optimizer(learning_rate=1e-3, total_steps=10)
    jaxpr = str(jax.make_jaxpr(make(make_student(CONFIG), tx))(new_state(tx), make_batch()))
    assert "scan" in jaxpr and "callback" not in jaxpr and "infeed" not in jaxpr


def test_the_state_is_donated() -> None:
    tx = optax.sgd(0.1)
    step = cotgrpo.jit_step(cotgrpo.make_sft_step(make_student(CONFIG), tx))
    state = new_state(tx)
    step(state, make_batch())
    assert state.params["embedding"].is_deleted()


def test_randomness_follows_key_and_step_alone() -> None:
    batch, objective = make_batch(), RewardGradient()
    first, _ = run(cotgrpo.make_grpo_step, batch, objective=objective)
    again, _ = run(cotgrpo.make_grpo_step, batch, objective=objective)
    assert_same(first.params, again.params, rtol=0.0, atol=0.0)
    tx = optax.sgd(0.1)
    step = cotgrpo.jit_step(cotgrpo.make_grpo_step(make_student(CONFIG), tx, objective))
    later, _ = step(new_state(tx).replace(step=jnp.int32(1)), batch)
    assert not np.allclose(later.params["embedding"], first.params["embedding"], atol=1e-6)


def test_given_draws_are_used() -> None:
    batch = GhostBatch.teacher_forced(make_batch())
    ghosts_drawn, _ = run(
        cotgrpo.make_grpo_step, batch.replace(drawn_tokens=batch.ghost_tokens), objective=RewardGradient()
    )
    start = init_params(CONFIG, jax.random.key(0))
    assert_same(ghosts_drawn.params, start, rtol=0.0, atol=0.0)  # y = y* everywhere: no gradient at all
    other = (batch.ghost_tokens + 1) % CONFIG.vocab_size
    _, one = run(cotgrpo.make_grpo_step, batch.replace(drawn_tokens=other), objective=RewardGradient())
    _, stacked = run(
        cotgrpo.make_grpo_step,
        batch.replace(drawn_tokens=jnp.stack([other, other], -1)),
        objective=RewardGradient(samples=2),
    )
    np.testing.assert_allclose(one["reward"].mean(), stacked["reward"].mean(), rtol=1e-5)
    assert one["match_rate"].mean() == 0


def steep(logits_V: jax.Array, token: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """An objective with a finite loss and, at 0, a gradient that is not finite."""
    return jnp.sqrt(jnp.abs(logits_V[0] - jax.lax.stop_gradient(logits_V[0]))), {}


def set_last(value: float) -> Any:
    """Return a function that puts `value` in one element of the last matrix of a tree."""

    def change(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        last = max(place for place, leaf in enumerate(leaves) if leaf.ndim >= 2)
        leaves[last] = leaves[last].at[(-1,) * leaves[last].ndim].set(value)
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    return change


def make_transform(update: Any, init: Any = lambda params: ()) -> optax.GradientTransformation:
    return optax.GradientTransformation(init, lambda updates, state, params=None: update(updates, state))


def scale_mask(value: float) -> Any:
    return lambda batch: batch.replace(loss_mask=batch.loss_mask.at[0, 5].set(value))


def spoil_state(value: float) -> Any:
    return lambda state: state.replace(opt_state=set_last(value)(state.opt_state))


same = lambda x: x
overflowing_state = make_transform(
    lambda updates, state: (jax.tree.map(jnp.zeros_like, updates), 1e30 * (1e10 * state)), lambda params: jnp.ones(3)
)
frozen = make_transform(lambda updates, state: (jax.tree.map(jnp.zeros_like, updates), state), same)

# What the objective is, the optimizer, what is done to the state before the step, and to the batch.
FAULTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "a weight that is NaN": (None, optax.adam(0.1), same, scale_mask(np.nan)),
    "a weight that is infinite": (None, optax.adam(0.1), same, scale_mask(np.inf)),
    "a gradient that is NaN": (steep, optax.adam(0.1), same, same),
    "one update that is NaN": (None, make_transform(lambda u, s: (set_last(np.nan)(u), s)), same, same),
    "one update that is infinite": (None, make_transform(lambda u, s: (set_last(-np.inf)(u), s)), same, same),
    "updates that overflow": (None, optax.chain(optax.scale(1e30), optax.scale(1e30)), same, same),
    "a rate that is infinite": (None, optax.sgd(np.inf), same, same),
    "0 / 0 where no gradient has been": (None, optax.adam(0.1, b2=0.0, eps=0.0), same, same),
    "b2 is 1": (None, optax.adam(0.1, b2=1.0, eps=0.0), same, same),
    "a moment that is NaN": (None, optax.adam(0.1), spoil_state(np.nan), same),
    "a second moment that is infinite": (None, optax.adam(0.1), spoil_state(np.inf), same),
    "a moment that no update reads": (None, frozen, spoil_state(np.nan), same),
    "a state of no parameter's shape": (None, overflowing_state, same, same),
    "matrix products": (None, optax.contrib.muon(np.inf), same, same),
}


def build_step(case: str, make: Any, tx: Any, objective: Any) -> tuple[Any, TrainState, tuple[Any, ...]]:
    """Return a compiled step, its first state and its further arguments."""
    options = {} if objective is None else {"objective": objective}
    if case == "adapters":
        base, lora = init_params(CONFIG, jax.random.key(0)), LoraConfig(rank=2)
        step = make_lora_step(
            lambda student: cotgrpo.make_grpo_step(student, tx, **options), make_student(CONFIG), lora
        )
        adapters = init_lora(base, lora, jax.random.key(1))
        return cotgrpo.jit_step(step), TrainState.create(params=adapters, tx=tx, key=0), (base,)
    params = {"embedding": jax.random.normal(jax.random.key(0), (64, 16)), "head": jnp.eye(16, 64)}
    student = Student(lambda params, tokens, *_: params["embedding"][tokens], lambda params: params["head"])
    options |= {"micro_batches": 4} if case == "micro-batches" else {}
    mesh = cotgrpo.make_mesh(fsdp=8) if case == "eight devices" else None
    return cotgrpo.jit_step(make(student, tx, **options), mesh), TrainState.create(params=params, tx=tx, key=0), ()


EVERYWHERE = ("a weight that is NaN", "one update that is infinite")


@pytest.mark.parametrize(
    ("make", "case", "fault"),
    [(cotgrpo.make_sft_step, "plain", fault) for fault in FAULTS]
    + [(cotgrpo.make_grpo_step, "plain", fault) for fault in (*EVERYWHERE, "a moment that is NaN", "b2 is 1")]
    + [
        (cotgrpo.make_grpo_step, case, fault)
        for case in ("micro-batches", "adapters", "eight devices")
        for fault in EVERYWHERE
    ],
)
def test_a_step_that_leads_to_numbers_that_are_not_finite_is_skipped(make: Any, case: str, fault: str) -> None:
    """Whatever is not finite, the loss, the gradient, the update or the moments: nothing changes but the counter."""
    objective, tx, spoil_state, spoil_batch = FAULTS[fault]
    step, state, extra = build_step(case, make, tx, objective)
    state, batch = spoil_state(state), make_batch()
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, spoil_batch(batch), *extra)
    assert metrics["skipped"].mean() == 1 and int(state.step) == 1
    np.testing.assert_equal(jax.device_get((state.params, state.opt_state)), before)
    assert np.isnan(metrics["loss"].mean()) and float(metrics["loss"].weight) == 0
    if spoil_batch is not same:
        state, metrics = step(state, batch, *extra)
        assert metrics["skipped"].mean() == 0 and np.isfinite(metrics["loss"].mean())


@jax.jit
def scan(x: jax.Array) -> jax.Array:
    """A function whose name is that of a primitive."""
    return x + 1


@jax.custom_jvp
def own_gradient(x: jax.Array) -> jax.Array:
    return x @ x


own_gradient.defjvp(lambda x, dx: (own_gradient(*x), dx[0]))


@pytest.mark.parametrize(
    ("function", "costly"),
    [
        (lambda x: x @ x, {"dot_general"}),
        (jax.jit(jax.jit(lambda x: x @ x)), {"dot_general"}),
        (jax.checkpoint(lambda x: jnp.linalg.qr(x)[0]), {"qr"}),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x), {"dot_general"}),
        (lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=2)[0], {"dot_general", "scan"}),
        (lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + 1, x), {"while"}),
        (jax.vmap(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c + 1, x)), {"scan"}),
        (own_gradient, {"dot_general"}),
        (scan, set()),
        (lambda x: jnp.where(jnp.isfinite(x), jnp.sqrt(x) * jnp.sum(x), 0), set()),
    ],
)
def test_a_costly_update_is_known_by_its_primitives(function: Any, costly: set[str]) -> None:
    found = primitives(jax.make_jaxpr(function)(jnp.ones((2, 2))).jaxpr)
    assert found & COSTLY_UPDATE == costly


def test_an_absurd_update_is_taken_and_the_steps_after_it_are_skipped() -> None:
    """Parameters of 1e29 are finite. The next loss shows what they are worth, and then nothing changes any more."""
    step, state, _ = build_step("plain", cotgrpo.make_sft_step, optax.sgd(1e30), None)
    state, metrics = step(state, make_batch())
    assert metrics["skipped"].mean() == 0
    for _ in range(2):
        before = jax.device_get(state.params)
        state, metrics = step(state, make_batch())
        assert metrics["skipped"].mean() == 1
        np.testing.assert_equal(jax.device_get(state.params), before)


def test_a_loss_that_is_infinite_before_the_first_step_is_no_fault_of_the_optimizer_state() -> None:
    """Optimizers that keep the best loss start with infinity."""
    infinite = make_transform(lambda updates, state: (updates, state), lambda params: jnp.float32(np.inf))
    step, state, _ = build_step("plain", cotgrpo.make_sft_step, optax.chain(infinite, optax.sgd(0.1)), None)
    _, metrics = step(state, make_batch())
    assert metrics["skipped"].mean() == 0


def test_looking_at_the_update_takes_no_memory_and_few_operations() -> None:
    """XLA computes the update twice and does not keep a second copy of parameters and moments."""
    size = 1 << 20
    student = Student(
        lambda params, tokens, *_: params["embedding"][tokens], lambda params: jnp.ones((8, 8)), vocab_size=8
    )
    tx = cotgrpo.make_optimizer(learning_rate=1e-3, total_steps=10)
    state = jax.eval_shape(
        lambda: TrainState.create(params={"embedding": jnp.zeros((size, 8))}, tx=tx, key=jax.random.key(0))
    )
    compiled = cotgrpo.jit_step(cotgrpo.make_sft_step(student, tx)).lower(state, make_batch()).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    gradient = 4 * 8 * size
    assert memory.temp_size_in_bytes < 2.2 * gradient


def test_a_batch_with_nothing_supervised_is_skipped() -> None:
    batch = make_batch()
    state, metrics = run(cotgrpo.make_sft_step, batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert metrics["skipped"].mean() == 1
    assert_same(state.params, init_params(CONFIG, jax.random.key(0)), rtol=0.0, atol=0.0)


def test_eval_step_adds_up_over_batches() -> None:
    batch = make_batch()
    params = init_params(CONFIG, jax.random.key(0))
    eval_step = jax.jit(cotgrpo.make_eval_step(make_student(CONFIG)))
    whole = eval_step(params, batch)
    halves = [eval_step(params, jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(0, 2), slice(2, B))]
    np.testing.assert_allclose((halves[0]["loss"] + halves[1]["loss"]).mean(), whole["loss"].mean(), rtol=1e-5)
    _, trained = run(cotgrpo.make_sft_step, batch)
    np.testing.assert_allclose(whole["loss"].mean(), trained["loss"].mean(), rtol=1e-6)
    assert np.isnan(Metric(jnp.float32(0), jnp.float32(0)).mean())


def test_student_from_logits_and_a_reference() -> None:
    """A model that returns logits trains like the one with a head; a reference keeps the student near it."""
    batch, tx, inner = make_batch(), optax.sgd(0.1), make_student(CONFIG)
    outer = Student.from_logits(inner.logits)
    start = new_state(tx).params
    step = cotgrpo.jit_step(cotgrpo.make_grpo_step(outer, tx))
    state, metrics = step(new_state(tx), batch)
    want_state, want = run(cotgrpo.make_grpo_step, batch)
    assert_same(state.params, want_state.params)
    assert_same(metrics, want)

    kept = cotgrpo.jit_step(cotgrpo.make_grpo_step(inner, tx, ReferenceKl(Pair(), 100.0), reference=inner))
    state, metrics = kept(new_state(tx), batch, start)
    np.testing.assert_allclose(metrics["kl"].mean(), 0.0, atol=1e-6)  # the student is its reference
    state, metrics = kept(state, batch, start)
    assert metrics["kl"].mean() > 1e-4


def test_training_learns() -> None:
    """Thirty steps on one batch: the loss falls far, and the ghost grows likely."""
    tx = cotgrpo.make_optimizer(learning_rate=1e-2, total_steps=60, warmup_steps=5, weight_decay=0.01)
    _, first = run(cotgrpo.make_grpo_step, make_batch(), tx=tx)
    _, last = run(cotgrpo.make_grpo_step, make_batch(), tx=tx, steps=60)
    assert last["loss"].mean() < 0.5 * first["loss"].mean()
    assert last["reward"].mean() > first["reward"].mean()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s, tx: cotgrpo.make_sft_step(s, tx, micro_batches=0), "micro_batches must be at least 1, got 0"),
        (lambda s, tx: cotgrpo.make_grpo_step(s, tx, tile_size=0), "tile_size must be at least 1 or None, got 0"),
        (lambda s, tx: cotgrpo.make_grpo_step(s, tx, ReferenceKl(Pair())), "needs a frozen reference model"),
        (lambda s, tx: cotgrpo.make_grpo_step(s, tx, Pair(), reference=s), "does not use a frozen reference model"),
        (lambda s, tx: cotgrpo.make_eval_step(s, Reinforce()), "draws no tokens, got Reinforce.*use its exact form"),
        (lambda s, tx: cotgrpo.make_eval_step(s, steep), "if yours reads none, set its attribute num_draws = 0"),
    ],
)
def test_bad_settings_are_errors_when_the_step_is_built(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(make_student(CONFIG), optax.sgd(0.1))


def test_micro_batches_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="micro_batches=3 must divide the batch, which has 8 sequences"):
        run(cotgrpo.make_sft_step, make_batch(), micro_batches=3)


def make_small(**options: Any) -> tuple[Any, TrainState]:
    """A pure step of a student that compiles fast, and its first state."""
    tx = options.pop("tx", optax.sgd(0.1))
    student = Student(lambda params, tokens, *_: params["embedding"][tokens], lambda params: params["head"])
    params = {"embedding": jax.random.normal(jax.random.key(0), (61, 16)), "head": jnp.eye(16, 61)}
    if options.pop("with_reference", False):
        options["reference"] = student
    return cotgrpo.make_grpo_step(student, tx, **options), TrainState.create(params=params, tx=tx, key=0)


WITH_VALUES = {
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.5, f_min=1.0),
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
}


@pytest.mark.parametrize("name", WITH_VALUES)
def test_optimizers_get_the_loss_the_gradient_and_the_loss_as_a_function(name: str) -> None:
    batch = make_batch()
    losses = {}
    for micro_batches in (1, 4):
        step, state = make_small(tx=WITH_VALUES[name](), objective=Nll(), micro_batches=micro_batches)
        compiled = jax.jit(step)
        for _ in range(4):
            state, metrics = compiled(state, batch)
            losses.setdefault(micro_batches, []).append(metrics["loss"].mean())
            assert metrics["skipped"].mean() == 0
    assert losses[1][-1] < losses[1][0]
    np.testing.assert_allclose(losses[4], losses[1], rtol=2e-3)


def test_value_is_the_mean_loss_and_value_fn_gives_it_for_any_parameters() -> None:
    seen: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any, value_fn: Any) -> Any:
        found = value_fn(params), jax.grad(value_fn)(params)
        jax.debug.callback(
            lambda *got: seen.update(zip(("value", "grad", "found"), got, strict=True)), value, grad, found
        )
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step, state = make_small(tx=tx, micro_batches=2)
    _, metrics = jax.jit(step)(state, make_batch())
    jax.effects_barrier()
    np.testing.assert_allclose(seen["value"], metrics["loss"].mean(), rtol=1e-6)
    np.testing.assert_allclose(seen["found"][0], seen["value"], rtol=1e-6)
    assert_same(seen["found"][1], seen["grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["loss", "learning_rate", "grad_norm", "skipped", "tokens", "padded_tokens"])
def test_a_metric_by_the_name_of_one_of_the_step_s_is_refused(name: str) -> None:
    def own(logits_V: jax.Array, token: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return -logits_V[token.ghost], {name: jnp.float32(1)}

    step, state = make_small(objective=own)
    with pytest.raises(ValueError, match=f"reports a metric {name!r}, which is the step's own: give it another name"):
        step(state, make_batch())


@pytest.mark.parametrize("wrong", [-1, -100, 61, 2**31 - 1])
@pytest.mark.parametrize("which", ["ghost_tokens", "drawn_tokens"])
def test_ids_that_are_not_in_the_vocabulary_are_counted_and_do_not_train(which: str, wrong: int) -> None:
    batch = GhostBatch.teacher_forced(make_batch())
    batch = batch.replace(drawn_tokens=(batch.ghost_tokens + 1) % 61)
    place = tuple(int(i) for i in np.argwhere(np.asarray(batch.loss_mask))[3])
    step, state = make_small(objective=Pair(estimator="drawn"))
    compiled = jax.jit(step)
    without, expected = compiled(state, batch.replace(loss_mask=batch.loss_mask.at[place].set(0.0)))
    got, metrics = compiled(state, batch.replace(**{which: getattr(batch, which).at[place].set(wrong)}))
    assert metrics["invalid_tokens"].mean() == 1 and expected["invalid_tokens"].mean() == 0
    assert_same(got.params, without.params, rtol=0.0, atol=0.0)
    assert_same(metrics["loss"], expected["loss"], rtol=0.0, atol=0.0)
    padding = batch.replace(**{which: jnp.where(batch.loss_mask == 0, wrong, getattr(batch, which))})
    assert compiled(state, padding)[1]["invalid_tokens"].mean() == 0  # padding may hold anything


def test_ids_that_are_not_in_the_vocabulary_are_errors_with_debug() -> None:
    step, state = make_small(debug=True)
    checked = jax.jit(checkify.checkify(step))
    batch = make_batch()
    error, (_, metrics) = checked(state, batch)
    error.throw()
    assert metrics["skipped"].mean() == 0
    error, _ = checked(state, batch.replace(targets=jnp.full_like(batch.targets, 61)))
    with pytest.raises(checkify.JaxRuntimeError, match=r"supervised tokens have a ghost or drawn id outside \[0, 61\)"):
        error.throw()


def reads_reference(logits_V: jax.Array, token: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jnp.sum((logits_V - token.reference_logits) ** 2), {}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"objective": RewardGradient(samples=2)},
            {"drawn_tokens": (B, T)},
            r"takes 2 drawn tokens.*\(8, 24, 2\), got",
        ),
        ({"objective": RewardGradient()}, {"drawn_tokens": (B, T, 3)}, r"takes 1 drawn tokens.*, got \(8, 24, 3\)"),
        (
            {"objective": ReferenceKl(Pair()), "with_reference": True},
            {},
            r"expected step\(state, batch, reference_params\)",
        ),
        ({"objective": reads_reference}, {}, "reads inputs.reference_logits, build the step with reference=Student"),
        (
            {"objective": ReferenceKl(GroupRelative()), "with_reference": True},
            {"drawn_tokens": (B, T), "reference": True},
            "needs the extra array 'drawn_log_probs'",
        ),
    ],
)
def test_what_is_forgotten_is_one_sentence(options: Any, change: Any, message: str) -> None:
    step, state = make_small(**options)
    batch = GhostBatch.teacher_forced(make_batch())
    if "drawn_tokens" in change:
        batch = batch.replace(drawn_tokens=jnp.zeros(change["drawn_tokens"], jnp.int32))
    with pytest.raises(ValueError, match=message):
        step(state, batch, *((state.params,) if "reference" in change else ()))


def test_a_plain_function_may_read_a_reference() -> None:
    step, state = make_small(objective=reads_reference, with_reference=True)
    _, metrics = jax.jit(step)(state, make_batch(), state.params)
    assert metrics["loss"].mean() == 0 and metrics["skipped"].mean() == 0
