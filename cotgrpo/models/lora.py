"""LoRA: small trainable matrices next to frozen weights (Hu et al. 2021, arXiv:2106.09685), as pure functions.

An adapted projection computes, with W frozen and A, B trained,

    y = x W + scale (dropout(x) A) B        scale = alpha / rank, or alpha / sqrt(rank) with `rslora`

B starts at zero, so the first step sees the frozen model. Adapters are a tree in the shape of the frozen one, stacked
over layers: `{"layers": {"query": {"lora_a": [L, in, rank], "lora_b": [L, rank, out]}}}`. A `TrainState` holds nothing
else. The frozen weights are an argument of the step, neither part of the state nor baked into the program:

    adapters = init_lora(params, lora, jax.random.key(0))
    step = jit_step(make_lora_step(lambda student: make_sft_step(student, tx), student, lora))
    state = TrainState.create(params=adapters, tx=tx, key=0)
    state, metrics = step(state, batch, params)
    merged = merge(params, state.params, lora)      # an ordinary model

Training never builds `W + scale A B`: the low-rank product is added to `x W`. So no gradient of W is computed, which is
a third of the layers' matrix products. Dropout is drawn for every token, and an update below a bfloat16 weight's last
bit is not rounded away. Evaluation and sampling do the same: they take `AdaptedParams(params, adapters, lora)` in place
of a student's parameters.

With `quantize_base` the frozen kernels are stored in four or eight bits (QLoRA, arXiv:2305.14314) and the adapters as
before: see `cotgrpo.models.quantized`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cotgrpo.models.decoder import TransposedDense
from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.norm_and_gate import broadcast_last
from cotgrpo.models.quantized.kernel import (
    BLOCK,
    CODES,
    QUANTIZED_PARTS,
    SCALE,
    Quantization,
    QuantizedKernel,
    quantized_kernel,
)
from cotgrpo.sharding import with_types_as_layout
from cotgrpo.types import GhostBatch, Metrics, Params, SftBatch, Student, TrainState
from cotgrpo.xla_cpu import project_few_tokens

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

Adapters = Params
"""A nested dict of `lora_a` and `lora_b`, in the shape of the tree that they adapt."""

Path = tuple[str, ...]
Step = Callable[..., tuple[TrainState, Metrics]]


DEFAULT_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
"""All projections. A model whose MLP has no gate has no "gate", and one with experts only has no MLP."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections are adapted, and how.

    Attributes:
        rank: columns of A and rows of B, >= 1 (peft's `r`).
        alpha: the product is scaled by `alpha / rank` (peft's `lora_alpha`).
        dropout: in [0, 1), share of the adapters' inputs that a train step sets to zero, drawn per token and
            projection. The others are divided by `1 - dropout`. The frozen product gets all inputs (as in peft).
        targets: regular expressions, searched in the paths of the layers' projections such as "layers/query".
        rslora: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023, arXiv:2312.03732).
        quantize_base: store the frozen kernels of all projections as "nf4" (QLoRA, 4.5 bits a weight) or "int8" (8.5
            bits); "none": as student.param_dtype. Embedding, head, norms, biases and the adapters keep their types.
            Needs `pip install 'cotgrpo[qlora]'`.
        block_size: inputs of a kernel that share a scale, with `quantize_base`: an even divisor of the inputs of every
            projection. None: 64.

    Raises:
        ValueError: a setting is out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    rslora: bool = False
    quantize_base: Literal["none", "int8", "nf4"] = "none"
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank must be at least 1, got {self.rank}.")
        if not self.alpha > 0:
            raise ValueError(f"LoraConfig.alpha must be positive, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout must lie in [0, 1), got {self.dropout}.")
        if type(self.targets) is not tuple or not self.targets:
            raise ValueError(f"LoraConfig.targets must be a tuple of at least one pattern, got {self.targets!r}.")
        if self.quantize_base not in ("none", "int8", "nf4"):
            raise ValueError(f"LoraConfig.quantize_base must be none, int8 or nf4, got {self.quantize_base!r}.")
        if self.block_size is not None and (self.block_size < 2 or self.block_size % 2):
            raise ValueError(f"LoraConfig.block_size must be even and at least 2, or None, got {self.block_size}.")
        if self.block_size is not None and self.quantize_base == "none":
            raise ValueError(
                "LoraConfig.block_size does not apply without quantize_base. Remove it, or set nf4 or int8."
            )

    @property
    def scale(self) -> float:
        """Return the factor of the product of A and B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def quantization(self) -> Quantization | None:
        """Return how the base is quantized, or None."""
        if self.quantize_base == "none":
            return None
        return Quantization(self.quantize_base, BLOCK if self.block_size is None else self.block_size)


class AdaptedParams(flax.struct.PyTreeNode):
    """Frozen parameters and their adapters, in place of a student's parameters. Nothing is merged.

    The students of `with_adapters`, the samplers of `cotgrpo.sampling.make_sampler` and `save_pretrained` take them.

    Attributes:
        base: the frozen parameters.
        adapters: what was trained.
        lora: how they are applied.
    """

    base: Params
    adapters: Adapters
    lora: LoraConfig = flax.struct.field(pytree_node=False)


def kernels(params: Params) -> dict[Path, Any]:
    """Return {path: kernel `[L, in, out]`} of all projections that can be adapted.

    A quantized one is a `QuantizedKernel`, whose `shape` is that of the kernel.
    """
    leaves = {
        tuple(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    found = {}
    for path, leaf in leaves.items():
        if path[-1] == "kernel" and len(leaf.shape) == 3:
            found[path[:-1]] = leaf
        elif path[-1] in CODES:
            found[path[:-1]] = QuantizedKernel(leaf, leaves[*path[:-1], SCALE])
    return found


def is_quantized(params: Params) -> bool:
    """Return whether some kernels are quantized."""
    return any(isinstance(kernel, QuantizedKernel) for kernel in kernels(params).values())


def refuse_quantized(params: Params) -> None:
    """Raise ValueError if some kernels are quantized, so that adapters cannot be merged into them."""
    if is_quantized(params):
        raise ValueError(
            "The base is quantized, and merged weights would keep its error: pass the base as it was before "
            "quantize_base, read again from its folder."
        )


def target_kernels(params: Params, lora: LoraConfig) -> dict[Path, Any]:
    """Return the kernels that a pattern of `lora.targets` matches.

    Raises:
        ValueError: a pattern matches no kernel. The message names the kernels.
    """
    found = kernels(params)
    matched: set[Path] = set()
    for pattern in lora.targets:
        own = {path for path in found if re.search(pattern, "/".join(path))}
        if not own and not (pattern in ("gate", "up", "down") and lora.targets == DEFAULT_TARGETS):
            names = ", ".join("/".join(path) for path in found) or "none"
            paths = (key for path, _ in jax.tree_util.tree_leaves_with_path(params) for key in path)
            experts = " Experts have no adapters." * any(getattr(key, "key", key) == "experts" for key in paths)
            raise ValueError(
                f"The LoRA target {pattern!r} matches no projection of the model. There are: {names}.{experts}"
            )
        matched |= own
    return {path: kernel for path, kernel in found.items() if path in matched}


def init_lora(params: Params, lora: LoraConfig, key: PRNGKeyArray) -> Adapters:
    """Return fresh float32 adapters: A uniform in `[-1/sqrt(in), 1/sqrt(in)]` (as in `peft`) and B zero.

    Args:
        params: the frozen parameters, or their `jax.eval_shape`.
        lora: what is adapted.
        key: a random key. A of one projection does not depend on which others are adapted.

    Raises:
        ValueError: a target matches no projection.
    """
    adapters: dict[Path, Any] = {}
    for path, kernel in target_kernels(params, lora).items():
        L, inputs, outputs = kernel.shape
        own, bound = jax.random.fold_in(key, path_hash(path)), inputs**-0.5
        adapters[path] = {
            "lora_a": jax.random.uniform(own, (L, inputs, lora.rank), jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((L, lora.rank, outputs), jnp.float32),
        }
    return unflatten_dict(adapters)


def merge(params: Params, adapters: Adapters, lora: LoraConfig) -> Params:
    """Return the parameters `W + scale A B`, computed in float32 and rounded to W's dtype.

    A bfloat16 W rounds the sum to eight bits, and a small update is lost; pass float32 `params` to keep the whole
    product. Evaluation and sampling need no merged weights: they take `AdaptedParams`.

    Raises:
        ValueError: the adapters belong to another model or another `lora.rank`, or the kernels are quantized.
    """
    check_adapters(params, adapters, lora)
    refuse_quantized(params)
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dicts, the same arrays
    for path, pair in flatten_adapters(adapters).items():
        module = subtree(merged, path)
        kernel = module["kernel"]

        def merge_layer(layer: tuple[Array, Array, Array], dtype: jnp.dtype = kernel.dtype) -> Array:
            w, update = layer[0].astype(jnp.float32), update_of(*layer[1:], lora.scale)
            return (w + update).astype(dtype)

        # One layer at a time: a stack of all in float32 may take as much memory as the model.
        module["kernel"] = jax.lax.map(merge_layer, (kernel, pair["lora_a"], pair["lora_b"]))
    return merged


def update_of(a: Float[Array, "*layers I R"], b: Float[Array, "*layers R O"], scale: float) -> Float[Array, "..."]:
    """Return `scale A B` in float32."""
    return scale * jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def share_kept(params: Params, adapters: Adapters, lora: LoraConfig, dtype: str) -> float:
    """Return the share of the update that is left once the merged weights are rounded to `dtype`.

        sum((round(W + U) - W) U) / sum(U^2),    U = scale A B,   W as it is stored

    It is about 1 if U is large next to the last bit of W, and 0 if no weight changes. Without an update it is 1.

    Raises:
        ValueError: as `merge`.
    """
    check_adapters(params, adapters, lora)
    refuse_quantized(params)

    @jax.jit
    def sums(kernel: Array, a: Array, b: Array) -> tuple[Array, Array]:
        def layer(parts: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            w, update = parts[0].astype(jnp.float32), update_of(*parts[1:], lora.scale)
            # Without the barrier XLA may keep the sum in float32.
            rounded = jax.lax.optimization_barrier((w + update).astype(dtype)).astype(jnp.float32)
            return jnp.sum((rounded - w) * update), jnp.sum(update * update)

        kept, whole = jax.lax.map(layer, (kernel, a, b))
        return jnp.sum(kept), jnp.sum(whole)

    kept = whole = 0.0
    for path, pair in flatten_adapters(adapters).items():
        parts = sums(subtree(params, path)["kernel"], pair["lora_a"], pair["lora_b"])
        kept, whole = kept + float(parts[0]), whole + float(parts[1])
    return kept / whole if whole else 1.0


def lora_student(student: Student, params: Params, lora: LoraConfig, key: PRNGKeyArray | None = None) -> Student:
    """Return the student whose parameters are the adapters of frozen `params`.

    Inside a jitted function, `params` must be an argument of it, or they become constants of the program.
    `make_lora_step` does this.

    Args:
        student: a Flax linen model whose projections are `nn.Dense`, such as `make_student` returns. One that takes a
            key of its own, or has an auxiliary loss, keeps both.
        params: the frozen parameters of `student`.
        lora: what is adapted.
        key: for dropout. None: no dropout, as in evaluation.

    Raises:
        ValueError: when `hidden` is called: adapters of another model, or a model that does not apply them.
    """
    adapted, head = with_adapters(student, key), student.head
    return dataclasses.replace(
        adapted,
        hidden=lambda adapters, *context, **own: adapted.hidden(AdaptedParams(params, adapters, lora), *context, **own),
        head=None if head is None else lambda adapters: head(params),
    )


def with_adapters(student: Student, key: PRNGKeyArray | None = None) -> Student:
    """Return the student that also takes `AdaptedParams`, and applies the adapters next to the frozen weights.

    Args:
        student: as in `lora_student`.
        key: for dropout. None: no dropout.

    Raises:
        ValueError: as in `lora_student`.
    """

    def hidden(
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        **own: PRNGKeyArray | None,
    ) -> PyTree:
        applied: set[Path] = set()

        def rows_of(
            params_and_keys: tuple[Params, PRNGKeyArray | None, dict[str, PRNGKeyArray | None]],
            tokens: Int[Array, "B T"],
            *contexts: Int[Array, "B T"],
        ) -> PyTree:
            params, key, own = params_and_keys
            with apply_adapters(params, key, row_hashes(tokens)) as (whole, interceptor):
                rows = student.hidden(whole, tokens, *contexts, **own)
            applied.update(interceptor.applied)
            return rows

        rows = with_types_as_layout(rows_of, (params, key, own), tokens, positions, segment_ids)
        pairs = flatten_adapters(params.adapters) if isinstance(params, AdaptedParams) else {}
        if ignored := sorted("/".join(path) for path in pairs.keys() - applied):
            raise ValueError(
                f"The model does not apply the adapters of {', '.join(ignored)}: expected a Flax linen model with an "
                "nn.Dense of this path. For another model train on merge(params, adapters, lora)."
            )
        return rows

    def head(params: Params) -> Float[Array, "D V"]:
        assert student.head is not None
        return student.head(params.base if isinstance(params, AdaptedParams) else params)

    return dataclasses.replace(student, hidden=hidden, head=None if student.head is None else head)


@contextlib.contextmanager
def apply_adapters(
    params: Params, key: PRNGKeyArray | None = None, row_hashes_B: UInt32[Array, "B"] | None = None
) -> Iterator[tuple[Params, LoraInterceptor]]:
    """Yield the tree that a linen model reads inside the block. Parameters without adapters are yielded as they are.

    Args:
        params: a student's, or `AdaptedParams`.
        key: for dropout. None: no dropout.
        row_hashes_B: of the tokens, for dropout.

    Raises:
        ValueError: the adapters belong to another model or another `lora.rank`.
    """
    if not isinstance(params, AdaptedParams):
        yield params, LoraInterceptor(LoraConfig())
        return
    lora = params.lora
    check_adapters(params.base, params.adapters, lora)
    interceptor = LoraInterceptor(lora, row_hashes_B)
    with nn.intercept_methods(interceptor):
        yield merge_trees(params.base, params.adapters, key if lora.dropout else None), interceptor


def make_lora_step(make_step: Callable[[Student], Step], student: Student, lora: LoraConfig) -> Step:
    """Return a train step whose state holds adapters only. The frozen parameters are its third argument.

    Args:
        make_step: builds the step of a student, such as `lambda student: make_grpo_step(student, tx, objective)`.
        student: as in `lora_student`.
        lora: what is adapted.

    Returns:
        `step(state, batch, params[, reference_params]) -> (state, metrics)`, for `jit_step`. `params` are sharded as a
        state is. If the reference is the frozen model, pass the same `params` again.

    Raises:
        ValueError: what `make_step` raises.
    """
    make_step(student)  # so that bad settings raise now and not inside a trace

    def step(
        state: TrainState, batch: SftBatch | GhostBatch, params: Params, *reference: Params
    ) -> tuple[TrainState, Metrics]:
        # Drawn tokens use the step's own key; dropout needs another.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), path_hash(("dropout",)))
        return make_step(lora_student(student, params, lora, key))(state, batch, *reference)

    return step


class LoraInterceptor:
    """Add `scale (dropout(x) A) B` to the product of every `nn.Dense` with adapters: an interceptor of linen methods.

    A `TransposedDense`, which generation uses, is treated alike. The products run in the model's compute type; sums
    over the wide side are float32.

    Attributes:
        applied: paths of the adapters used so far.
    """

    def __init__(self, lora: LoraConfig, row_hashes_B: UInt32[Array, "B"] | None = None) -> None:
        self.lora, self.row_hashes_B = lora, row_hashes_B
        self.applied: set[Path] = set()

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        if not isinstance(module, nn.Dense | TransposedDense) or context.method_name != "__call__":
            return method(*args, **kwargs)
        names = [name for name in QUANTIZED_PARTS if module.has_variable("params", name)]
        kernel = quantized_kernel({name: module.get_variable("params", name) for name in names})
        product = method(*args, **kwargs) if kernel is None else quantized_product(module, args[0], kernel)
        if not module.has_variable("params", "lora_a"):
            return product
        self.applied.add(module.path)
        x = args[0].astype(product.dtype)
        own: Mapping[str, jax.Array] = module.variables["params"]
        if "lora_key" in own:
            x = self.drop(x, own["lora_key"])
        a, b = own["lora_a"].astype(x.dtype), own["lora_b"].astype(x.dtype)
        low = self.lora.scale * jnp.matmul(x, a, preferred_element_type=jnp.float32)
        return product + jnp.matmul(low.astype(x.dtype), b)

    def drop(self, x: Float[Array, "B T inputs"], key: PRNGKeyArray) -> Float[Array, "B T inputs"]:
        """Apply dropout to x, with one key per row."""
        assert self.row_hashes_B is not None
        kept = 1.0 - self.lora.dropout
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, self.row_hashes_B)
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, kept, x.shape[1:]))(keys_B)
        return jnp.where(keep, x / kept, 0).astype(x.dtype)


def quantized_product(
    module: nn.Dense | TransposedDense, x: Float[Array, "*batch I"], kernel: QuantizedKernel
) -> Float[Array, "*batch O"]:
    """Return what a projection computes, from its quantized kernel. It is dequantized in the compute type."""
    dtype = module.dtype or x.dtype
    x = x.astype(dtype)
    if isinstance(module, TransposedDense):
        # In a loop over tokens XLA would dequantize all layers once, before the loop, and keep them.
        x, kernel = jax.lax.optimization_barrier((x, kernel))
        y = project_few_tokens(x, kernel.dequantize(dtype).T, dtype)
    else:
        dot_general = module.dot_general or jax.lax.dot_general
        takes_quantized = isinstance(dot_general, functools.partial) and dot_general.func is project_tokens
        own: Any = kernel if takes_quantized else jax.lax.stop_gradient(kernel.dequantize(dtype))
        y = dot_general(x, own, (((x.ndim - 1,), (0,)), ((), ())), precision=module.precision)
    if module.use_bias:
        y = y + broadcast_last(module.get_variable("params", "bias").astype(dtype), y)
    return y


def row_hashes(tokens: Int[Array, "B T"]) -> UInt32[Array, "B"]:
    """Return a hash of each row's tokens.

    It seeds the row's dropout, so micro-batches and devices do not change the mask.
    """
    odd_T = 2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1
    return jnp.sum(tokens.astype(jnp.uint32) * odd_T[None, :] * jnp.uint32(2654435761), axis=1, dtype=jnp.uint32)


def merge_trees(params: Params, adapters: Adapters, key: PRNGKeyArray | None) -> Params:
    """Return `params` with the adapters next to their kernels, where linen's scan slices both by layer.

    With a key, each projection also gets one for its dropout.
    """
    whole = jax.tree.map(lambda leaf: leaf, params)
    for path, pair in flatten_adapters(adapters).items():
        module = subtree(whole, path)
        module |= pair
        if key is not None:
            own = jax.random.fold_in(key, path_hash(path))
            module["lora_key"] = jax.random.split(own, pair["lora_a"].shape[0])
    return whole


def check_adapters(params: Params, adapters: Adapters, lora: LoraConfig) -> None:
    """Check that adapters belong to `params` and `lora`.

    Raises:
        ValueError: the tree is empty, or a path or shape does not fit.
    """
    found, pairs = kernels(params), flatten_adapters(adapters)
    if not pairs:
        raise ValueError("The adapter tree is empty: expected what init_lora or load_adapter returns.")
    for path, pair in pairs.items():
        name = "/".join(path)
        if path not in found:
            names = ", ".join("/".join(p) for p in found)
            raise ValueError(f"The adapters hold {name}, which the model does not have. It has: {names}.")
        L, inputs, outputs = found[path].shape
        want = {"lora_a": (L, inputs, lora.rank), "lora_b": (L, lora.rank, outputs)}
        got = {part: tuple(leaf.shape) for part, leaf in pair.items()}
        if got != want:
            raise ValueError(
                f"The adapters of {name} have the shapes {got}, but this model and rank {lora.rank} need {want}: "
                "they belong to another model or another LoraConfig."
            )


def flatten_adapters(adapters: Adapters) -> dict[Path, dict[str, Array]]:
    """Return {path of a projection: its `lora_a` and `lora_b`}. `unflatten_dict` undoes it."""
    return flatten_dict(adapters, is_leaf=lambda _, node: "lora_a" in node or "lora_b" in node)


def subtree(tree: Params, path: Path) -> Params:
    """Return the subtree at a path."""
    return functools.reduce(operator.getitem, path, tree)


def path_hash(path: Path) -> int:
    """Return a hash for `fold_in` that is the same in every process and version."""
    return zlib.crc32("/".join(path).encode())
