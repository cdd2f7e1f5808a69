"""A step gives the same numbers, for the same work a device, on meshes of a user's own: any axes, any kind of axes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cotgrpo
from cotgrpo import GhostBatch, Student, TrainState
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.lora import LoraConfig, init_lora, make_lora_step
from cotgrpo.objectives import Nll, Pair, ReferenceKl
from cotgrpo.planning.hlo import collectives
from cotgrpo.sharding import param_spec, path_name
from cotgrpo.train_steps import make_batch_loss

V, D, B, T, TILE = 256, 32, 16, 16, 8
TX = optax.sgd(0.5, momentum=0.9)


def hidden(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Any:
    """A model of a user's own, which names no axis. On Explicit axes it lays out what JAX cannot infer."""
    mesh, spec = jax.typeof(tokens).sharding.mesh, jax.typeof(tokens).sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return jnp.tanh(params["embedding"][tokens] @ params["mix"])
    out = NamedSharding(mesh, P(*spec, None))
    rows = params["embedding"].at[tokens].get(out_sharding=out)
    return jnp.tanh(jnp.einsum("btd,de->bte", rows, params["mix"], out_sharding=out))


def scaled(logits: Any, inputs: Any) -> Any:
    """An objective of a user's own, with a field of its own and a constant array."""
    loss, metrics = Nll()(logits, inputs)
    return loss * inputs["scale"] + jnp.sum(jax.nn.softmax(logits) * jnp.asarray(PRICES)), metrics


PRICES = np.linspace(0, 1, V, dtype=np.float32)
OWN = Student(hidden, lambda params: params["head"])
LOGITS = Student.from_logits(lambda params, *contexts: hidden(params, *contexts) @ params["head"])
CONFIG = DecoderConfig(
    vocab_size=V, width=D, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_width=48, tied_head=True,
    qk_norm=True, init_scale=0.2,
)  # fmt: skip
DECODER = make_student(CONFIG, V - 3)


@functools.cache
def params_of(student: Student, seed: int = 1) -> Any:
    if student is DECODER:
        return jax.device_get(init_params(CONFIG, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    return {"embedding": normal(V, D), "mix": normal(D, D), "head": normal(D, V)}


@functools.cache
def batch_of() -> GhostBatch:
    """Rows hardly supervised next to full ones: shards have different work."""
    rng = np.random.default_rng(0)
    tokens, ghosts = (rng.integers(0, V - 3, (B, T)).astype(np.int32) for _ in range(2))
    mask = (rng.random((B, T)) < rng.choice([0.05, 0.5, 1.0], (B, 1))).astype(np.float32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    extra = {"scale": rng.random((B, T)).astype(np.float32)}
    return GhostBatch(tokens, ghosts, positions, np.ones((B, T), np.int32), mask, extra=extra)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, the axes of a batch, and those that stand for "tensor" and "fsdp" in the parameters."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    batch: P
    tensor: str | None = None
    fsdp: str | None = None

    def mesh(self, kind: AxisType) -> Mesh:
        return jax.make_mesh(self.shape, self.names, axis_types=(kind,) * len(self.shape))

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        own = {"tensor": self.tensor, "fsdp": self.fsdp}
        of = lambda path, leaf: P(*(own.get(role) for role in param_spec(path_name(path), leaf.shape, {})))
        return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, of(path, leaf)), tree)


CASES = {
    "dp": Case((8,), ("dp",), P("dp")),
    "one-axis-for-all": Case((8,), ("x",), P("x"), fsdp="x"),
    "vocabulary": Case((4, 2), ("dp", "tp"), P("dp"), tensor="tp"),
    "width": Case((4, 2), ("dp", "tp"), P("dp"), fsdp="tp"),
    "two-axes": Case((2, 4), ("replica", "shard"), P(("replica", "shard")), fsdp="shard"),
    "sequence": Case((4, 2), ("dp", "sp"), P("dp", "sp")),
    "tp-alone": Case((8,), ("model",), P(), tensor="model"),
    "whole": Case((8,), ("idle",), P()),
}
SETUPS = ("auto", "auto-ambient", "explicit", "explicit-ambient")


def step_of(student: Student, objective: Any, **options: Any) -> tuple[Any, TrainState, tuple[Any, ...]]:
    reference = student if isinstance(objective, ReferenceKl) else None
    step = cotgrpo.make_grpo_step(student, TX, objective, reference=reference, tile_size=TILE, **options)
    state = TrainState.create(params=params_of(student), tx=TX, key=5)
    return step, jax.device_get(state), () if reference is None else (params_of(student, 2),)


def compiled_on(case: Case, setup: str, step: Any, state: Any, batch: Any, rest: tuple[Any, ...] = ()) -> Any:
    """The compiled step of a user who knows `jax.jit` alone, and its arguments."""
    mesh = case.mesh(AxisType.Auto if "auto" in setup else AxisType.Explicit)
    shardings = (case.shardings(state, mesh), NamedSharding(mesh, case.batch), *(case.shardings(x, mesh) for x in rest))
    arguments = (state, batch, *rest)
    with jax.set_mesh(mesh) if "ambient" in setup else contextlib.nullcontext():
        if setup == "auto":
            return jax.jit(step, in_shardings=shardings).lower(*arguments).compile(), arguments
        arguments = tuple(map(jax.device_put, arguments, shardings))
        return jax.jit(step).lower(*arguments).compile(), arguments


@functools.cache
def on_one_device(student: Student, objective: Any) -> Any:
    step, state, rest = step_of(student, objective)
    return jax.device_get(jax.jit(step)(state, batch_of(), *rest))


def assert_same(got: Any, want: Any) -> None:
    (state, metrics), (one_state, one_metrics) = jax.device_get(got), want
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state.params, one_state.params)
    for name, metric in one_metrics.items():
        assert metrics[name].mean() == pytest.approx(metric.mean(), abs=1e-5, rel=1e-5), name


DRAWN = Pair(estimator="drawn", samples=2)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "setup", "student", "objective"),
    [
        pytest.param("dp", "auto", OWN, scaled, id="dp-auto-own_objective"),
        pytest.param("vocabulary", "auto-ambient", OWN, DRAWN, id="vocabulary-auto-drawn"),
        pytest.param("width", "explicit", OWN, ReferenceKl(Pair(), 0.3), id="width-explicit-reference"),
        pytest.param("one-axis-for-all", "auto", LOGITS, Nll(), id="one_axis-auto-logits"),
        *(
            pytest.param(case, setup, student, objective, marks=slow, id=f"{case}-{setup}-{name}")
            for index, case in enumerate(CASES)
            for setup in SETUPS
            for name, student, objective in (
                ("own", OWN, (ReferenceKl(DRAWN, 0.3), scaled)[index % 2]),
                ("decoder", DECODER, (Pair(), DRAWN)[index % 2]),
            )
        ),
    ],
)
def test_numbers_of_one_device(case: str, setup: str, student: Student, objective: Any) -> None:
    step, state, rest = step_of(student, objective)
    compiled, arguments = compiled_on(CASES[case], setup, step, state, batch_of(), rest)
    assert_same(compiled(*arguments), on_one_device(student, objective))


OF_OUR_OWN = {
    "dp": {"data": 8},
    "one-axis-for-all": {"fsdp": 8},
    "vocabulary": {"data": 4, "tensor": 2},
    "two-axes": {"data": 2, "fsdp": 4},
    "sequence": {"data": 4, "context": 2},
}
"""Our own mesh with the layout of a case."""


@pytest.mark.parametrize(
    ("case", "setup", "student"),
    [
        pytest.param("dp", "auto", OWN, id="dp-auto-own"),
        pytest.param("dp", "explicit", OWN, id="dp-explicit-own"),
        pytest.param("one-axis-for-all", "auto", DECODER, id="one-axis-for-all-auto-decoder"),
        *(
            pytest.param(case, setup, student, marks=slow, id=f"{case}-{setup}-{name}")
            for case in OF_OUR_OWN
            for name, student, setups in (("own", OWN, ("auto", "explicit")), ("decoder", DECODER, SETUPS))
            for setup in setups
            if (case, name) not in (("dp", "own"), ("one-axis-for-all", "own"))
            if (case, setup) != ("one-axis-for-all", "auto")
        ),
    ],
)
def test_work_of_our_own_mesh(case: str, setup: str, student: Student) -> None:
    """FLOPs and temporaries a device are at most 5 % above, and no head travels in the loop over tiles."""
    step, state, _ = step_of(student, Pair())
    own = OF_OUR_OWN[case]
    ours = cotgrpo.jit_step(step, cotgrpo.make_mesh(**own)).lower(state, batch_of()).compile()
    theirs, _ = compiled_on(CASES[case], setup, step, state, batch_of())
    flops, their_flops = (program.cost_analysis()["flops"] for program in (ours, theirs))
    assert their_flops <= 1.05 * flops
    size, their_size = (program.memory_analysis().temp_size_in_bytes for program in (ours, theirs))
    assert their_size <= 1.05 * size
    in_tiles = [c for c in collectives(theirs.as_text()) if None in c.loops]
    assert all(math.prod(shape) <= TILE * V for c in in_tiles for _, shape in c.arrays)
    gathered, their_gathered = (
        sum(c.bytes * c.times() for c in collectives(program.as_text()) if c.kind == "all-gather")
        for program in (ours, theirs)
    )
    # The embedding that is the head too is gathered for each: on our own mesh once for both.
    assert their_gathered <= 1.05 * gathered + 4 * V * D
    if case == "dp":
        assert not in_tiles
        alone = jax.jit(step).lower(state, batch_of()).compile().cost_analysis()["flops"]
        assert their_flops < alone


@slow
@pytest.mark.parametrize(("names", "own"), [(("dp", "tp"), ("data", "tensor")), (("dp", "x"), ("data", "fsdp"))])
def test_work_of_a_partly_manual_mesh(names: tuple[str, str], own: tuple[str, str]) -> None:
    """Sequences over a manual axis, heads or parameters over an Auto one: as with our own names for them.

    An Auto axis that splits sequences and parameters takes up to a tenth more temporaries. JAX cannot partition the
    loop over tiles in there when it compiles, so XLA splits each tile and not the tokens.
    """
    loss_of = make_batch_loss(DECODER, Pair(), None, TILE)
    gradient = jax.value_and_grad(lambda params, batch: loss_of(params, batch, None, None), has_aux=True)

    def compiled(names: tuple[str, str]) -> Any:
        shards = {"tensor": names[1]} if own[1] == "tensor" else {"fsdp": names[1]}
        batch = P(names[0]) if own[1] == "tensor" else P(names)
        case = Case((4, 2), names, batch, **shards)
        mesh = case.mesh(AxisType.Auto)
        local = lambda params, batch: jax.lax.psum(gradient(params, batch), names[0])
        spread = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(names[0])), out_specs=P(), axis_names={names[0]}, check_vma=False
        )
        at = case.shardings(params_of(DECODER), mesh)
        placed = jax.device_put((params_of(DECODER), batch_of()), (at, NamedSharding(mesh, batch)))
        return jax.jit(spread, out_shardings=(None, at)).lower(*placed).compile()

    ours, theirs = compiled(own), compiled(names)
    assert theirs.cost_analysis()["flops"] <= 1.05 * ours.cost_analysis()["flops"]
    size, their_size = (program.memory_analysis().temp_size_in_bytes for program in (ours, theirs))
    assert their_size <= (1.05 if own[1] == "tensor" else 1.1) * size


@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=slow)])
def test_jit_step_takes_names(kind: AxisType) -> None:
    step, state, _ = step_of(DECODER, Pair())
    mesh = CASES["vocabulary"].mesh(kind)
    compiled = cotgrpo.jit_step(step, mesh, axes={"dp": "data", "tp": "tensor"})
    got = compiled(jax.tree.map(jnp.asarray, state), batch_of())
    assert_same(got, on_one_device(DECODER, Pair()))
    found = got[0].params["embedding"].sharding
    assert found.mesh == mesh and found.is_equivalent_to(NamedSharding(mesh, P("tp")), 2)
    compiled(got[0], batch_of())  # what came back goes in


@pytest.mark.parametrize("axes", [None, {"dp": "data"}, {"dp": "data", "tp": "data"}, {"dp": "data", "tp": "model"}])
def test_jit_step_needs_every_name(axes: dict[str, str] | None) -> None:
    with pytest.raises(ValueError, match=re.escape("what the mesh's axes dp, tp stand for")):
        cotgrpo.jit_step(lambda state, batch: (state, batch), CASES["vocabulary"].mesh(AxisType.Auto), axes=axes)


@pytest.mark.parametrize("student", [OWN, pytest.param(DECODER, marks=slow)])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", ["dp", pytest.param("vocabulary", marks=slow)])
@pytest.mark.parametrize("kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=slow)])
def test_inside_a_shard_map(student: Student, check_vma: bool, case: str, kind: AxisType) -> None:
    """Wholly or partly manual. With `check_vma` JAX sums the gradient of what does not vary."""
    loss_of = make_batch_loss(student, Pair(), None, TILE)
    value_and_grad = jax.value_and_grad(lambda params, batch: loss_of(params, batch, None, None), has_aux=True)

    def local(params: Any, batch: GhostBatch) -> Any:
        (loss, (sums, weight)), grads = value_and_grad(params, batch)
        return jax.lax.psum((loss, sums, weight), "dp"), grads if check_vma else jax.lax.psum(grads, "dp")

    mesh = CASES[case].mesh(kind)
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P(), axis_names={"dp"}, check_vma=check_vma
    )
    placed = jax.device_put((params_of(student), batch_of()), (NamedSharding(mesh, P()), NamedSharding(mesh, P("dp"))))
    (loss, sums, weight), grads = jax.device_get(jax.jit(spread)(*placed))
    (one, (one_sums, one_weight)), one_grads = jax.jit(value_and_grad)(params_of(student), batch_of())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3)
    jax.tree.map(close, (loss, sums, weight, grads), jax.device_get((one, one_sums, one_weight, one_grads)))


@pytest.mark.parametrize("setup", [pytest.param("auto", marks=slow), "explicit"])
def test_lora(setup: str) -> None:
    """With dropout, drawn from a key that is an argument too."""
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.2, targets=("query", "down"))
    base = params_of(DECODER)
    make = lambda student: cotgrpo.make_grpo_step(student, TX, Pair(), tile_size=TILE)
    step = make_lora_step(make, DECODER, lora)
    state = TrainState.create(params=init_lora(base, lora, jax.random.key(3)), tx=TX, key=5)
    want = jax.device_get(jax.jit(step)(state, batch_of(), base))
    compiled, arguments = compiled_on(CASES["vocabulary"], setup, step, state, batch_of(), (base,))
    assert_same(compiled(*arguments), want)


def test_two_objectives_are_two_programs() -> None:
    """JAX keeps compiled programs by their text, in which a function that is partitioned later does not stand."""
    texts = []
    for beta in (0.5, 0.75):
        step, state, _ = step_of(OWN, Pair(beta))
        mesh = CASES["dp"].mesh(AxisType.Auto)
        shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P("dp")))
        text = jax.jit(step, in_shardings=shardings).lower(state, batch_of()).as_text()
        assert "CustomSPMDPartitioning" in text
        texts.append(re.sub(r'backend_config = "\d+"', "", text))
    assert texts[0] != texts[1]


def test_an_objective_that_closes_over_a_traced_array() -> None:
    """It cannot be traced again when the program is compiled, so its head is not spread. That is said."""
    step_with = lambda objective: cotgrpo.make_grpo_step(OWN, TX, objective, tile_size=TILE)
    priced = lambda prices: lambda logits, _: (jnp.sum(jax.nn.softmax(logits) * prices), {})
    traced = lambda state, batch, prices: step_with(priced(jnp.asarray(prices) * 2))(state, batch)
    mesh, (_, state, _) = CASES["dp"].mesh(AxisType.Auto), step_of(OWN, Pair())
    spread, whole = NamedSharding(mesh, P("dp")), NamedSharding(mesh, P())
    with pytest.warns(UserWarning, match="each of them computes the head for all tokens"):
        got = jax.jit(traced, in_shardings=(whole, spread, whole))(state, batch_of(), PRICES)
    assert_same(got, jax.device_get(jax.jit(step_with(priced(PRICES * 2)))(state, batch_of())))


def test_vmap_over_seeds() -> None:
    step, state, _ = step_of(OWN, DRAWN)
    states = jax.vmap(lambda seed: TrainState.create(params=state.params, tx=TX, key=jax.random.key(seed)))(
        jnp.arange(2)
    )
    got = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, batch_of())
    for index in range(2):
        own = jax.tree.map(lambda x, at=index: x[at], states)
        want = jax.jit(step)(own, batch_of())
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
        jax.tree.map(close, jax.tree.map(lambda x, at=index: x[at], got[0].params), want[0].params)
