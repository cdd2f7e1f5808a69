"""The layout of arrays on a mesh of devices, and the way from a pure step to a compiled one.

Parameters are laid out by rules over their paths, `PARAM_RULES`, and activations by the letters of their dimensions,
`DIMENSIONS`. Neither a model nor a step takes a mesh: `jit_step` traces the step with its mesh as JAX's ambient one,
and `constrain(x, "BTD")` looks it up there. Without a mesh it does nothing.

    data      sequences; parameters whole on each device
    fsdp      sequences; parameters and optimizer state split, each layer gathered when it is used
    tensor    heads, the MLP's middle and the vocabulary
    context   tokens of each sequence; attention gathers the keys and values
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cotgrpo.types import GhostBatch, SftBatch, check_arrays

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from cotgrpo.types import Array, Params, PyTree

AXES = ("data", "fsdp", "tensor", "context")

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("context",),
    "Q": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
"""Mesh axes of an activation's dimensions, by the letters of `cotgrpo.types`. Other letters are not split."""

PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"(^|/)head$", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
    # A bias is laid out as the outputs that it is added to. Those of out and down are not split, nor are norms.
    (r"(query|key|value|gate|up)/bias$", (None, "tensor")),
    # LoRA's A and B are laid out as the kernel's inputs and outputs. Their rank is small and is not split.
    (r"(query|key|value|gate|up)/lora_a$", (None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", (None, None, "tensor")),
    (r"(out|down)/lora_a$", (None, "tensor", None)),
    (r"(out|down)/lora_b$", (None, None, "fsdp")),
)
"""(pattern searched in the path, mesh axis of each dimension). The first match counts.

A leaf without a match is replicated. Optimizer moments have their parameter's path at the end of their own, and so its
sharding."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work. Their number is the product. A run may resume on another mesh.

    Attributes:
        data: devices that share the sequences of a batch, each with all parameters. One axis may be -1: all devices
            that are left.
        fsdp: devices that share the sequences, and the parameters and optimizer state too.
        tensor: devices that share the heads, the MLP and the vocabulary.
        context: devices that share the tokens of each sequence.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ValueError(f"{name} must be at least 1, or -1 for all devices that are left, got {size}.")


def make_mesh(*, devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """Make a device mesh, as `make_mesh(data=2, fsdp=4)`. One size may be -1, for all devices that are left.

    Args:
        devices: those to use, which may be devices of another machine to compile for; None: all of this run.
        sizes: devices along each axis; 1 if not given.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    shape = mesh_shape(sizes, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """Return the size of every axis on this number of devices. Raises as `make_mesh` does."""
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"Unknown mesh axis {unknown[0]!r}: the axes are {', '.join(AXES)}.")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    open_ones = [axis for axis, size in shape.items() if size == -1]
    if len(open_ones) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"Mesh sizes must be positive, with at most one -1, got {sizes}.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if devices % fixed or (fixed != devices and not open_ones):
        raise ValueError(
            f"The mesh {sizes} asks for {'a multiple of ' * bool(open_ones)}{fixed} devices, but there are {devices}: "
            "give sizes whose product is that, or -1 to one axis."
        )
    return shape | dict.fromkeys(open_ones, devices // fixed)


def check_mesh(shape: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Raise ValueError if an axis does not divide the dimension of a model that it splits.

    Args:
        shape: {axis: its size}, as `mesh.shape`.
        sizes: {name: size} of a model's dimensions, as `DecoderConfig.split_sizes` gives them.
    """
    splits = {
        "width": "fsdp",
        "num_heads": "tensor",
        "num_kv_heads": "tensor",
        "mlp_width": "tensor",
        "vocab_size": "tensor",
    }
    for name, axis in splits.items():
        if sizes[name] % shape.get(axis, 1):
            divisor = math.gcd(*(sizes[other] for other, own in splits.items() if own == axis))
            raise ValueError(
                f"The mesh axis {axis}={shape[axis]} does not divide the model's {name}, {sizes[name]}, "
                f"which it splits: expected a divisor of {divisor}."
            )


def check_batch(shape: Mapping[str, int], batch_size: int, seq_len: int, micro_batches: int = 1) -> None:
    """Raise ValueError if sequences or their tokens cannot be split evenly over a mesh of this shape."""
    over = batch_shards(shape)
    parts = f"{micro_batches} micro-batches of a " if micro_batches > 1 else "a "
    if batch_size % (over * micro_batches):
        raise ValueError(
            f"The mesh spreads the sequences over data x fsdp = {over} devices, which {parts}batch of {batch_size} "
            f"cannot fill evenly: expected a multiple of {over * micro_batches}."
        )
    if seq_len % shape.get("context", 1):
        raise ValueError(
            f"The mesh axis context={shape['context']} does not divide the {seq_len} tokens of a sequence: "
            "expected a multiple of it."
        )


def batch_shards(shape: Mapping[str, int]) -> int:
    """Return over how many shards a mesh of this shape spreads the sequences of a batch."""
    return math.prod(shape.get(axis, 1) for axis in DIMENSIONS["B"])


def param_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Return the layout of the parameter of a path, by `PARAM_RULES`.

    `sizes` are those of the mesh's axes. A dimension that its axis does not divide is not split.
    """
    for pattern, axes in PARAM_RULES:
        if re.search(pattern, name) and len(axes) == len(shape):
            return PartitionSpec(
                *(a if a and n % sizes.get(a, 1) == 0 else None for a, n in zip(axes, shape, strict=True))
            )
    return PartitionSpec()


def state_sharding(state: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Return the `NamedSharding` of every leaf of a train state or parameter tree, by `PARAM_RULES`."""

    def of(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct | Array) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(of, state)


def constrain(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Lay out `x` by its dimensions' letters on the ambient mesh, as `constrain(x_BTD, "BTD")`."""
    return apply_constraint(x, partition_spec(letters, x.shape))


def constrain_param(x: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """Lay out `x` as the parameter `name` on the ambient mesh."""
    sizes = open_axes()
    return apply_constraint(
        x, PartitionSpec(*(axis if axis in sizes else None for axis in param_spec(name, x.shape, sizes)))
    )


def all_gather_param(x: Shaped[Array, "..."], letters: str, name: str) -> Shaped[Array, "..."]:
    """Lay out the parameter `name` by its letters, and reduce its gradient into the layout that the parameter has."""

    @jax.custom_vjp
    def gather(x: Array) -> Array:
        return constrain(x, letters)

    # Two constraints, which XLA makes one reduce-scatter. With the second alone it moves the activations instead.
    gather.defvjp(lambda x: (constrain(x, letters), None), lambda _, g: (constrain_param(constrain(g, letters), name),))
    return gather(x) if open_axes() else x


def apply_constraint(x: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    """Put a sharding constraint of the ambient mesh on `x`. Without a mesh, return `x`."""
    return jax.lax.with_sharding_constraint(x, spec) if open_axes() else x


def partition_spec(letters: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the ambient mesh's axes of each dimension by its letter.

    A dimension that its axes do not divide is not split.
    """
    sizes = open_axes()

    def of(letter: str, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in DIMENSIONS.get(letter, ()) if axis in sizes)
        return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None

    return PartitionSpec(*(of(letter, size) for letter, size in zip(letters, shape, strict=True)))


def axis_names(spec: PartitionSpec) -> tuple[str, ...]:
    """Return all axes that a spec of `partition_spec` names, in its order."""
    return tuple(axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def open_axes() -> dict[str, int]:
    """Return the ambient mesh's Auto axes of more than one device, without those of a surrounding `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with `mesh` as JAX's ambient mesh while it is traced."""

    @functools.wraps(function)
    def traced(*arguments: PyTree) -> PyTree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the layout of a batch: sequences over `data` and `fsdp`, their tokens over `context`."""
    return NamedSharding(mesh, PartitionSpec(DIMENSIONS["B"], DIMENSIONS["T"]))


def jit_step(step: Callable[..., PyTree], mesh: Mesh | None = None) -> Any:
    """Compile a train step: `jax.jit` with the state donated, and with a mesh the shardings of state and batch.

    Args:
        step: `step(state, batch, ...) -> (state, metrics)`. Arguments after the batch (a reference's parameters) are
            sharded as the state is.
        mesh: from `make_mesh`; None: no shardings, JAX's default device.

    Returns:
        The compiled step. The state passed in is donated: its buffers are reused, so keep only the state that comes
        back. With a mesh, a batch that cannot be spread over it is a ValueError before anything is compiled.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options_for(jax.default_backend()))
    return ShardedStep(step, mesh)


def options_for(platform: str) -> dict[str, bool] | None:
    """Return XLA's options of a train step on JAX's platform "cpu", "gpu" or "tpu".

    Without this analysis XLA of jax 0.10 and 0.11 copies all of the donated optimizer state on a CPU.
    """
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else None


def jit_eval(function: Callable[..., PyTree], mesh: Mesh | None = None) -> Callable[..., PyTree]:
    """Compile `function(params, batch, ...)` that reads parameters, such as an evaluation step or a sampler.

    With a mesh the parameters are laid out by `state_sharding`, and every `[B, T, ...]` array of the batch as a batch
    of `jit_step` (`[B]` over the sequences alone). A batch that does not divide is not split. The result is replicated.
    Nothing is donated.
    """
    if mesh is None:
        return jax.jit(function)

    def spread(params: Params, batch: PyTree, *rest: PyTree) -> PyTree:
        batch = jax.tree.map(lambda x: constrain(x, "BTG"[: x.ndim]), batch)  # G is not split
        return function(params, batch, *rest)

    compiled = jax.jit(traced_on(mesh, spread), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def call(params: Params, batch: PyTree, *rest: PyTree) -> PyTree:
        return compiled(jax.device_put(params, state_sharding(params, mesh)), batch, *rest)

    return call


class ShardedStep:
    """A jitted step whose shardings follow from the trees of its first call."""

    def __init__(self, step: Callable[..., PyTree], mesh: Mesh) -> None:
        self.step, self.mesh = step, mesh
        self.compiled: Any = None

    def __call__(self, state: PyTree, batch: PyTree, *rest: PyTree) -> PyTree:
        return self.jitted(state, batch, *rest)(state, batch, *rest)

    def lower(self, state: PyTree, batch: PyTree, *rest: PyTree) -> jax.stages.Lowered:
        """Lower the step as `jax.jit(...).lower` does. Arguments may be abstract."""
        return self.jitted(state, batch, *rest).lower(state, batch, *rest)

    def jitted(self, state: PyTree, batch: PyTree, *rest: PyTree) -> Any:
        """Return the jitted function, which the first call makes."""
        if isinstance(batch, SftBatch | GhostBatch):
            check_arrays(batch)
        check_batch(self.mesh.shape, *jax.tree.leaves(batch)[0].shape[:2])
        if self.compiled is None:
            state_shardings = state_sharding(state, self.mesh)
            rest_shardings = tuple(state_sharding(tree, self.mesh) for tree in rest)
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            self.compiled = jax.jit(
                traced_on(self.mesh, self.step),
                in_shardings=(state_shardings, batch_sharding(self.mesh), *rest_shardings),
                out_shardings=(state_shardings, everywhere),
                donate_argnums=0,
                compiler_options=options_for(self.mesh.devices.flat[0].platform),
            )
        return self.compiled
