"""A student with dropout and an auxiliary loss: in every step, in micro-batches, on meshes, and in nothing else."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_train_steps import CONFIG, assert_same, make_batch

import cotgrpo
from cotgrpo import GhostBatch, Nll, Pair, ReferenceKl, Student, TrainState
from cotgrpo.ghosts.live import live_ghosts, reply_rewards
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.lora import AdaptedParams, LoraConfig, init_lora, make_lora_step, with_adapters
from cotgrpo.sampling import Prompts, Replies
from cotgrpo.train_steps import model_keys

V, D = CONFIG.vocab_size, 16
KEPT = 0.75
slow = pytest.mark.slow


def params_of(seed: int = 0) -> dict[str, jax.Array]:
    one, two = jax.random.split(jax.random.key(seed))
    return {"embedding": 0.5 * jax.random.normal(one, (V, D)), "head": 0.5 * jax.random.normal(two, (D, V))}


def keep(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, KEPT, shape)


def rows_of(params: Any, tokens: Any, key: Any = None, mask: Any = None) -> Any:
    rows = jnp.tanh(params["embedding"][tokens])
    mask = keep(key, rows.shape) if key is not None else mask
    return rows if mask is None else jnp.where(mask, rows / KEPT, 0)


def z_loss(rows: Any, segment_ids: Any, shape: str) -> Any:
    """The mean of rows^2 over real tokens, as a scalar, for each row, or for each token."""
    each, real = jnp.mean(rows**2, axis=-1), segment_ids != 0
    if shape == "tokens":
        return jnp.where(real, each, jnp.nan)  # what padding holds does not count
    axes = None if shape == "scalar" else 1
    return jnp.sum(jnp.where(real, each, 0.0), axis=axes) / jnp.maximum(jnp.sum(real, axis=axes), 1)


def make_own(dropout: bool = True, aux: str = "", head: bool = True, remat: bool = False) -> Student:
    """A student of a user's own."""

    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any, key: Any = None) -> Any:
        rows = (jax.checkpoint(rows_of) if remat else rows_of)(params, tokens, key)
        loss = z_loss(rows, segment_ids, aux) if aux else None
        rows = rows if head else rows @ params["head"]
        return (rows, (loss, {"router_z": loss})) if aux else rows

    without = lambda params, tokens, positions, segment_ids: hidden(params, tokens, positions, segment_ids)
    options: Any = {"takes_key": dropout, "has_aux": bool(aux)}
    function = hidden if dropout else without
    return Student(function, lambda p: p["head"], **options) if head else Student.from_logits(function, **options)


def start(tx: Any, key: int = 3) -> TrainState:
    return TrainState.create(params=params_of(), tx=tx, key=key)


def oracle(params: Any, batch: Any, masks: Any, aux: bool) -> tuple[Any, Any, Any]:
    """Return loss, auxiliary loss and gradients in float64, from all logits at once."""
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)

    def both(params: Any) -> Any:
        rows = rows_of(params, batch.tokens, mask=masks)
        log_p = jax.nn.log_softmax(rows @ params["head"])
        nll = -jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        weight, real = jnp.asarray(batch.loss_mask, jnp.float64), batch.segment_ids != 0
        loss = jnp.sum(weight * nll) / jnp.sum(weight)
        router = jnp.sum(jnp.where(real, jnp.mean(rows**2, axis=-1), 0)) / jnp.sum(real)
        return loss + (router if aux else 0.0), (loss, router)

    (_, (loss, router)), grads = jax.value_and_grad(both, has_aux=True)(wide)
    return float(loss), float(router), jax.device_get(grads)


def masks_of(student: Student, state: TrainState, batch: Any, micro_batches: int) -> np.ndarray:
    """Return what dropout keeps: micro-batch i has the rows i, i + M, ..."""
    keys = model_keys(student, jax.random.fold_in(state.key, state.step), micro_batches)
    masks = np.zeros((*batch.tokens.shape, D), bool)
    for index, key in enumerate(keys):
        masks[index::micro_batches] = keep(key, masks[index::micro_batches].shape)
    return masks


@pytest.mark.parametrize(
    ("dropout", "aux", "head", "micro_batches"),
    [
        (True, "", True, 4),
        (False, "scalar", True, 1),
        (True, "tokens", True, 4),
        pytest.param(True, "", True, 1, marks=slow),
        pytest.param(True, "rows", True, 1, marks=slow),
        pytest.param(True, "tokens", False, 4, marks=slow),
    ],
)
def test_a_step_is_autodiff_in_float64(dropout: bool, aux: str, head: bool, micro_batches: int) -> None:
    """The auxiliary loss counts all real tokens alike, however they are split, and so does each supervised token."""
    student, batch, tx = make_own(dropout, aux, head), make_batch(), optax.sgd(1.0)
    state = start(tx).replace(step=jnp.int32(5))
    masks = masks_of(student, state, batch, micro_batches) if dropout else None
    with jax.enable_x64(True):
        loss, router, grads = oracle(state.params, batch, masks, bool(aux))
    before = jax.device_get(state.params)
    state, metrics = jax.jit(cotgrpo.make_sft_step(student, tx, micro_batches=micro_batches))(state, batch)
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=1e-5)
    for name in ("aux_loss", "router_z") if aux else ():
        np.testing.assert_allclose(metrics[name].mean(), router, rtol=1e-5)
        assert float(metrics[name].weight) == np.sum(np.asarray(batch.segment_ids) != 0)
    assert metrics.keys() & {"aux_loss", "router_z"} == ({"aux_loss", "router_z"} if aux else set())
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, jax.device_get(state.params))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6), moved, grads)
    assert metrics["skipped"].mean() == 0


def test_dropout_is_new_in_every_step_micro_batch_and_seed_and_apart_from_the_draws() -> None:
    student, seen = make_own(), []
    for seed in (0, 1):
        for number in range(3):
            seen += list(model_keys(student, jax.random.fold_in(jax.random.key(seed), number), 4))
            seen.append(jax.random.fold_in(jax.random.key(seed), number))
    assert len({jax.random.key_data(key).tobytes() for key in seen}) == 2 * 3 * 5
    tx, batch = optax.sgd(0.1), make_batch()
    step = jax.jit(cotgrpo.make_grpo_step(student, tx, Pair(estimator="drawn")))
    plain = jax.jit(cotgrpo.make_grpo_step(make_own(dropout=False), tx, Pair(estimator="drawn")))
    same_draws = batch.replace(loss_mask=batch.loss_mask)
    losses = [step(start(tx).replace(step=jnp.int32(number)), same_draws)[1]["loss"].mean() for number in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1] != plain(start(tx), batch)[1]["loss"].mean()


def test_all_calls_of_the_loss_in_one_step_have_the_same_dropout() -> None:
    """A line search needs a function of the parameters alone."""
    seen: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any, value_fn: Any) -> Any:
        found = value_fn(params), jax.grad(value_fn)(params)
        jax.debug.callback(
            lambda *got: seen.update(zip(("value", "grad", "found"), got, strict=True)), value, grad, found
        )
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = cotgrpo.make_sft_step(make_own(True, "tokens"), tx, micro_batches=2)
    _, metrics = jax.jit(step)(start(tx), make_batch())
    jax.effects_barrier()
    np.testing.assert_allclose(seen["value"], metrics["loss"].mean() + metrics["aux_loss"].mean(), rtol=1e-6)
    np.testing.assert_allclose(seen["found"][0], seen["value"], rtol=1e-6)
    assert_same(seen["found"][1], seen["grad"], rtol=1e-4, atol=1e-6)


@slow
def test_lbfgs_with_dropout_lowers_the_loss() -> None:
    tx, batch = optax.lbfgs(memory_size=3), make_batch()
    step = jax.jit(cotgrpo.make_sft_step(make_own(True, "rows"), tx, micro_batches=2))
    evaluate, state = jax.jit(cotgrpo.make_eval_step(make_own(True, "rows"))), start(tx)
    before = evaluate(state.params, batch)["loss"].mean()
    for _ in range(3):
        state, metrics = step(state, batch)
        assert metrics["skipped"].mean() == 0
    assert evaluate(state.params, batch)["loss"].mean() < before


def test_recomputed_layers_have_the_same_dropout() -> None:
    tx, batch = optax.sgd(0.1), make_batch()
    kept, again = (
        jax.jit(cotgrpo.make_sft_step(make_own(remat=remat), tx))(start(tx), batch)[0] for remat in (False, True)
    )
    assert_same(again.params, kept.params, rtol=1e-6, atol=1e-7)


@slow
def test_seeds_under_vmap_and_steps_under_scan_are_single_steps() -> None:
    """A run that is stopped and restored after the second step ends at the same bits."""
    tx, batch = optax.adam(1e-2), make_batch()
    step = cotgrpo.make_grpo_step(make_own(True, "tokens"), tx, Pair(estimator="drawn"), micro_batches=2)
    compiled, ends = jax.jit(step), []
    for seed in range(3):
        state = start(tx, key=seed)
        for number in range(4):
            state, metrics = compiled(state, batch)
            if number == 1:
                state = jax.tree.map(jnp.asarray, jax.device_get(state))
        ends.append((state, metrics))
    again = start(tx, key=0)
    for _ in range(4):
        again, _ = compiled(again, batch)
    assert_same(again.params, ends[0][0].params, rtol=0.0, atol=0.0)

    states = jax.vmap(lambda key: TrainState.create(params=params_of(), tx=tx, key=key))(
        jnp.stack([jax.random.key(seed) for seed in range(3)])
    )
    run = jax.jit(jax.vmap(lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, length=4)))
    together, metrics = run(states)
    for seed, (state, last) in enumerate(ends):
        assert_same(jax.tree.map(lambda x, i=seed: x[i], together.params), state.params, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["aux_loss"].total[seed, -1], last["aux_loss"].total, rtol=1e-4)
    losses = np.asarray(metrics["loss"].total[:, 0])
    assert len(set(losses.tolist())) == 3  # each seed drops others


def recording(calls: list[bool]) -> Student:
    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any, *, key: Any) -> Any:
        calls.append(key is None)
        rows = rows_of(params, tokens, key)
        return rows, (jnp.sum(rows**2, axis=-1), {})

    return Student(hidden, lambda params: params["head"], takes_key=True, has_aux=True)


def test_nothing_but_the_training_loss_has_dropout() -> None:
    """Evaluation, logits, references, ghosts and measurements call the model without a key."""
    calls: list[bool] = []
    student, batch, tx = recording(calls), make_batch(), optax.sgd(0.1)
    params, plain = params_of(), make_own(dropout=False)
    metrics = cotgrpo.make_eval_step(student)(params, batch)
    want = cotgrpo.make_eval_step(plain)(params, batch)
    assert metrics["loss"].mean() == want["loss"].mean() and metrics["aux_loss"].mean() > 0
    contexts = (batch.tokens, batch.positions, batch.segment_ids)
    np.testing.assert_array_equal(student.logits(params, *contexts), plain.logits(params, *contexts))
    np.testing.assert_array_equal(student.rows(params, *contexts), plain.rows(params, *contexts))
    assert student.without_extras().rows_and_aux(params, *contexts)[1] is None
    prompts = Prompts(jnp.ones((2, 3), jnp.int32), jnp.full(2, 3, jnp.int32))
    replies = Replies(jnp.ones((2, 4), jnp.int32), jnp.zeros((2, 4)), jnp.full(2, 4, jnp.int32), jnp.ones(2, bool))
    assert live_ghosts(student, params, prompts, replies).tokens.shape == (2, 7)
    reply_rewards(student, params, GhostBatch.teacher_forced(batch))
    assert calls and all(calls)
    calls.clear()
    objective = ReferenceKl(Pair(), 1.0)
    step = cotgrpo.make_grpo_step(student, tx, objective, reference=student, reward_gain=True)
    _, found = jax.jit(step)(start(tx), batch, params)
    assert calls.count(False) > 0 and calls.count(True) > 0
    assert found["kl"].mean() > 1e-4 and "reward_gain" in found  # the student drops, its reference does not


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_auxiliary_loss_that_is_not_finite_skips_the_step(kind: str) -> None:
    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        rows = rows_of(params, tokens)
        bad = jnp.nan * jnp.sum(rows) if kind == "loss" else jnp.sqrt(jnp.sum(0 * rows))
        return rows, (bad, {"router_z": bad})

    tx = optax.adam(0.1)
    step = jax.jit(cotgrpo.make_sft_step(Student(hidden, lambda p: p["head"], has_aux=True), tx, micro_batches=2))
    before = jax.device_get((params_of(), tx.init(params_of())))
    state, metrics = step(start(tx), make_batch())
    assert metrics["skipped"].mean() == 1 and np.isnan(metrics["router_z"].mean())
    np.testing.assert_equal(jax.device_get((state.params, state.opt_state)), before)


@slow
def test_padding_has_no_auxiliary_loss() -> None:
    """Rows of padding add nothing, whatever their tokens are, and neither does a micro-batch of them."""
    tx, batch = optax.sgd(0.1), make_batch()
    blank = jax.tree.map(jnp.zeros_like, batch).replace(tokens=jnp.full_like(batch.tokens, 7))
    mixed = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), batch, blank)
    for aux in ("scalar", "rows", "tokens"):
        step = jax.jit(cotgrpo.make_sft_step(make_own(False, aux), tx))
        halves = jax.jit(cotgrpo.make_sft_step(make_own(False, aux), tx, micro_batches=2))  # the second is blank
        (want, metrics), (got, found) = step(start(tx), batch), halves(start(tx), mixed)
        assert_same(got.params, want.params, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["aux_loss"].mean(), metrics["aux_loss"].mean(), rtol=1e-5)


MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...], AxisType]] = {
    "auto": ((8,), ("dp",), AxisType.Auto),
    "auto two": ((4, 2), ("dp", "sp"), AxisType.Auto),
    "explicit": ((8,), ("dp",), AxisType.Explicit),
}


@pytest.mark.parametrize("name", ["own", "explicit", *(pytest.param(name, marks=slow) for name in list(MESHES)[:2])])
def test_on_a_mesh_it_is_the_step_of_one_device(name: str) -> None:
    tx, batch, student = optax.sgd(0.5), make_batch(), make_own(name != "explicit", "tokens")
    if name == "explicit":
        student = make_explicit()
    step = cotgrpo.make_sft_step(student, tx)
    want, expected = jax.jit(step)(start(tx), batch)
    if name == "own":
        got, metrics = cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(fsdp=4, tensor=2))(start(tx), batch)
    else:
        shape, axes, kind = MESHES[name]
        mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, NamedSharding(mesh, P(*axes)))
            state = jax.device_put(start(tx), NamedSharding(mesh, P()))
            got, metrics = jax.jit(step)(state, placed)
    assert_same(jax.device_get(got.params), jax.device_get(want.params), rtol=1e-4, atol=1e-6)
    for metric in ("loss", "aux_loss"):
        np.testing.assert_allclose(metrics[metric].mean(), expected[metric].mean(), rtol=1e-5)


def make_explicit() -> Student:
    def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any, key: Any = None) -> Any:
        sharding = jax.typeof(tokens).sharding
        out = {} if sharding.mesh.empty else {"out_sharding": NamedSharding(sharding.mesh, P(*sharding.spec, None))}
        rows = jnp.tanh(params["embedding"].at[tokens].get(**out))
        rows = rows if key is None else rows * jax.random.uniform(key, (1, 1, rows.shape[-1]))
        return rows, (jnp.mean(rows**2, axis=-1), {"rows": jnp.mean(rows**2, axis=(1, 2)), "all": jnp.mean(rows**2)})

    return Student(hidden, lambda params: params["head"], takes_key=True, has_aux=True)


def make_decoder() -> Student:
    """The package's decoder, with dropout behind it and an auxiliary loss."""
    inner = make_student(CONFIG)

    def hidden(params: Any, *contexts: Any, key: Any = None) -> Any:
        rows = inner.hidden(params, *contexts)
        rows = rows if key is None else jnp.where(jax.random.bernoulli(key, 0.5, rows.shape), rows / 0.5, 0)
        return rows, (0.1 * jnp.mean(rows**2, axis=-1), {"size": jnp.mean(jnp.abs(rows))})

    return Student(hidden, inner.head, takes_key=True, has_aux=True)


@pytest.mark.parametrize("kind", ["one device", *(pytest.param(kind, marks=slow) for kind in ("mesh", "explicit"))])
def test_adapters_next_to_a_model_with_both(kind: str) -> None:
    """The adapters' gradient is that of the merged model, whose key is the same."""
    student, lora, tx, batch = (
        make_decoder(),
        LoraConfig(rank=2, targets=("query", "down")),
        optax.sgd(0.1),
        make_batch(),
    )
    base = init_params(CONFIG, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.01, init_lora(base, lora, jax.random.key(1)))
    step = make_lora_step(lambda student: cotgrpo.make_sft_step(student, tx, micro_batches=2), student, lora)
    state = TrainState.create(params=adapters, tx=tx, key=0)
    want, expected = jax.jit(step)(state, batch, base)
    assert expected["skipped"].mean() == 0 and expected["aux_loss"].mean() > 0
    evaluate = cotgrpo.make_eval_step(with_adapters(student))(AdaptedParams(base, adapters, lora), batch)
    assert abs(evaluate["loss"].mean() - expected["loss"].mean()) > 1e-4
    if kind == "mesh":
        got, metrics = cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(fsdp=4, tensor=2))(state, batch, base)
    elif kind == "explicit":
        mesh = jax.make_mesh((4,), ("dp",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
        with jax.set_mesh(mesh):
            put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
            got, metrics = jax.jit(step)(put(state, P()), put(batch, P("dp")), put(base, P()))
    else:
        return
    assert_same(jax.device_get(got.params), jax.device_get(want.params), rtol=1e-4, atol=1e-6)
    for name in ("loss", "aux_loss", "size"):
        np.testing.assert_allclose(metrics[name].mean(), expected[name].mean(), rtol=1e-5)


four = lambda params, tokens, positions, segment_ids: params["embedding"][tokens]
keyed = lambda params, tokens, positions, segment_ids, key: params["embedding"][tokens]
optional = lambda params, tokens, positions, segment_ids, key=None: params["embedding"][tokens]
any_name = lambda params, *contexts, **options: params["embedding"][contexts[0]]


@pytest.mark.parametrize(
    ("hidden", "takes_key", "message"),
    [
        (four, True, r"Student\(takes_key=True\): hidden must take the argument key, as hidden\(.*got hidden\(params"),
        (keyed, False, "takes a key, but takes_key is False.*build Student"),
        (optional, False, "takes a key, but takes_key is False.*functools.partial"),
        (functools.partial(optional, key=1), False, None),
        (any_name, True, None),
        (any_name, False, None),
        (keyed, True, None),
        (optional, True, None),
        (four, False, None),
        (jax.jit(optional), True, None),
        (jax.numpy.tanh, False, None),
    ],
)
def test_the_key_is_a_choice_that_is_checked_when_the_student_is_made(
    hidden: Any, takes_key: bool, message: str | None
) -> None:
    for make in (functools.partial(Student, head=None), Student.from_logits):
        if message is None:
            assert make(hidden, takes_key=takes_key).takes_key == takes_key
            continue
        with pytest.raises(ValueError, match=message):
            make(hidden, takes_key=takes_key)


rows = lambda params, tokens: params["embedding"][tokens]


@pytest.mark.parametrize(
    ("found", "has_aux", "message"),
    [
        (lambda r: (r, (0.0, {})), False, r"got tuple of \(an array of the shape.*build Student\(..., has_aux=True\)"),
        (lambda r: (r, {"losses": ()}), False, r"got tuple of \(an array of the shape \(8, 24, 16\), dict\)"),
        (lambda r: [r, 1.0], False, r"must return the rows \[B, T, D\], got list"),
        (lambda r: None, False, r"must return the rows \[B, T, D\], got NoneType"),
        (lambda r: r, True, r"got an array of the shape \(8, 24, 16\). If the model has no auxiliary loss, leave"),
        (lambda r: (r, 0.0), True, r"must return \(rows, \(loss, metrics\)\) with a dict.*got tuple"),
        (lambda r: (r, (0.0, 1.0)), True, "with a dict of metrics, got tuple"),
        (lambda r: (r, (0.0, {}), 1), True, "with a dict of metrics, got tuple"),
        (lambda r: (r, (r, {})), True, r"auxiliary loss must be a scalar, or have the shape \[B\].*got \(8, 24, 16\)"),
        (lambda r: (r, (0.0, {"z": r[0]})), True, r"auxiliary z must be a scalar.*got \(24, 16\)"),
    ],
)
@pytest.mark.parametrize("use", ["step", "eval", "logits", "reference"])
def test_what_hidden_returns_and_has_aux_belong_together(found: Any, has_aux: bool, message: str, use: str) -> None:
    student = Student(lambda p, t, *_: found(rows(p, t)), lambda p: p["head"], has_aux=has_aux)
    batch, tx, plain = make_batch(), optax.sgd(0.1), make_own(dropout=False)
    uses = {
        "step": lambda: cotgrpo.make_sft_step(student, tx)(start(tx), batch),
        "eval": lambda: cotgrpo.make_eval_step(student)(params_of(), batch),
        "logits": lambda: student.logits(params_of(), batch.tokens, batch.positions, batch.segment_ids),
        "reference": lambda: cotgrpo.make_grpo_step(plain, tx, ReferenceKl(Nll()), reference=student)(
            start(tx), batch, params_of()
        ),
    }
    with pytest.raises(ValueError, match=message):
        uses[use]()


@pytest.mark.parametrize("name", ["loss", "aux_loss", "skipped", "grad_norm", "invalid_tokens", "entropy"])
def test_a_metric_of_the_model_by_a_name_that_is_taken_is_refused(name: str) -> None:
    student = Student(lambda p, t, *_: (rows(p, t), (0.0, {name: 0.0})), lambda p: p["head"], has_aux=True)
    tx = optax.sgd(0.1)
    message = f"The student reports a metric {name!r}, .*give it another name"
    with pytest.raises(ValueError, match=message):
        cotgrpo.make_sft_step(student, tx)(start(tx), make_batch())
    with pytest.raises(ValueError, match=message):
        cotgrpo.make_eval_step(student)(params_of(), make_batch())


@pytest.mark.parametrize("name", ["aux_loss", "reward_gain"])
def test_an_objective_may_report_what_this_step_does_not(name: str) -> None:
    own = lambda logits_V, token: (-jax.nn.log_softmax(logits_V)[token.ghost], {name: jnp.float32(2.0)})
    tx, batch = optax.sgd(0.1), make_batch()
    _, metrics = cotgrpo.make_grpo_step(make_own(False), tx, own)(start(tx), batch)
    assert metrics[name].mean() == 2
    options: Any = {"reward_gain": True} if name == "reward_gain" else {}
    step = cotgrpo.make_grpo_step(make_own(False, "scalar"), tx, own, **options)
    with pytest.raises(ValueError, match=f"reports a metric {name!r}, which is the step's own: give it another name"):
        step(start(tx), batch)
