"""A loss of whole replies against autodiff in float64 on all logits, and what it costs."""

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
from test_train_steps import assert_same

import cotgrpo
from cotgrpo import GhostBatch, GroupRelative, Nll, Pair, ReferenceKl, RewardGradient, Student, TrainState
from cotgrpo.sequence_loss import SequenceInputs, count_replies, number_documents, sequence_sums
from cotgrpo.tiled_loss import HeadSpec
from cotgrpo.train_steps import token_inputs

V, D, B, T = 38, 12, 8, 20
REAL = 33


def gspo(reply: Any) -> Any:
    """Group Sequence Policy Optimization (Zheng et al. 2025, arXiv:2507.18071): one clipped ratio for a whole reply."""
    ratio = jnp.exp(-reply.mean(reply.losses) - reply.mean(reply["drawn_log_probs"]))
    advantage = reply.field("advantages")
    bounded = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.minimum(ratio * advantage, bounded * advantage), {"ratio": ratio}


def mean_of_means(reply: Any) -> Any:
    """Every reply counts alike, however long it is."""
    return reply.mean(reply.losses), {}


def weighted(reply: Any) -> Any:
    return reply.field("advantages") * reply.sum(reply.losses), {"length": jnp.sum(reply.weight != 0)}


def worst(reply: Any) -> Any:
    """A soft maximum over the tokens of a reply: no slope is known before all losses are."""
    return jax.nn.logsumexp(jnp.where(reply.weight != 0, 3 * reply.losses, -jnp.inf)) / 3, {}


def with_metrics(reply: Any) -> Any:
    """Weighs a reply by its entropy, which has no gradient."""
    return reply.mean(reply.losses) ** 2 * reply.mean(reply.metrics["entropy"]), {}


SEQUENCE_LOSSES = {"gspo": gspo, "mean of means": mean_of_means, "weighted": weighted, "worst": worst}


def rows_of(params: Any, tokens: Any) -> Any:
    return jnp.tanh(params["embedding"][tokens])


def make_own(**options: Any) -> Student:
    return Student(lambda p, tokens, *_: rows_of(p, tokens), lambda p: p["head"], **options)


STUDENTS = {
    "head": make_own(),
    "logits": Student.from_logits(lambda p, tokens, *_: rows_of(p, tokens) @ p["head"]),
    "soft-cap, padded": make_own(softcap=2.0, vocab_size=REAL),
}


@functools.cache
def params_of() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in (("embedding", (V, D)), ("head", (D, V)))
    }


@functools.cache
def batch_of() -> GhostBatch:
    """Packed rows: up to four documents with prompts, some without a supervised token, weights, and padding."""
    rng = np.random.default_rng(0)
    segments, positions, mask, advantages = (
        np.zeros((B, T), kind) for kind in (np.int32, np.int32, np.float32, np.float32)
    )
    for row in range(B - 1):  # the last is padding
        ends = np.sort(rng.choice(np.arange(2, T + 1), rng.integers(1, 5), replace=False))
        first = 0
        for number, end in enumerate(ends):
            # Numbers of documents may be any, such as indices of a data set.
            segments[row, first:end] = number + 1 if row % 2 else 1000 - 7 * number
            positions[row, first:end] = np.arange(end - first)
            prompt = first + rng.integers(0, end - first)
            mask[row, prompt:end] = rng.choice([0.5, 1.0, 2.0]) if rng.random() < 0.85 else 0.0
            advantages[row, first:end] = rng.normal()
            first = end
    mask *= rng.random((B, T)) < 0.9
    ids = lambda: rng.integers(0, REAL, (B, T)).astype(np.int32)
    extra = {"advantages": advantages, "drawn_log_probs": (-3.5 + 0.3 * rng.normal(size=(B, T))).astype(np.float32)}
    return GhostBatch(ids(), ids(), positions, segments, mask, drawn_tokens=ids(), extra=extra)


def replies_of(batch: GhostBatch) -> list[tuple[int, np.ndarray]]:
    """Return the row and the supervised tokens of each reply."""
    found = []
    for row in range(len(batch.tokens)):
        for number in np.unique(np.asarray(batch.segment_ids)[row]):
            own = np.flatnonzero((batch.segment_ids[row] == number) & (batch.loss_mask[row] != 0))
            if number and own.size:
                found.append((row, own))
    return found


def oracle(sequence_loss: Any, token_loss: Any, student: Student, batch: GhostBatch) -> tuple[float, Any]:
    """Return the mean over replies and its gradient in float64: a Python loop, arrays of a reply's own tokens only."""

    def mean(params: Any) -> Any:
        logits = rows_of(params, batch.tokens) @ params["head"]
        if student.softcap:
            logits = jnp.where(jnp.arange(V) < REAL, student.softcap * jnp.tanh(logits / student.softcap), -jnp.inf)
        losses = token_loss(logits, batch)
        found = []
        for row, own in replies_of(batch):
            extra = {name: jnp.asarray(array[row, own], jnp.float64) for name, array in batch.extra.items()}
            weight = jnp.asarray(batch.loss_mask[row, own], jnp.float64)
            p = jax.nn.softmax(logits[row, own])
            entropy = jax.lax.stop_gradient(
                -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
            )
            found.append(sequence_loss(SequenceInputs(losses[row, own], weight, {"entropy": entropy}, extra))[0])
        return sum(found) / len(found)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        loss, grads = jax.value_and_grad(mean)(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params_of()))
    return float(loss), jax.device_get(grads)


def nll_of(ids: Any) -> Any:
    return lambda logits, batch: (
        -jnp.take_along_axis(jax.nn.log_softmax(logits), ids(batch)[..., None], axis=-1)[..., 0]
    )


def drawn_reward(logits: Any, batch: GhostBatch) -> Any:
    pick = lambda ids: jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return pick(batch.drawn_tokens) - pick(batch.ghost_tokens)


def plain(logits_V: Any, token: Any) -> Any:
    """An objective without a closed form."""
    return -jax.nn.log_softmax(logits_V)[token.ghost], {"entropy": jnp.float32(0)}


slow = pytest.mark.slow
OBJECTIVES: dict[str, tuple[Any, Any]] = {
    "closed form": (Nll(), nll_of(lambda batch: batch.ghost_tokens)),
    "autodiff": (plain, nll_of(lambda batch: batch.ghost_tokens)),
    "drawn": (RewardGradient(), drawn_reward),
}


def check(got: Any, metrics: Any, want: tuple[float, Any], rate: float = 1.0) -> None:
    loss, grads = want
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=2e-5, atol=1e-6)
    assert float(metrics["loss"].weight) == len(replies_of(batch_of()))
    for name, grad in grads.items():
        moved = (np.asarray(params_of()[name], np.float64) - np.asarray(got.params[name], np.float64)) / rate
        np.testing.assert_allclose(moved, grad, atol=3e-5 * np.abs(grad).max(), rtol=2e-4)


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("gspo", "head"),
        ("worst", "soft-cap, padded"),
        ("weighted", "logits"),
        *(
            pytest.param(name, student, marks=slow)
            for name in (*SEQUENCE_LOSSES, "with metrics")
            for student in STUDENTS
            if (name, student) not in {("gspo", "head"), ("worst", "soft-cap, padded"), ("weighted", "logits")}
        ),
    ],
)
def test_a_step_is_autodiff_in_float64(name: str, student: str) -> None:
    function = SEQUENCE_LOSSES.get(name, with_metrics)
    tx = optax.sgd(1.0)
    step = cotgrpo.make_grpo_step(STUDENTS[student], tx, Nll(), sequence_loss=function, tile_size=7)
    state, metrics = jax.jit(step)(TrainState.create(params=params_of(), tx=tx, key=0), batch_of())
    check(state, metrics, oracle(function, OBJECTIVES["closed form"][1], STUDENTS[student], batch_of()))
    assert metrics["token_loss"].mean() == pytest.approx(cotgrpo_token_loss(STUDENTS[student]), rel=1e-5)


@functools.cache
def cotgrpo_token_loss(student: Student) -> float:
    return cotgrpo.make_eval_step(student)(params_of(), batch_of())["loss"].mean()


@pytest.mark.parametrize(
    ("objective", "micro_batches", "tile_size"),
    [
        ("autodiff", 4, 3),
        *(pytest.param(name, parts, size, marks=slow) for name in OBJECTIVES for parts in (1, 4) for size in (3, None)),
    ],
)
def test_neither_tiles_nor_micro_batches_change_anything(
    objective: str, micro_batches: int, tile_size: int | None
) -> None:
    (function, token_loss), tx = OBJECTIVES[objective], optax.sgd(1.0)
    step = cotgrpo.make_grpo_step(
        make_own(), tx, function, sequence_loss=gspo, micro_batches=micro_batches, tile_size=tile_size
    )
    state, metrics = jax.jit(step)(TrainState.create(params=params_of(), tx=tx, key=0), batch_of())
    check(state, metrics, oracle(gspo, token_loss, make_own(), batch_of()))
    assert float(metrics["ratio"].weight) == len(replies_of(batch_of()))


MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...], AxisType]] = {
    "auto": ((8,), ("dp",), AxisType.Auto),
    "auto, vocabulary": ((4, 2), ("dp", "tp"), AxisType.Auto),
    "auto, sequence": ((4, 2), ("dp", "sp"), AxisType.Auto),
    "explicit": ((8,), ("dp",), AxisType.Explicit),
    "explicit, sequence": ((4, 2), ("dp", "sp"), AxisType.Explicit),
}


def explicit_rows(params: Any, tokens: Any, *_: Any) -> Any:
    sharding = jax.typeof(tokens).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return rows_of(params, tokens)
    out = NamedSharding(sharding.mesh, P(*sharding.spec, None))
    return jnp.tanh(params["embedding"].at[tokens].get(out_sharding=out))


@pytest.mark.parametrize("name", ["own", "explicit", *(pytest.param(name, marks=slow) for name in MESHES)])
def test_on_a_mesh(name: str) -> None:
    tx, student = optax.sgd(1.0), Student(explicit_rows, lambda p: p["head"])
    step = cotgrpo.make_grpo_step(student, tx, Nll(), sequence_loss=gspo, tile_size=7)
    state = TrainState.create(params=params_of(), tx=tx, key=0)
    if name == "own":
        got, metrics = cotgrpo.jit_step(step, mesh=cotgrpo.make_mesh(fsdp=2, tensor=2, context=2))(state, batch_of())
    else:
        shape, axes, kind = MESHES[name]
        mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
        tokens = P("dp", "sp") if "sp" in axes else P("dp")
        heads = {"embedding": P(), "head": P(None, "tp" if "tp" in axes else None)}
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        params = {key: put(value, heads[key]) for key, value in params_of().items()}
        with jax.set_mesh(mesh):
            state = put(state, P()).replace(params=params)
            got, metrics = jax.jit(step)(state, put(batch_of(), tokens))
    check(jax.device_get(got), metrics, oracle(gspo, OBJECTIVES["closed form"][1], make_own(), batch_of()))


def test_float64() -> None:
    """In float64 the numbers are the oracle's to twelve digits, with an auxiliary loss and without implicit types."""
    each = lambda rows: jnp.mean(rows**2, axis=-1)
    student = Student(lambda p, t, *_: (rows_of(p, t), (each(rows_of(p, t)), {})), lambda p: p["head"], has_aux=True)
    want, grads = oracle(gspo, OBJECTIVES["closed form"][1], make_own(), batch_of())
    real = np.asarray(batch_of().segment_ids) != 0
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tx, params = optax.sgd(1.0), jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params_of())
        router = lambda p: jnp.sum(jnp.where(real, each(rows_of(p, batch_of().tokens)), 0)) / float(real.sum())
        router_loss, router_grads = jax.value_and_grad(router)(params)
        options: Any = {"sequence_loss": gspo, "micro_batches": 2, "tile_size": 7}
        step = jax.jit(cotgrpo.make_grpo_step(student, tx, Nll(), **options))
        state, metrics = step(TrainState.create(params=params, tx=tx, key=0), batch_of())
        np.testing.assert_allclose(metrics["loss"].mean(), want, rtol=1e-10)
        np.testing.assert_allclose(metrics["aux_loss"].mean(), router_loss, rtol=1e-10)
        for name, grad in grads.items():
            moved = np.asarray(params[name]) - np.asarray(state.params[name])
            np.testing.assert_allclose(moved, grad + np.asarray(router_grads[name]), rtol=1e-6, atol=1e-9)


@slow
def test_inside_a_shard_map() -> None:
    """The loss and its gradient, of which the user adds up what each device has."""

    def local(params: Any, batch: GhostBatch) -> Any:
        def total(params: Any) -> Any:
            sums = sequence_sums(
                gspo, Nll(), rows_of(params, batch.tokens), params["head"], token_inputs(Nll(), batch),
                batch.segment_ids, extra=batch.extra, spec=HeadSpec(),
            )  # fmt: skip
            return sums.loss, sums.replies

        (loss, replies), grads = jax.value_and_grad(total, has_aux=True)(params)
        return jax.lax.psum((loss, replies), "dp"), grads

    mesh = jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Auto,))
    spread = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P()))
    (loss, replies), grads = spread(params_of(), batch_of())
    want, want_grads = oracle(gspo, OBJECTIVES["closed form"][1], make_own(), batch_of())
    np.testing.assert_allclose(loss / replies, want, rtol=2e-5)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name] / replies, grad, atol=3e-5 * np.abs(grad).max(), rtol=2e-4)


@slow
def test_seeds_and_steps_and_draws() -> None:
    """Under `vmap` and `scan`, with tokens that the step draws: the same in both passes of the head."""
    tx, batch = optax.sgd(0.5), batch_of().replace(drawn_tokens=None)
    step = cotgrpo.make_grpo_step(make_own(), tx, RewardGradient(samples=2), sequence_loss=worst)
    begin = lambda key: TrainState.create(params=params_of(), tx=tx, key=key)
    keys = jax.random.split(jax.random.key(0), 3)
    states, metrics = jax.jit(
        jax.vmap(lambda key: jax.lax.scan(lambda state, _: step(state, batch), begin(key), length=2))
    )(keys)
    for index in range(3):
        state = begin(keys[index])
        for _ in range(2):
            state, last = jax.jit(step)(state, batch)
        assert_same(jax.tree.map(lambda x, i=index: x[i], states.params), state.params, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["loss"].total[index, -1], last["loss"].total, rtol=1e-4)


def test_documents_in_one_row_are_those_rows_apart() -> None:
    batch, tx = batch_of(), optax.sgd(1.0)
    apart = []
    for row, own in replies_of(batch):
        number = batch.segment_ids[row, own[0]]
        cut = np.flatnonzero(batch.segment_ids[row] == number)
        padded = lambda x, row=row, cut=cut: np.pad(x[row][cut], (0, T - len(cut)))
        apart.append(jax.tree.map(padded, batch))
    alone = jax.tree.map(lambda *x: np.stack(x), *apart)
    step = jax.jit(cotgrpo.make_grpo_step(make_own(), tx, Pair(), sequence_loss=worst))
    begin = lambda: TrainState.create(params=params_of(), tx=tx, key=0)
    (packed, metrics), (single, found) = step(begin(), batch), step(begin(), alone)
    assert_same(packed.params, single.params, rtol=1e-4, atol=1e-6)
    for name in ("loss", "token_loss", "entropy"):
        np.testing.assert_allclose(metrics[name].mean(), found[name].mean(), rtol=1e-5)


def test_the_number_of_replies_is_known_from_the_batch() -> None:
    batch = batch_of()
    assert float(count_replies(batch.segment_ids, batch.loss_mask)) == len(replies_of(batch))
    numbers = np.asarray(number_documents(jnp.asarray([[0, 0, 9, 9, 4, 4, 0, 2], [1, 2, 2, 1, 1, 0, 0, 1]])))
    np.testing.assert_array_equal(numbers, [[0, 0, 1, 1, 2, 2, 0, 3], [1, 2, 2, 3, 3, 0, 0, 4]])


@slow
def test_an_auxiliary_loss_next_to_it_counts_as_it_does_alone() -> None:
    """The gradient is the sum of the two, in any number of micro-batches."""
    tx = optax.sgd(1.0)
    each = lambda rows: jnp.mean(rows**2, axis=-1)
    both = Student(lambda p, t, *_: (rows_of(p, t), (each(rows_of(p, t)), {})), lambda p: p["head"], has_aux=True)
    begin = lambda: TrainState.create(params=params_of(), tx=tx, key=0)
    real = np.asarray(batch_of().segment_ids) != 0
    router = jax.grad(lambda p: jnp.sum(jnp.where(real, each(rows_of(p, batch_of().tokens)), 0)) / real.sum())(
        params_of()
    )
    for micro_batches in (1, 4):
        options: Any = {"sequence_loss": gspo, "micro_batches": micro_batches}
        alone, want = jax.jit(cotgrpo.make_grpo_step(make_own(), tx, Nll(), **options))(begin(), batch_of())
        state, metrics = jax.jit(cotgrpo.make_grpo_step(both, tx, Nll(), **options))(begin(), batch_of())
        expected = jax.tree.map(lambda p, g: p - g, alone.params, router)
        assert_same(state.params, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"].mean(), want["loss"].mean(), rtol=1e-6)


@slow
def test_evaluation_a_reference_and_group_relative() -> None:
    batch, tx = batch_of(), optax.sgd(0.1)
    loss, _ = oracle(worst, OBJECTIVES["closed form"][1], make_own(), batch)
    metrics = jax.jit(cotgrpo.make_eval_step(make_own(), sequence_loss=worst, tile_size=7))(params_of(), batch)
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=2e-5)
    halves = [cotgrpo.make_eval_step(make_own(), sequence_loss=worst)(params_of(), part(batch)) for part in (
        lambda x: jax.tree.map(lambda a: a[:3], x), lambda x: jax.tree.map(lambda a: a[3:], x))]  # fmt: skip
    np.testing.assert_allclose((halves[0]["loss"] + halves[1]["loss"]).mean(), loss, rtol=2e-5)
    step = cotgrpo.make_grpo_step(
        make_own(), tx, ReferenceKl(GroupRelative(), 0.1), reference=make_own(), sequence_loss=mean_of_means
    )
    state = TrainState.create(params=params_of(), tx=tx, key=0)
    state, metrics = jax.jit(step)(state, batch, params_of())
    assert metrics["skipped"].mean() == 0 and metrics["kl"].mean() == pytest.approx(0, abs=1e-6)


def test_what_is_not_supervised_may_hold_anything() -> None:
    batch, tx = batch_of(), optax.sgd(1.0)
    mask = np.asarray(batch.loss_mask) != 0
    spoil = lambda x: np.where(mask, x, np.nan).astype(np.float32)
    spoiled = batch.replace(extra={name: spoil(array) for name, array in batch.extra.items()})
    nan = Student(lambda p, t, *_: jnp.where(mask[..., None], rows_of(p, t), jnp.nan), lambda p: p["head"])
    begin = lambda: TrainState.create(params=params_of(), tx=tx, key=0)
    want, _ = jax.jit(cotgrpo.make_grpo_step(make_own(), tx, Nll(), sequence_loss=gspo))(begin(), batch)
    got, metrics = jax.jit(cotgrpo.make_grpo_step(nan, tx, Nll(), sequence_loss=gspo))(begin(), spoiled)
    np.testing.assert_allclose(got.params["head"], want.params["head"], rtol=1e-5, atol=1e-6)
    assert np.isfinite(metrics["loss"].mean())


def test_a_loss_that_is_not_finite_or_no_reply_skips_the_step() -> None:
    tx = optax.adam(0.1)
    begin = lambda: TrainState.create(params=params_of(), tx=tx, key=0)
    infinite = lambda reply: (jnp.log(0 * reply.sum(reply.losses)), {})
    nothing = batch_of().replace(loss_mask=np.zeros((B, T), np.float32))
    for function, batch in ((infinite, batch_of()), (gspo, nothing)):
        state, metrics = jax.jit(cotgrpo.make_grpo_step(make_own(), tx, Nll(), sequence_loss=function))(begin(), batch)
        assert metrics["skipped"].mean() == 1 and np.isnan(metrics["loss"].mean())
        assert_same(state.params, params_of(), rtol=0.0, atol=0.0)


def head_flops(sequence_loss: Any, split: bool = False) -> float:
    """FLOPs of a step whose model is almost only a head, in products of the head with all tokens."""
    width, size, rows, length = 256, 512, 4, 32
    params = {"embedding": jnp.zeros((size, width)), "head": jnp.zeros((width, size))}
    ids = jnp.zeros((rows, length), jnp.int32)
    extra = {name: jnp.zeros((rows, length)) for name in ("advantages", "drawn_log_probs")}
    batch = GhostBatch(ids, ids, ids, ids + 1, ids + 1.0, extra=extra)
    tx = optax.sgd(1.0)
    step = cotgrpo.make_grpo_step(make_own(), tx, Nll(), sequence_loss=sequence_loss, tile_size=rows * length)
    state = TrainState.create(params=params, tx=tx, key=0)
    if split:
        mesh = jax.make_mesh((1,), ("dp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        batch = jax.device_put(batch, NamedSharding(mesh, P("dp")))
    cost: Any = jax.jit(step).lower(state, batch).compile().cost_analysis()
    return cost["flops"] / (2 * rows * length * width * size)


def test_what_it_costs() -> None:
    """Three products of the head if no slope needs a loss, as for any objective of one token, and else four."""
    tokens = head_flops(None)
    assert 3 < tokens < 3.2
    for name in ("mean of means", "weighted"):
        assert abs(head_flops(SEQUENCE_LOSSES[name]) - tokens) < 0.1
    for name in ("gspo", "worst"):
        assert 0.95 < head_flops(SEQUENCE_LOSSES[name]) - tokens < 1.1


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda reply: reply.mean(reply.losses), ValueError, r"must return \(loss, metrics\), a scalar and a dict"),
        (lambda reply: (reply.losses, {}), ValueError, r"must return scalars, got loss of the shape \(20,\)"),
        (lambda reply: (jnp.sum(reply.losses), {"all": reply.losses}), ValueError, r"got all of the shape \(20,\)"),
        (
            lambda reply: (jnp.sum(reply.losses), {"loss": 1.0}),
            ValueError,
            "reports a metric 'loss', which is the step",
        ),
        (lambda reply: (jnp.sum(reply.losses), {"entropy": 1.0}), ValueError, "metric 'entropy', as another part of"),
        (lambda reply: (jnp.sum(reply.losses), {"token_loss": 1.0}), ValueError, "'token_loss', which is the step's"),
        (lambda reply: (reply.field("reward"), {}), KeyError, r"'reward', which the batch does not carry.*advantages"),
    ],
)
def test_messages(function: Any, error: type[Exception], message: str) -> None:
    tx = optax.sgd(0.1)
    state = TrainState.create(params=params_of(), tx=tx, key=0)
    with pytest.raises(error, match=message):
        cotgrpo.make_sft_step(make_own(), tx, Nll(), sequence_loss=function)(state, batch_of())


def test_it_must_be_a_function() -> None:
    with pytest.raises(ValueError, match=r"sequence_loss must be a function of one reply or None, got 0\.5"):
        cotgrpo.make_grpo_step(make_own(), optax.sgd(0.1), sequence_loss=0.5)
