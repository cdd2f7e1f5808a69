"""The layout of arrays on a mesh of devices, and the way from a pure step to a compiled one.

Parameters are laid out by rules over their paths, `PARAM_RULES`, and activations by the letters of their dimensions,
`DIMENSIONS`. Neither a model nor a step takes a mesh: `jit_step` traces the step with its mesh as JAX's ambient one,
and `constrain(x, "BTD")` looks it up there. Without a mesh it does nothing, nor on a mesh with axes of other names.

    data      sequences; parameters whole on each device
    fsdp      sequences; parameters and optimizer state split, each layer gathered when it is used
    tensor    heads, the MLP's middle and the vocabulary
    context   tokens of each sequence; attention gathers the keys and values
    expert    sequences; the experts of each layer split, other parameters whole on each device. Only meshes that split
              experts have this axis.

Between slices of TPUs, which only the data-center network (DCN) connects, lies the axis `data`, see `make_mesh`.

A step works on a mesh of the user's own too, whatever its axes are called. Explicit axes are read from the types of
arrays (`in_auto_mode`). Inside a `shard_map` the arrays are a shard's own. With Auto axes XLA lays out the model as the
inputs are, and `cotgrpo.token_shards` learns the layout of the loss when the program is compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cotgrpo.compiler_options.measured import OptionValue, chip_name, options_for
from cotgrpo.types import GhostBatch, SftBatch, check_arrays

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Shaped

    from cotgrpo.types import Array, Params, PyTree

AXES = ("data", "fsdp", "tensor", "context")
"""The axes that every mesh has."""
EXPERT = "expert"
KNOWN_AXES = (*AXES, EXPERT)

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", EXPERT),
    "T": ("context",),
    "E": (EXPERT,),
    "Q": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
"""Mesh axes of an activation's dimensions, by the letters of `cotgrpo.types`. Other letters are not split."""

PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"per_layer/projection/kernel$", ("fsdp", "tensor")),
    (r"(^|/)head$", ("fsdp", "tensor")),
    (r"(query|key|value|conv_in|delta_(in|strength|decay)|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
    # A bias is laid out as the outputs that it is added to. Those of out and down are not split, nor are norms.
    (r"(query|key|value|conv_in|delta_(in|strength|decay)|gate|up)/bias$", (None, "tensor")),
    # LoRA's A and B are laid out as the kernel's inputs and outputs. Their rank is small and is not split.
    (r"(query|key|value|conv_in|delta_(in|strength|decay)|gate|up)/lora_a$", (None, "fsdp", None)),
    (r"(query|key|value|conv_in|delta_(in|strength|decay)|gate|up)/lora_b$", (None, None, "tensor")),
    (r"(out|down)/lora_a$", (None, "tensor", None)),
    (r"(out|down)/lora_b$", (None, None, "fsdp")),
    # Experts of all layers, and of one layer.
    (r"experts/(gate|up)$", (None, EXPERT, "fsdp", "tensor")),
    (r"experts/down$", (None, EXPERT, "tensor", "fsdp")),
    (r"experts/(gate|up)_bias$", (None, EXPERT, "tensor")),
    (r"experts/down_bias$", (None, EXPERT, "fsdp")),
    (r"experts/(gate|up)$", (EXPERT, "fsdp", "tensor")),
)
"""(pattern searched in the path, mesh axis of each dimension). The first match counts.

A leaf without a match is replicated. Optimizer moments have their parameter's path at the end of their own, and so its
sharding."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work. Their number is the product. A run may resume on another mesh.

    Attributes:
        data: devices that share the sequences of a batch, each with all parameters. One axis may be -1: all devices
            that are left. On several slices of TPUs this axis lies over the slices, and is a multiple of their number.
        fsdp: devices that share the sequences, and the parameters and optimizer state too.
        tensor: devices that share the heads, the MLP and the vocabulary.
        context: devices that share the tokens of each sequence.
        expert: devices that share the sequences, and the experts of a model that has some.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in KNOWN_AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ValueError(f"{name} must be at least 1, or -1 for all devices that are left, got {size}.")


def make_mesh(*, devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """Make a device mesh, as `make_mesh(data=2, fsdp=4)`. One size may be -1, for all devices that are left.

    Several slices of TPUs make one hybrid mesh. Its axis `data` lies over the slices: only sums of gradients and
    metrics cross the data-center network (DCN), and every other axis stays in a slice, on its faster links (ICI). So
    `data` is a multiple of the number of slices. Nodes of GPUs follow each other along the outermost axes, of any size.

    Args:
        devices: those to use, which may be devices of another machine to compile for; None: all of this run.
        sizes: devices along each axis; 1 if not given.

    Raises:
        ValueError: an unknown axis, sizes whose product is not the number of devices, or slices that they do not fit.
    """
    devices = jax.devices() if devices is None else devices
    slices = split_slices(devices)
    shape = mesh_shape(sizes, len(devices), len(slices))
    own = shape | {"data": shape["data"] // len(slices)}
    grids = [device_grid(own, part) for part in slices]
    axis = tuple(shape).index("data")
    return Mesh(np.concatenate(grids, axis=axis), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def device_grid(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices of one slice, or of all nodes of GPUs, along these axes: neighbours along an axis are near."""
    shape = tuple(sizes.values())
    if len({slice_number(device) for device in devices}) > 1:
        # JAX numbers the nodes of GPUs as slices, and its make_mesh refuses more than one.
        nodes = sorted(devices, key=lambda device: (slice_number(device), device.id))
        return np.asarray(nodes, object).reshape(shape)
    try:
        return jax.make_mesh(shape, tuple(sizes), devices=devices).devices
    except NotImplementedError:  # two axes must share a side of the torus, which make_mesh allows on v5e alone
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def slice_number(device: jax.Device) -> int:
    """Return the number of the slice that a device is in; 0 on platforms without slices."""
    return getattr(device, "slice_index", 0)


def split_slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices of each slice of TPUs, in the order of the slices; all devices together on other platforms.

    Raises:
        ValueError: slices of different sizes.
    """
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(slice_number(device) if device.platform == "tpu" else 0, []).append(device)
    slices = [groups[number] for number in sorted(groups)]
    if len({len(part) for part in slices}) > 1:
        raise ValueError(
            f"The slices of a mesh must have the same number of devices, got {[len(part) for part in slices]}: "
            "start the run on slices of one size."
        )
    return slices


def mesh_shape(sizes: dict[str, int], devices: int, slices: int = 1) -> dict[str, int]:
    """Return the size of every axis on this number of devices, in this number of slices. Raises as `make_mesh` does.

    The axis `expert` is left out if it has one device.
    """
    unknown = sorted(set(sizes) - set(KNOWN_AXES))
    if unknown:
        raise ValueError(f"Unknown mesh axis {unknown[0]!r}: the axes are {', '.join(KNOWN_AXES)}.")
    shape = {axis: sizes.get(axis, 1) for axis in KNOWN_AXES}
    open_ones = [axis for axis, size in shape.items() if size == -1]
    if len(open_ones) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"Mesh sizes must be positive, with at most one -1, got {sizes}.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if devices % fixed or (fixed != devices and not open_ones):
        raise ValueError(
            f"The mesh {sizes} asks for {'a multiple of ' * bool(open_ones)}{fixed} devices, but there are {devices}: "
            "give sizes whose product is that, or -1 to one axis."
        )
    shape |= dict.fromkeys(open_ones, devices // fixed)
    if shape[EXPERT] == 1:
        del shape[EXPERT]
    if shape["data"] % slices:
        raise ValueError(
            f"The mesh {sizes} makes data={shape['data']} on {slices} slices of {devices // slices} devices. The axis "
            f"data lies over the slices: expected data to be a multiple of {slices}, so that "
            f"{' x '.join(axis for axis in shape if axis != 'data')} divides the devices of a slice."
        )
    return shape


def check_mesh(shape: Mapping[str, int], sizes: Mapping[str, Any]) -> None:
    """Raise ValueError if an axis does not divide the dimension of a model that it splits.

    Args:
        shape: {axis: its size}, as `mesh.shape`.
        sizes: {name: size} of a model's dimensions, as `dataclasses.asdict` gives those of a `DecoderConfig`.
    """
    experts = sizes.get("experts")
    sizes = dict(sizes) | ({f"experts.{name}": size for name, size in experts.items()} if experts else {})
    splits = {
        "width": "fsdp",
        "num_heads": "tensor",
        "num_kv_heads": "tensor",
        "mlp_width": "tensor",
        "vocab_size": "tensor",
    } | ({"experts.number": EXPERT, "experts.width": "tensor"} if experts else {})
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
    axes = " x ".join(axis for axis in DIMENSIONS["B"] if axis != EXPERT or shape.get(axis, 1) > 1)
    parts = f"{micro_batches} micro-batches of a " if micro_batches > 1 else "a "
    if batch_size % (over * micro_batches):
        raise ValueError(
            f"The mesh spreads the sequences over {axes} = {over} devices, which {parts}batch of {batch_size} "
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

    `sizes` are those of the mesh's axes; empty: all axes are there. A dimension that its axis does not divide is not
    split. The arrays of a quantized kernel, such as "query/kernel_nf4" and "query/kernel_scale", are laid out as the
    kernel.
    """
    name = re.sub(r"/kernel_\w+$", "/kernel", name)
    for pattern, axes in PARAM_RULES:
        if re.search(pattern, name) and len(axes) == len(shape):
            there = lambda axis: axis != EXPERT or axis in sizes or not sizes
            return PartitionSpec(
                *(a if a and there(a) and n % sizes.get(a, 1) == 0 else None for a, n in zip(axes, shape, strict=True))
            )
    return PartitionSpec()


def path_name(path: tuple[object, ...]) -> str:
    """Return the path of a leaf as `PARAM_RULES` reads it, such as "layers/query/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)


def state_sharding(state: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Return the `NamedSharding` of every leaf of a train state or parameter tree, by `PARAM_RULES`."""

    def of(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct | Array) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(of, state)


def constrain(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Lay out `x` by its dimensions' letters on the ambient mesh, as `constrain(x_BTD, "BTD")`.

    If the layout is hidden, XLA chooses the axes of the dimensions in `DIMENSIONS`, and the others are not split.
    """
    if layout_is_hidden(x):
        # JAX cannot name a split of heads over more devices than heads, which XLA may choose.
        return keep_whole(tuple(letter in DIMENSIONS for letter in letters), x) if x.ndim <= 3 else x
    if auto_axes() and not open_axes():  # in a `shard_map` over some axes; the others are Auto and have other names
        free = (PartitionSpec.UNCONSTRAINED if letter in DIMENSIONS else None for letter in letters)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))
    return apply_constraint(x, partition_spec(letters, x.shape))


def constrain_param(x: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """Lay out `x` as the parameter `name` on the ambient mesh."""
    return apply_constraint(x, ambient_param_spec(name, x.shape))


def constrain_kernel(x: Shaped[Array, "D F"], letters: str) -> Shaped[Array, "D F"]:
    """Lay out `x` as the kernel of one layer, whose dimensions are "DF" or "FD", lies between its uses."""
    return constrain_param(x, {"DF": "head", "FD": "embedding"}[letters])


def ambient_param_spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the ambient mesh's axes of each dimension of the parameter `name`."""
    axes = {role: open_of(axis_layout().roles.get(role, ())) for role in KNOWN_AXES}
    roles = param_spec(name, shape, {role: axes_size(own) for role, own in axes.items()})
    return PartitionSpec(*(axes[role] or None if role else None for role in roles))


def look_up(
    table_VD: Shaped[Array, "V D"], ids_BT: Shaped[Array, "B T"], dtype: DTypeLike, *, gather: bool = False
) -> Shaped[Array, "B T D"]:
    """Return the rows of an embedding in a type, laid out as "BTD".

    If an axis splits both the sequences and the columns, each device reads its columns of all the rows, and an
    all-to-all brings the columns together. A gather of the table would send many times the bytes. The gradient goes the
    same way back, so no device sums a whole table. `gather` gathers it all the same, which a loop over tokens needs
    once.
    """
    batch, length = dimension_axes(partition_spec("BT", ids_BT.shape))
    columns = dimension_axes(ambient_param_spec("embedding", table_VD.shape))[1]
    if gather or not columns or not set(columns) <= set(batch):
        return constrain(all_gather_param(table_VD, "VD", "embedding")[ids_BT].astype(dtype), "BTD")
    others = tuple(axis for axis in batch if axis not in columns) or None
    ids_BT = apply_constraint(ids_BT, PartitionSpec(others, length or None))
    rows_BTD = apply_constraint(table_VD[ids_BT].astype(dtype), PartitionSpec(others, length or None, columns))
    return constrain(rows_BTD, "BTD")


def all_gather_param(x: Shaped[Array, "..."], letters: str, name: str) -> Shaped[Array, "..."]:
    """Lay out the parameter `name` by its letters, and reduce its gradient into the layout that the parameter has."""

    @jax.custom_vjp
    def gather(x: Array) -> Array:
        return constrain(x, letters)

    # Two constraints, which XLA makes one reduce-scatter. With the second alone it moves the activations instead.
    backward = in_this_layout(lambda _, g: (constrain_param(constrain(g, letters), name),))
    gather.defvjp(lambda x: (constrain(x, letters), None), backward)
    return gather(x) if auto_axes() or layout_is_hidden(x) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def keep_whole(splits: tuple[bool, ...], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return `x`, with XLA free to split the dimensions of `splits` alone. Its gradient is laid out so too.

    If one axis of a user's mesh splits sequences and parameters, XLA would split activations as the parameters are, and
    compute each of them for all sequences. A sharding constraint needs a mesh, which JAX may show only when the program
    is compiled.
    """
    # A factor of its own on each side, so that nothing is propagated through a dimension that stays whole.
    left, right = (
        [f"{'split' if split else side}{index}" for index, split in enumerate(splits)] for side in ("left", "right")
    )
    whole = tuple(name for name in (*left, *right) if not name.startswith("split"))

    def partition(
        mesh: Mesh, arguments: tuple[jax.ShapeDtypeStruct], result: jax.ShapeDtypeStruct
    ) -> tuple[Mesh, Callable[[Array], Array], NamedSharding, tuple[NamedSharding]]:
        axes = dimension_axes(arguments[0].sharding.spec)
        layout = NamedSharding(
            mesh, PartitionSpec(*(own if split else None for own, split in zip(axes, splits, strict=False)))
        )
        return mesh, lambda x: x, layout, (layout,)

    partitioned = custom_partitioning(lambda x: x)
    options = {"need_replication_factors": whole} if whole else {}
    rule = f"{' '.join(left)} -> {' '.join(right)}"
    partitioned.def_partition(partition, sharding_rule=lambda *_: (rule, options))
    call = jax.custom_batching.custom_vmap(partitioned)
    call.def_vmap(lambda size, is_batched, x: (keep_whole((True, *splits), x), True))
    return call(x)


keep_whole.defvjp(lambda splits, x: (keep_whole(splits, x), None), lambda splits, _, g: (keep_whole(splits, g),))


def apply_constraint(x: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    """Put a sharding constraint of the ambient mesh on `x`. Without a mesh, return `x`."""
    return jax.lax.with_sharding_constraint(x, spec) if open_axes() else x


def partition_spec(letters: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the ambient mesh's axes of each dimension by its letter.

    A dimension that its axes do not divide is not split.
    """

    def of(letter: str, size: int) -> tuple[str, ...] | None:
        axes = open_of(axis_layout().dimensions.get(letter, ()))
        return axes if axes and size % axes_size(axes) == 0 else None

    return PartitionSpec(*(of(letter, size) for letter, size in zip(letters, shape, strict=True)))


def axis_names(spec: PartitionSpec) -> tuple[str, ...]:
    """Return all axes that a spec of `partition_spec` names, in its order."""
    return tuple(axis for axes in dimension_axes(spec) for axis in axes)


class AxisLayout(NamedTuple):
    """Which axes of a mesh split what.

    Attributes:
        dimensions: axes by the letter of a dimension, as `DIMENSIONS`.
        roles: axes that stand for each of `KNOWN_AXES` in `PARAM_RULES`.
    """

    dimensions: Mapping[str, tuple[str, ...]]
    roles: Mapping[str, tuple[str, ...]]


OWN_LAYOUT = AxisLayout(DIMENSIONS, {axis: (axis,) for axis in KNOWN_AXES})
FOUND_LAYOUT: contextvars.ContextVar[AxisLayout | None] = contextvars.ContextVar("axis_layout", default=None)


def axis_layout() -> AxisLayout:
    """Return the layout that `in_auto_mode` found, or that of the library's own names."""
    return FOUND_LAYOUT.get() or OWN_LAYOUT


def auto_axes() -> dict[str, int]:
    """Return the ambient mesh's Auto axes of more than one device, without those of a surrounding `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def open_axes() -> dict[str, int]:
    """Return `auto_axes`, or nothing if one of them has a name that says nothing here."""
    axes = auto_axes()
    return axes if FOUND_LAYOUT.get() or axes.keys() <= set(KNOWN_AXES) else {}


def open_of(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the axes that are in `open_axes`."""
    return tuple(axis for axis in axes if axis in open_axes())


def axes_size(axes: tuple[str, ...]) -> int:
    """Return the number of devices along all of these axes of the ambient mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def layout_is_hidden(arrays: PyTree) -> bool:
    """Return whether the arrays may lie on several devices in a way that neither names nor types show."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1 or any(jax.typeof(x).sharding.mesh.size > 1 for x in jax.tree.leaves(arrays))
    known = FOUND_LAYOUT.get() is not None or AxisType.Manual in mesh.axis_types
    return not known and bool(auto_axes()) and not open_axes()


def explicit_mesh(arrays: PyTree) -> AbstractMesh | None:
    """Return the mesh with Explicit axes that is ambient, or that the arrays' types name; None if there is none."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def type_spec(x: Shaped[Array, "..."]) -> tuple[tuple[str, ...], ...]:
    """Return the Explicit axes of each dimension, which the type of `x` holds."""
    return dimension_axes(jax.typeof(x).sharding.spec)


def dimension_axes(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """Return the axes of each dimension of a spec."""
    return tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)


def layout_of_types(params: PyTree, tokens: Shaped[Array, "B T"]) -> AxisLayout:
    """Return the layout that the types of parameters and tokens show.

    An axis that splits a parameter where `PARAM_RULES` names one of `KNOWN_AXES` stands for that one.
    """
    batch, length = type_spec(tokens)
    roles: dict[str, tuple[str, ...]] = {"data": batch, "context": length}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for role, axes in zip(param_spec(path_name(path), leaf.shape, {}), type_spec(leaf), strict=False):
            if role and axes:
                roles.setdefault(role, axes)
    roles["tensor"] = tuple(axis for axis in roles.get("tensor", ()) if axis not in batch + length)
    return AxisLayout({letter: roles.get(axes[-1], ()) for letter, axes in DIMENSIONS.items()} | {"B": batch}, roles)


def in_auto_mode(
    function: Callable[..., PyTree],
    arguments: tuple[PyTree, ...],
    mesh: AbstractMesh,
    layout: AxisLayout,
    out_specs: Callable[[PyTree], PyTree],
) -> PyTree:
    """Return `function(*arguments)`, computed with the mesh's Explicit axes as Auto ones.

    Args:
        function: closes over no array.
        arguments: arrays with Explicit axes in their types.
        mesh: of `explicit_mesh`.
        layout: what the axes split. `constrain` and its kin read it.
        out_specs: returns the Explicit axes of the results, a `PartitionSpec` for each.
    """
    inner = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    free = lambda x: jax.sharding.reshard(x, PartitionSpec(*(None,) * jax.typeof(x).ndim))
    with jax.sharding.use_abstract_mesh(mesh):
        with jax.sharding.use_abstract_mesh(inner), found_layout(layout):
            results = function(*jax.tree.map(free, arguments))
        return jax.tree.map(jax.sharding.reshard, results, out_specs(results))


def with_types_as_layout(
    function: Callable[..., PyTree], params: PyTree, tokens: Shaped[Array, "B T"], *rest: PyTree
) -> PyTree:
    """Return `function(params, tokens, *rest)`, of a model that is written for Auto axes.

    The results are arrays `[B, T, ...]` or `[B]`, and scalars.

    On a mesh with Explicit axes the model's constraints follow the types of its inputs. On any other this does nothing.
    """
    arguments = (params, tokens, *rest)
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    spec = type_spec(tokens)
    specs = lambda results: jax.tree.map(lambda x: PartitionSpec(*spec[: x.ndim]), results)
    return in_auto_mode(function, arguments, mesh, layout_of_types(params, tokens), specs)


def in_this_layout(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return the function, which reads the layout that `in_auto_mode` found even if it runs later.

    JAX traces the gradient of a `custom_vjp` after the function that calls it has returned.
    """
    mesh, layout = jax.sharding.get_abstract_mesh(), FOUND_LAYOUT.get()
    if layout is None:
        return function

    def run(*arguments: PyTree) -> PyTree:
        with jax.sharding.use_abstract_mesh(mesh), found_layout(layout):
            return function(*arguments)

    return run


@contextlib.contextmanager
def found_layout(layout: AxisLayout) -> Iterator[None]:
    """Make `axis_layout` return this layout."""
    token = FOUND_LAYOUT.set(layout)
    try:
        yield
    finally:
        FOUND_LAYOUT.reset(token)


def vary_alike(*trees: PyTree) -> tuple[PyTree, ...]:
    """Return the trees, with all their arrays varying over the same axes of a surrounding `shard_map`.

    A function with its own gradient needs it: JAX sums the gradient of an array that does not vary, and does so where
    the array is made to vary. Elsewhere it does nothing.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return trees
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(trees)))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, trees)


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with `mesh` as JAX's ambient mesh while it is traced."""

    @functools.wraps(function)
    def traced(*arguments: PyTree) -> PyTree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the layout of a batch: sequences over `data`, `fsdp` and `expert`, their tokens over `context`."""
    of = lambda letter: tuple(axis for axis in DIMENSIONS[letter] if axis in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(of("B"), of("T")))


def jit_step(
    step: Callable[..., PyTree],
    mesh: Mesh | None = None,
    axes: Mapping[str, str] | None = None,
    compiler_options: Mapping[str, OptionValue | None] | None = None,
) -> Any:
    """Compile a train step: `jax.jit` with the state donated, and with a mesh the shardings of state and batch.

    Args:
        step: `step(state, batch, ...) -> (state, metrics)`. Arguments after the batch (a reference's parameters) are
            sharded as the state is.
        mesh: from `make_mesh`, or any other with `axes`; None: no shardings, JAX's default device.
        axes: what the axes of another mesh stand for, as `{"dp": "data", "tp": "tensor"}`. States that come back lie on
            that mesh.
        compiler_options: XLA's options, as those of `jax.jit`, on top of those that were measured to help on this chip
            (`options_for`). None as a value leaves a measured one out.

    Returns:
        The compiled step. The state passed in is donated: its buffers are reused, so keep only the state that comes
        back. With a mesh, a batch that cannot be spread over it is a ValueError before anything is compiled.

    Raises:
        ValueError: an axis of the mesh that is not in `axes`, or two that stand for the same.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options_on(None, compiler_options))
    return ShardedStep(step, mesh, axes, compiler_options)


def options_on(
    mesh: Mesh | None, given: Mapping[str, OptionValue | None] | None = None
) -> dict[str, OptionValue] | None:
    """Return the options that `jit_step` compiles a step with on this mesh, `given` those of the user's."""
    if mesh is None:
        return options_for(jax.default_backend(), given=given)
    device = mesh.devices.flat[0]
    return options_for(device.platform, chip_name(device.device_kind), mesh.size, given)


def rename_axes(mesh: Mesh, axes: Mapping[str, str] | None) -> Mesh:
    """Return the mesh with the library's names: the same devices in the same order, and Auto axes.

    Raises:
        ValueError: as `jit_step`.
    """
    if axes is None and mesh.axis_names in (AXES, KNOWN_AXES) and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    names = [(axes or {}).get(axis, axis) for axis in mesh.axis_names]
    if sorted(names) != sorted(set(names) & set(KNOWN_AXES)) or set(axes or {}) - set(mesh.axis_names):
        raise ValueError(
            f"jit_step needs to know what the mesh's axes {', '.join(mesh.axis_names)} stand for: expected "
            f"axes={{name: one of {', '.join(KNOWN_AXES)}}} with an entry for each of them and none twice, got {axes}."
        )
    missing = [axis for axis in AXES if axis not in names]
    devices = mesh.devices.reshape(*mesh.devices.shape, *(1,) * len(missing))
    return Mesh(devices, (*names, *missing), axis_types=(AxisType.Auto,) * devices.ndim)


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

    def __init__(
        self,
        step: Callable[..., PyTree],
        mesh: Mesh,
        axes: Mapping[str, str] | None = None,
        compiler_options: Mapping[str, OptionValue | None] | None = None,
    ) -> None:
        self.step, self.mesh = step, rename_axes(mesh, axes)
        self.compiler_options = options_on(mesh, compiler_options)
        self.home = mesh
        self.names = {own: name for own, name in zip(self.mesh.axis_names, mesh.axis_names, strict=False)}
        self.compiled: Any = None

    def __call__(self, state: PyTree, batch: PyTree, *rest: PyTree) -> PyTree:
        arguments = self.without_types((state, batch, *rest))
        return self.jitted(*arguments)(*arguments)

    def lower(self, state: PyTree, batch: PyTree, *rest: PyTree) -> jax.stages.Lowered:
        """Lower the step as `jax.jit(...).lower` does. Arguments may be abstract."""
        arguments = self.without_types((state, batch, *rest))
        return self.jitted(*arguments).lower(*arguments)

    def without_types(self, arguments: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """Return arrays with Explicit axes in their types as arrays without, on the same devices."""
        own = {name: axis for axis, name in self.names.items()}

        def free(x: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
            sharding = getattr(x, "sharding", None)
            if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
                return x
            to = NamedSharding(self.mesh, renamed(sharding.spec, own))
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
            return jax.device_put(x, to)

        return jax.tree.map(free, arguments) if self.home is not self.mesh else arguments

    def at_home(self, shardings: PyTree) -> PyTree:
        """Return the shardings on the mesh that `jit_step` was given."""
        if self.home is self.mesh:
            return shardings
        return jax.tree.map(lambda own: NamedSharding(self.home, renamed(own.spec, self.names)), shardings)

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
                out_shardings=self.at_home((state_shardings, everywhere)),
                donate_argnums=0,
                compiler_options=self.compiler_options,
            )
        return self.compiled


def renamed(spec: PartitionSpec, names: Mapping[str, str]) -> PartitionSpec:
    """Return the spec with other names for its axes, and without axes that have no name there."""
    return PartitionSpec(*(tuple(names[axis] for axis in axes if axis in names) for axes in dimension_axes(spec)))
