"""LoRA: small trainable matrices beside frozen weights (Hu et al. 2021, arXiv:2106.09685), as pure functions on the params tree.

An adapted projection computes, with W frozen and A, B trained,

    y = x W + scale (dropout(x) A) B        scale = alpha / rank, or alpha / sqrt(rank) with `rslora`

B starts at zero, so the first step sees the frozen model. Adapters are a tree of their own, in the shape of the frozen one and stacked over
layers as it is: `{"layers": {"query": {"lora_a": [L, in, rank], "lora_b": [L, rank, out]}}}`. They are all that a `TrainState` holds; the
frozen weights are an argument of the step, neither in the state nor baked into the program:

    adapters = init_lora(params, lora, jax.random.key(0))
    step = jit_step(make_lora_step(lambda student: make_sft_step(student, tx), student, lora))
    state = TrainState.create(params=adapters, tx=tx, key=0)
    state, metrics = step(state, batch, params)
    merged = merge(params, state.params, lora)      # an ordinary model

Training never builds `W + scale A B`: the product runs beside `x W`. So no gradient of W is computed (a third of the layers' matrix products),
dropout is drawn for every token, and an update smaller than a bfloat16 weight's last bit is not rounded away.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int, PRNGKeyArray

Adapters = Any
"""A nested dict of `lora_a` and `lora_b`, in the shape of the tree that they adapt."""

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
        rank: r, columns of A and rows of B.
        alpha: the product is scaled by `alpha / rank`.
        dropout: in [0, 1), the share of the adapters' inputs that a train step sets to zero, drawn for each token and projection;
            the others are divided by `1 - dropout`. The frozen product sees them all. As in `peft`.
        targets: patterns, each searched in the paths of the layers' projections ("layers/query"). All seven by default.
        rslora: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank must be at least 1, got {self.rank}.")
        if not self.alpha > 0:
            raise ValueError(f"LoraConfig.alpha must be positive, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout must lie in [0, 1), got {self.dropout}.")
        if type(self.targets) is not tuple or not self.targets:
            raise ValueError(f"LoraConfig.targets must be a tuple of at least one pattern, got {self.targets!r}.")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def kernels(params: Params) -> dict[Path, Any]:
    """{path of a projection: its kernel `[L, in, out]`}, all that can be adapted."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(str(getattr(key, "key", key)) for key in path)
        if names[-1] == "kernel" and len(leaf.shape) == 3:
            found[names[:-1]] = leaf
    return found


def target_kernels(params: Params, lora: LoraConfig) -> dict[Path, Any]:
    """The kernels that some pattern of `lora.targets` matches.

    Raises:
        ValueError: a pattern that matches none; names those there are.
    """
    found = kernels(params)
    matched: set[Path] = set()
    for pattern in lora.targets:
        own = {path for path in found if re.search(pattern, "/".join(path))}
        if not own:
            there = ", ".join("/".join(path) for path in found) or "none"
            raise ValueError(f"The LoRA target {pattern!r} matches no projection of the model. There are: {there}.")
        matched |= own
    return {path: kernel for path, kernel in found.items() if path in matched}


def init_lora(params: Params, lora: LoraConfig, key: PRNGKeyArray) -> Adapters:
    """Fresh adapters in float32: A uniform in `[-1/sqrt(in), 1/sqrt(in)]`, as in `peft`, and B zero.

    Args:
        params: the frozen parameters, or their `jax.eval_shape`.
        lora: what is adapted.
        key: A of one projection does not depend on which others are adapted.

    Raises:
        ValueError: a target that matches nothing.
    """
    adapters: dict[Path, Any] = {}
    for path, kernel in target_kernels(params, lora).items():
        L, inputs, outputs = kernel.shape
        own, bound = jax.random.fold_in(key, number(path)), inputs**-0.5
        adapters[path] = {
            "lora_a": jax.random.uniform(own, (L, inputs, lora.rank), jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((L, lora.rank, outputs), jnp.float32),
        }
    return nested(adapters)


def merge(params: Params, adapters: Adapters, lora: LoraConfig) -> Params:
    """The model without adapters that computes what both compute: `W + scale A B`, in float32, rounded to W's dtype.

    For export, evaluation and generation. A bfloat16 W keeps of the product what its eight bits can hold: give float32 `params` to keep all of it.

    Raises:
        ValueError: adapters of another model or another `lora.rank`.
    """
    check(params, adapters, lora)
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
    for path, pair in flat(adapters):
        module = at(merged, path)
        a, b = (pair[part].astype(jnp.float32) for part in ("lora_a", "lora_b"))
        product = jnp.einsum("lir,lro->lio", a, b, precision="highest")
        module["kernel"] = (module["kernel"].astype(jnp.float32) + lora.scale * product).astype(module["kernel"].dtype)
    return merged


def lora_student(student: Student, params: Params, lora: LoraConfig, key: Any = None) -> Student:
    """The student whose parameters are adapters, beside frozen `params`.

    Inside a function that is jitted, `params` must be one of its arguments, or they become constants of the program: `make_lora_step` sees to it.

    Args:
        student: of a Flax linen model whose projections are `nn.Dense`, as `make_student` gives it.
        params: the frozen parameters of `student`.
        lora: what is adapted.
        key: for dropout; None: no dropout, as in evaluation.

    Raises:
        ValueError: when `hidden` is called, adapters of another model, or a model that does not apply them.
    """

    def hidden(adapters: Adapters, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        check(params, adapters, lora)
        beside = LoraInterceptor(lora, row_numbers(tokens))
        with nn.intercept_methods(beside):
            rows = student.hidden(
                merge_trees(params, adapters, key if lora.dropout else None), tokens, positions, segment_ids
            )
        ignored = {path for path, _ in flat(adapters)} - beside.applied
        if ignored:
            raise ValueError(
                f"The model does not apply the adapters of {', '.join('/'.join(p) for p in sorted(ignored))}: expected a Flax linen "
                "model with an nn.Dense of this path. For another model train on merge(params, adapters, lora)."
            )
        return rows

    head = student.head
    return dataclasses.replace(student, hidden=hidden, head=None if head is None else lambda adapters: head(params))


def make_lora_step(
    make_step: Callable[[Student], Callable[..., Any]], student: Student, lora: LoraConfig
) -> Callable[..., Any]:
    """A train step whose state holds adapters alone; the frozen parameters are its third argument.

    Args:
        make_step: how the step of a student is made: `lambda student: make_grpo_step(student, tx, objective)`.
        student: as in `lora_student`.
        lora: what is adapted.

    Returns:
        `step(state, batch, params[, reference_params]) -> (state, metrics)`, for `jit_step`: `params` are sharded as a state is. A reference
        that is the frozen model itself takes the same `params` again.

    Raises:
        ValueError: what `make_step` raises.
    """
    make_step(student)  # bad settings are errors now, and not inside a trace

    def step(state: Any, batch: Any, params: Params, *rest: Any) -> Any:
        # Drawn tokens use the step's own key; dropout needs another.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), number(("dropout",)))
        return make_step(lora_student(student, params, lora, key))(state, batch, *rest)

    return step


class LoraInterceptor:
    """Adds `scale (dropout(x) A) B` to the product of every `nn.Dense` beside whose kernel adapters lie: an interceptor for linen's methods.

    The products run in the model's compute type, the sums over the wide side in float32.
    """

    def __init__(self, lora: LoraConfig, row_numbers_B: Any) -> None:
        self.lora, self.row_numbers_B = lora, row_numbers_B
        self.applied: set[Path] = set()

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, product = context.module, call(*args, **kwargs)
        dense = isinstance(module, nn.Dense) and context.method_name == "__call__"
        if not dense or not module.has_variable("params", "lora_a"):
            return product
        self.applied.add(module.path)
        x = args[0].astype(product.dtype)
        if module.has_variable("params", "lora_key"):
            x = self.dropped(x, module.get_variable("params", "lora_key"))
        a, b = (module.get_variable("params", name).astype(x.dtype) for name in ("lora_a", "lora_b"))
        low = self.lora.scale * jnp.matmul(x, a, preferred_element_type=jnp.float32)
        return product + jnp.matmul(low.astype(x.dtype), b)

    def dropped(self, x: Float[Array, "B T inputs"], key: Any) -> Float[Array, "B T inputs"]:
        kept = 1.0 - self.lora.dropout
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, self.row_numbers_B)
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, kept, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / kept, 0).astype(x.dtype)


def row_numbers(tokens: Int[Array, "B T"]) -> Any:
    """uint32 `[B]`, a hash of each row's tokens. Dropout is drawn by it, so a row is treated alike wherever micro-batches and devices put it."""
    odd_T = 2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1
    return jnp.sum(tokens.astype(jnp.uint32) * odd_T[None, :] * jnp.uint32(2654435761), axis=1, dtype=jnp.uint32)


def merge_trees(params: Params, adapters: Adapters, key: Any) -> Params:
    """`params` with the adapters beside the kernels, where linen's scan slices both by layer; with a key, one for each projection's dropout too."""
    whole = jax.tree.map(lambda leaf: leaf, params)
    for path, pair in flat(adapters):
        module = at(whole, path)
        module |= pair
        if key is not None:
            own = jax.random.fold_in(key, number(path))
            module["lora_key"] = jax.random.split(own, pair["lora_a"].shape[0])
    return whole


def check(params: Params, adapters: Adapters, lora: LoraConfig) -> None:
    """Raises ValueError where adapters do not fit beside `params`."""
    found = kernels(params)
    pairs = list(flat(adapters))
    if not pairs:
        raise ValueError("The adapter tree is empty: expected what init_lora or load_adapter returns.")
    for path, pair in pairs:
        name = "/".join(path)
        if path not in found:
            there = ", ".join("/".join(p) for p in found)
            raise ValueError(f"The adapters hold {name}, which the model does not have. It has: {there}.")
        L, inputs, outputs = found[path].shape
        want = {"lora_a": (L, inputs, lora.rank), "lora_b": (L, lora.rank, outputs)}
        got = {part: tuple(leaf.shape) for part, leaf in pair.items()}
        if got != want:
            raise ValueError(
                f"The adapters of {name} have the shapes {got}, but this model and rank {lora.rank} need {want}: "
                "they belong to another model or another LoraConfig."
            )


def flat(adapters: Adapters, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path of a projection, its `lora_a` and `lora_b`) one by one."""
    if "lora_a" in adapters or "lora_b" in adapters:
        yield path, adapters
        return
    for name in adapters:
        yield from flat(adapters[name], (*path, name))


def nested(leaves: dict[Path, Any]) -> Any:
    """{("layers", "query"): x} as {"layers": {"query": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def at(tree: Any, path: Path) -> Any:
    """The subtree at a path."""
    for name in path:
        tree = tree[name]
    return tree


def number(path: Path) -> int:
    """A number of a path that is the same in every process and version, for `fold_in`."""
    return zlib.crc32("/".join(path).encode())
