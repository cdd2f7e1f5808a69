"""Where arrays lie on a mesh of devices, and from a pure step to a compiled one.

Parameters lie by rules over their paths, `PARAM_RULES`; activations by the letters of their dimensions, `DIMENSIONS`. Neither a model nor a step
is given a mesh: `jit_step` traces the step with its mesh as JAX's ambient one, and `constrain(x, "BTD")` asks there. Without a mesh it does nothing.

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
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "context")

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "T": ("context",),
    "Q": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
"""Mesh axes of an activation's dimensions, by the letters of `cotgrpo.types`; a letter that is not here is whole on every device."""

PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"(^|/)head$", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
    # A bias lies as the outputs that it is added to; those of out and down are whole, as the residual stream is, and so are norms.
    (r"(query|key|value|gate|up)/bias$", (None, "tensor")),
    # LoRA's A and B beside a kernel lie as its inputs and outputs do; their rank is small and stays whole.
    (r"(query|key|value|gate|up)/lora_a$", (None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", (None, None, "tensor")),
    (r"(out|down)/lora_a$", (None, "tensor", None)),
    (r"(out|down)/lora_b$", (None, None, "fsdp")),
)
"""(pattern searched in the path, mesh axis of each dimension). The first match counts; a leaf that none matches is on every device.
Optimizer moments have their parameter's path at the end of their own, and so its sharding."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work; their number is the product. It may change between one start of a run and the next.

    Attributes:
        data: devices that share the sequences of a batch, each with all parameters; -1 at one axis: all devices that are left.
        fsdp: devices that share the sequences, and the parameters and optimizer state too.
        tensor: devices that share the heads, the MLP and the vocabulary.
        context: devices that share the tokens of each sequence.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(*, devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A device mesh, as `make_mesh(data=2, fsdp=4)`; one size may be -1, for all devices that are left.

    `devices` are those of this run, or others to compile for.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    shape = mesh_shape(sizes, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The size of every axis on so many devices; raises as `make_mesh` does."""
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


def check_mesh(shape: Any, sizes: dict[str, int]) -> None:
    """Raises ValueError where an axis does not divide the dimension of a model that it splits.

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
            raise ValueError(
                f"The mesh axis {axis}={shape[axis]} does not divide the model's {name}, {sizes[name]}, which it splits: expected a divisor of "
                f"{math.gcd(*(sizes[other] for other, own in splits.items() if own == axis))}."
            )


def check_batch(shape: Any, batch_size: int, seq_len: int, micro_batches: int = 1) -> None:
    """Raises ValueError where sequences or their tokens cannot be split evenly over a mesh of this shape."""
    over = batch_shards(shape)
    parts = f"{micro_batches} micro-batches of a " if micro_batches > 1 else "a "
    if batch_size % (over * micro_batches):
        raise ValueError(
            f"The mesh spreads the sequences over data x fsdp = {over} devices, which {parts}batch of {batch_size} cannot fill evenly: "
            f"expected a multiple of {over * micro_batches}."
        )
    if seq_len % shape.get("context", 1):
        raise ValueError(
            f"The mesh axis context={shape['context']} does not divide the {seq_len} tokens of a sequence: expected a multiple of it."
        )


def batch_shards(shape: Any) -> int:
    """Over how many shards a mesh of this shape spreads the sequences of a batch."""
    return math.prod(shape.get(axis, 1) for axis in DIMENSIONS["B"])


def param_spec(name: str, shape: tuple[int, ...], sizes: Any) -> PartitionSpec:
    """How the parameter of a path lies, by `PARAM_RULES`; `sizes` are those of the mesh's axes. A dimension that its axis does not divide stays whole."""
    for pattern, axes in PARAM_RULES:
        if re.search(pattern, name) and len(axes) == len(shape):
            return PartitionSpec(
                *(a if a and n % sizes.get(a, 1) == 0 else None for a, n in zip(axes, shape, strict=True))
            )
    return PartitionSpec()


def state_sharding(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The `NamedSharding` of every leaf of a train state or parameter tree, by `PARAM_RULES`."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(of, state)


def constrain(x: Any, letters: str) -> Any:
    """`x` laid out by its dimensions' letters on the mesh that is being traced for, as `constrain(x_BTD, "BTD")`; without a mesh, `x`."""
    return apply_constraint(x, partition_spec(letters, x.shape))


def constrain_param(x: Any, name: str) -> Any:
    """`x` laid out as the parameter `name` is, on the mesh that is being traced for; without a mesh, `x`."""
    sizes = open_axes()
    return apply_constraint(
        x, PartitionSpec(*(axis if axis in sizes else None for axis in param_spec(name, x.shape, sizes)))
    )


def all_gather_param(x: Any, letters: str, name: str) -> Any:
    """The parameter `name` laid out by its letters, as `constrain` does, and its gradient summed into the layout that the parameter has."""

    @jax.custom_vjp
    def gather(x: Any) -> Any:
        return constrain(x, letters)

    # Summed as a whole and then cut: XLA makes one reduce-scatter of both. Asked for the cut alone, it moves the activations instead.
    gather.defvjp(lambda x: (constrain(x, letters), None), lambda _, g: (constrain_param(constrain(g, letters), name),))
    return gather(x) if open_axes() else x


def apply_constraint(x: Any, spec: PartitionSpec) -> Any:
    """`x` under a sharding constraint of the mesh that is being traced for, if there is one."""
    return jax.lax.with_sharding_constraint(x, spec) if open_axes() else x


def partition_spec(letters: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The axes of each dimension by its letter, of the mesh that is being traced for. A dimension that its axes do not divide stays whole."""
    sizes = open_axes()

    def of(letter: str, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in DIMENSIONS.get(letter, ()) if axis in sizes)
        return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None

    return PartitionSpec(*(of(letter, size) for letter, size in zip(letters, shape, strict=True)))


def axis_names(spec: PartitionSpec) -> tuple[str, ...]:
    """All axes that a spec of `partition_spec` names, in its order."""
    return tuple(axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def open_axes() -> dict[str, int]:
    """Axes of more than one device of the mesh that is being traced for, that XLA may use: not those of a `shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with `mesh` as JAX's ambient one while it is traced."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sequences over the `data` and `fsdp` axes together, their tokens over `context`."""
    return NamedSharding(mesh, PartitionSpec(DIMENSIONS["B"], DIMENSIONS["T"]))


def jit_step(step: Any, mesh: Mesh | None = None) -> Any:
    """Compiles a train step: `jax.jit`, the state donated, and with a mesh the shardings of state and batch.

    Args:
        step: `step(state, batch, ...) -> (state, metrics)`. Arguments after the batch (a reference's parameters) are sharded as the state is.
        mesh: from `make_mesh`; None: no shardings, JAX's default device.

    Returns:
        The compiled step. The state passed in is donated: its buffers are reused, so keep only the state that comes back.
        With a mesh, a batch that cannot be spread over it is a ValueError before anything is compiled.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options_for(jax.default_backend()))
    return ShardedStep(step, mesh)


def options_for(platform: str) -> dict[str, Any] | None:
    """XLA options of a train step on JAX's platform "cpu", "gpu" or "tpu".

    On a CPU: without this analysis XLA of jax 0.10 and 0.11 copies all of the donated optimizer state before it is updated.
    """
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if platform == "cpu" else None


def jit_eval(function: Callable[..., Any], mesh: Mesh | None = None) -> Any:
    """Compiles `function(params, batch, ...)` that reads parameters, such as an evaluation step or a sampler.

    With a mesh the parameters lie as `state_sharding` says, every `[B, T, ...]` array of the batch as a batch of `jit_step` does (`[B]` over the sequences
    alone), and the result is whole on each device; a batch that does not divide stays whole. Nothing is donated.
    """
    if mesh is None:
        return jax.jit(function)

    def spread(params: Any, batch: Any, *rest: Any) -> Any:
        laid = jax.tree.map(lambda x: constrain(x, "BTG"[: x.ndim]), batch)  # G: whole
        return function(params, laid, *rest)

    compiled = jax.jit(traced_on(mesh, spread), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def call(params: Any, batch: Any, *rest: Any) -> Any:
        return compiled(jax.device_put(params, state_sharding(params, mesh)), batch, *rest)

    return call


class ShardedStep:
    """A jitted step whose shardings follow from the trees of its first call."""

    def __init__(self, step: Any, mesh: Mesh) -> None:
        self.step, self.mesh = step, mesh
        self.compiled: Any = None

    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any:
        return self.jitted(state, batch, *rest)(state, batch, *rest)

    def lower(self, state: Any, batch: Any, *rest: Any) -> Any:
        """As `jax.jit(...).lower`: arguments may be abstract."""
        return self.jitted(state, batch, *rest).lower(state, batch, *rest)

    def jitted(self, state: Any, batch: Any, *rest: Any) -> Any:
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
