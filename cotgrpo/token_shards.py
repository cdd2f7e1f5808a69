"""A function of a batch's tokens, run on each shard of them, on any mesh.

What the head costs a device depends on which tokens that device takes. `over_shards` finds this out:

    Explicit axes           in the types of the arrays
    Auto axes, own names    by `cotgrpo.sharding.DIMENSIONS`
    Auto axes, other names  when XLA has chosen the layouts, through JAX's `custom_partitioning`
    inside a `shard_map`    the arrays are one shard's already

Each head is gathered once before the function, and its gradient is summed once after it. Left to itself, XLA would do
both in every tile of the function's loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cotgrpo.sharding import (
    AxisLayout,
    ambient_param_spec,
    axis_names,
    constrain,
    dimension_axes,
    explicit_mesh,
    in_auto_mode,
    layout_is_hidden,
    partition_spec,
    type_spec,
    vary_alike,
)

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, PyTree

    Weight = Float[Array, "*batch"] | Bool[Array, "*batch"]

Axes = tuple[str, ...]
Function = Callable[..., tuple[Any, Any]]
"""`function(shard, rows, heads, weight) -> (sums, out)`.

`rows`, `weight` and `out` are arrays `[B, T, ...]` or `[N, ...]`, and `heads` are arrays `[D, V]`. `sums` are scalars,
and may hold the gradient of the first head.
"""

CLOSES_OVER_TRACED = (
    "The objective reads an array that was computed in the jitted function around the step. If the batch is spread "
    "over several devices, each of them computes the head for all tokens, and the result is right. To spread the head "
    "too, give the array as a field of the batch's extra, close over a NumPy array, or use jit_step(step, mesh, axes)."
)


class Shard(NamedTuple):
    """How the arrays of one call are a part of the whole.

    Attributes:
        tokens: mesh axes that split the tokens. A loop with collectives must be equally long on all of their devices.
        vocab: mesh axes that split the columns of the heads, if the function has to exchange columns by itself. These
            devices have the same tokens.
        parts: number of devices along `vocab`.
    """

    tokens: Axes = ()
    vocab: Axes = ()
    parts: int = 1

    def whole_rows(self, columns_TV: Float[Array, "T V"]) -> Float[Array, "S W"]:
        """Exchange some columns of all tokens for all columns of some tokens: those of `own_tokens`."""
        if not self.vocab:
            return columns_TV
        return jax.lax.all_to_all(columns_TV, self.vocab, split_axis=0, concat_axis=1, tiled=True)

    def own_columns(self, rows_SW: Float[Array, "S W"]) -> Float[Array, "T V"]:
        """Undo `whole_rows`."""
        if not self.vocab:
            return rows_SW
        return jax.lax.all_to_all(rows_SW, self.vocab, split_axis=1, concat_axis=0, tiled=True)

    def own_tokens(self, tree: PyTree) -> PyTree:
        """Return this device's part of arrays `[T, ...]`."""
        if not self.vocab:
            return tree
        index = jax.lax.axis_index(self.vocab)
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, index * (len(x) // self.parts), len(x) // self.parts)
        return jax.tree.map(part, tree)

    def sum_of_columns(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Add up what the parts of the vocabulary contribute."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x


ONLY_SHARD = Shard()


def over_shards(
    function: Function, rows: PyTree, heads: PyTree, weight: Weight, *, split_vocab: bool = False
) -> tuple[PyTree, PyTree]:
    """Return `function(Shard(), rows, heads, weight)`. Each device computes it on its shard of the tokens.

    Args:
        function: see `Function`.
        rows, heads, weight: its arguments.
        split_vocab: whether the function can exchange columns by itself, as `Shard.vocab` asks. If not, it gets whole
            heads.
    """
    mesh = explicit_mesh((rows, heads, weight))
    if mesh is not None:
        return over_explicit_shards(function, (rows, heads, weight), mesh)
    spec = partition_spec("BT"[: weight.ndim], weight.shape)
    if axis_names(spec):
        return over_named_shards(function, rows, heads, weight, spec)
    if layout_is_hidden((rows, heads, weight)):
        return over_hidden_shards(function, (rows, heads, weight), split_vocab)
    return function(Shard(), rows, heads, weight)


def over_named_shards(
    function: Function, rows: PyTree, heads: PyTree, weight: Weight, spec: PartitionSpec
) -> tuple[PyTree, PyTree]:
    """Do what `over_shards` does, if the ambient mesh's axes split the tokens as `spec`."""
    shards, whole = axis_names(spec), PartitionSpec()

    def stacked(*arguments: PyTree) -> tuple[PyTree, PyTree]:
        sums, out = function(Shard(tokens=shards), *arguments)
        return jax.tree.map(lambda x: x[None], sums), out

    # Heads are gathered here, and sums are added below. Collectives inside made XLA gather over the tensor axis too.
    heads = jax.tree.map(lambda head: constrain(head, "DV"), heads)
    partial, out = jax.shard_map(
        stacked,
        in_specs=(spec, whole, spec),
        out_specs=(PartitionSpec(shards), spec),
        axis_names=set(shards),
        check_vma=False,
    )(rows, heads, weight)
    # Without `check_vma` the results look as if they were the same on all devices of a surrounding `shard_map`.
    *_, partial, out = vary_alike(rows, heads, weight, partial, out)
    first = jax.tree.leaves(heads)[:1]
    of_head = lambda x: bool(first) and x.shape[1:] == first[0].shape
    sums = jax.tree.map(lambda x: sum_of_heads(x, shards, first[0]) if of_head(x) else jnp.sum(x, axis=0), partial)
    *_, sums = vary_alike(rows, heads, weight, sums)
    return sums, out


def sum_of_heads(parts: Float[Array, "N D V"], shards: Axes, head: Float[Array, "D V"]) -> Float[Array, "D V"]:
    """Return the sum of the shards' gradients of a head, in the head's type and laid out as the parameter is.

    Each device adds up the rows that it keeps, and sends each of the others once. XLA would sum whole heads.
    """
    rows, columns = dimension_axes(ambient_param_spec("head", head.shape))
    if not rows or not set(rows) <= set(shards) or set(columns) & set(shards):
        return jnp.sum(parts, axis=0)
    others = tuple(axis for axis in shards if axis not in rows)

    def one_device(part: Float[Array, "1 D W"]) -> Float[Array, "E W"]:
        part = jax.lax.psum(part[0], others) if others else part[0]
        return jax.lax.psum_scatter(part, rows, scatter_dimension=0, tiled=True)

    return jax.shard_map(
        one_device,
        in_specs=PartitionSpec(shards, None, columns or None),
        out_specs=PartitionSpec(rows, columns or None),
        axis_names={*shards, *columns},
        check_vma=False,
    )(parts.astype(head.dtype))


def over_explicit_shards(
    function: Function, arguments: tuple[PyTree, PyTree, Weight], mesh: AbstractMesh
) -> tuple[PyTree, PyTree]:
    """Do what `over_shards` does, on a mesh with Explicit axes: as with Auto axes whose layout is known."""
    rows, heads, weight = arguments
    found = [type_spec(x) for x in jax.tree.leaves((rows, weight))]
    first = [(head.shape, type_spec(head)) for head in jax.tree.leaves(heads)[:1]]
    sizes = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
    tokens, vocab = split_tokens(sizes, weight.shape, found, [spec[1] for _, spec in first])
    lies = next((spec[: weight.ndim] for spec in found if any(spec[: weight.ndim])), ())

    def specs(results: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        sums, out = results
        of_sum = lambda x: next((PartitionSpec(*spec) for shape, spec in first if x.shape == shape), PartitionSpec())
        return jax.tree.map(of_sum, sums), jax.tree.map(lambda x: PartitionSpec(*lies), out)

    return in_auto_mode(
        lambda *inner: over_shards(function, *inner),
        arguments,
        mesh,
        AxisLayout(dict(zip("BT", tokens, strict=False)) | {"V": vocab}, {}),
        specs,
    )


def over_hidden_shards(
    function: Function, arguments: tuple[PyTree, PyTree, Weight], split_vocab: bool
) -> tuple[PyTree, PyTree]:
    """Do what `over_shards` does, once XLA has chosen the layouts. On one device it is the function itself."""
    leaves, tree = jax.tree.flatten(arguments)
    whole = lambda *leaves: function(Shard(), *jax.tree.unflatten(tree, leaves))
    jaxpr, shapes = jax.make_jaxpr(whole, return_shape=True)(*leaves)
    if any(isinstance(constant, jax.core.Tracer) for constant in jaxpr.consts):
        # The function is traced again when the program is compiled, and arrays of this trace are gone then.
        warnings.warn(CLOSES_OVER_TRACED, stacklevel=2)
        return whole(*leaves)
    hidden = HiddenShards(function, tree, tuple(leaf.shape for leaf in leaves), shapes, split_vocab)
    # The program's text must tell two functions apart: it is the key of JAX's cache of compiled programs.
    constants = [np.frombuffer(hidden.digest(jaxpr), np.uint32), *jaxpr.consts]
    plain = lambda *operands: tuple(
        jax.core.eval_jaxpr(jaxpr.jaxpr, operands[len(leaves) + 1 :], *operands[: len(leaves)])
    )
    partitioned = custom_partitioning(plain)
    partitioned.def_partition(hidden.partition, sharding_rule=hidden.rule)
    call = jax.custom_batching.custom_vmap(partitioned)

    @call.def_vmap
    def batched(size: int, is_batched: Sequence[bool], *operands: Array) -> tuple[PyTree, PyTree]:
        del size
        results = jax.vmap(plain, [0 if own else None for own in is_batched])(*operands)
        return results, (True,) * len(results)

    return jax.tree.unflatten(jax.tree.structure(shapes), call(*leaves, *constants))


@dataclasses.dataclass(frozen=True)
class HiddenShards:
    """How a function of tokens is partitioned, for `custom_partitioning`.

    Attributes:
        function: see `Function`.
        tree: of its arguments `(rows, heads, weight)`.
        shapes: of the arguments' leaves.
        results: `(sums, out)` as shapes.
        split_vocab: as in `over_shards`.
    """

    function: Function
    tree: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[PyTree, PyTree]
    split_vocab: bool

    def kinds(self) -> tuple[list[str], list[str]]:
        """Return what each argument and each result is: "row", "head" or "sum"."""
        rows, heads, _ = jax.tree.unflatten(self.tree, range(self.tree.num_leaves))
        count = lambda tree: len(jax.tree.leaves(tree))
        arguments = ["row"] * count(rows) + ["head"] * count(heads) + ["row"]
        first = self.shapes[count(rows)] if count(heads) else None
        sums = ["head" if x.shape == first else "sum" for x in jax.tree.leaves(self.results[0])]
        return arguments, sums + ["row"] * count(self.results[1])

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the weight: `[B, T]` or `[N]`."""
        return self.shapes[-1]

    def digest(self, jaxpr: jax.extend.core.ClosedJaxpr) -> bytes:
        """Return a hash of what is computed."""
        found = hashlib.sha256(f"{jaxpr} {self.split_vocab}".encode())
        for constant in jaxpr.consts:
            found.update(np.asarray(constant).tobytes())
        return found.digest()

    def rule(
        self, mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]
    ) -> tuple[str, dict[str, tuple[str, ...]]]:
        """Return Shardy's rule: tokens and columns may be split, and nothing else."""
        kinds, result_kinds = self.kinds()
        shared = {"row": {0: "b", 1: "t"} if len(self.batch) == 2 else {0: "b"}, "head": {1: "v"}, "sum": {}}
        whole: list[str] = []

        def factor(name: str | None) -> str:
            if name is None:
                whole.append(name := f"x{len(whole)}")
            return name

        def factors(kind: str, shape: Sequence[int]) -> str:
            return " ".join(factor(shared[kind].get(dimension)) for dimension in range(len(shape)))

        kinds += ["sum"] * (len(arguments) - len(kinds))
        left, right = (
            ", ".join(factors(kind, array.shape) for kind, array in zip(kinds, types, strict=True))
            for kinds, types in ((kinds, arguments), (result_kinds, results))
        )
        return f"{left} -> {right}", {"need_replication_factors": tuple(whole)}

    def partition(
        self, mesh: Mesh, arguments: Sequence[jax.ShapeDtypeStruct], results: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[Mesh, Callable[..., PyTree], PyTree, PyTree]:
        """Return the function of one device, and the layouts of its results and arguments."""
        kinds, result_kinds = self.kinds()
        own = [(kind, dimension_axes(x.sharding.spec)) for kind, x in zip(kinds, arguments, strict=False)]
        columns = [spec[1] if self.split_vocab else () for kind, spec in own if kind == "head"]
        tokens, vocab = split_tokens(mesh.shape, self.batch, [spec for kind, spec in own if kind == "row"], columns)
        over = sum(tokens, ())
        shard = Shard(over, vocab, size_of(mesh.shape, vocab))
        rows_of_head = tuple(
            dimension_axes(x.sharding.spec)[0] if kind == "head" else ()
            for x, kind in zip(results, result_kinds, strict=True)
        )
        scatter = tuple(
            axes if set(axes) <= set(over) and x.shape and x.shape[0] % size_of(mesh.shape, axes) == 0 else ()
            for x, axes in zip(results, rows_of_head, strict=True)
        )

        def one_device(*operands: Array) -> tuple[Array, ...]:
            sums, out = self.function(shard, *jax.tree.unflatten(self.tree, operands[: self.tree.num_leaves]))
            parts = jax.tree.leaves((sums, out))
            return tuple(map(added, parts, result_kinds, scatter))

        def added(x: Array, kind: str, axes: Axes) -> Array:
            if kind == "row":
                return x
            others = tuple(axis for axis in over if axis not in axes) + (vocab if kind == "sum" else ())
            x = jax.lax.psum(x, others) if others else x
            return jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True) if axes else x

        lay_out = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
        of: dict[str, Callable[[Axes], NamedSharding]] = {
            "row": lambda _: lay_out(*tokens),
            "head": lambda rows: lay_out(rows, vocab),
            "sum": lambda _: lay_out(),
        }
        kinds += ["sum"] * (len(arguments) - len(kinds))
        return (
            mesh,
            one_device,
            tuple(of[kind](axes) for kind, axes in zip(result_kinds, scatter, strict=True)),
            tuple(of[kind](()) for kind in kinds),
        )


def split_tokens(
    sizes: Mapping[str, int], batch: tuple[int, ...], found: Sequence[tuple[Axes, ...]], columns: Sequence[Axes]
) -> tuple[tuple[Axes, ...], Axes]:
    """Return the axes that split each dimension of the batch, and those that split the vocabulary.

    Axes that split neither get a share of the tokens too, or all of their devices would compute the same.

    Args:
        sizes: devices along each axis.
        batch: `[B, T]` or `[N]`.
        found: the axes of each array's dimensions, of arrays with these dimensions first.
        columns: the axes of each head's columns. The first counts.
    """
    best = next((spec for spec in found if any(spec[: len(batch)])), found[0])[: len(batch)]
    tokens = [axes if size % size_of(sizes, axes) == 0 else () for size, axes in zip(batch, best, strict=True)]
    vocab = tuple(axis for axes in columns[:1] for axis in axes if axis not in sum(tokens, ()))
    for axis in sizes:
        for index, size in enumerate(batch):
            wider = (*tokens[index], axis)
            if axis not in (*sum(tokens, ()), *vocab) and size % size_of(sizes, wider) == 0:
                tokens[index] = wider
    return tuple(tokens), vocab


def size_of(sizes: Mapping[str, int], axes: Axes) -> int:
    """Return the number of devices along these axes."""
    return math.prod(sizes[axis] for axis in axes)
