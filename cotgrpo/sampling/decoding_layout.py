"""The layout of weights and cache while tokens are decoded, chosen by bytes.

A train step gathers each layer's weights when it needs them. A decode loop would do so for every token. So a sampler
lays out a copy of the weights in the compute type once, before its loop, and computes with that:

    gathered    Each device holds the weights that `tensor` leaves it, and decodes its own sequences.
    tensor      Other axes split heads, the MLP and the vocabulary too, and the cache with them. The sequences are split
                over what is left.

If the first does not fit, the one with the fewest further axes that fits is chosen; if none fits, the smallest.
The copy is a temporary of the compiled program, so it is freed when the replies are complete.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cotgrpo.models.decoder import DecoderConfig, init_layer_cache, init_params, unstack_layers
from cotgrpo.models.layers.experts import IN_FLOAT32, LETTERS
from cotgrpo.models.lora import AdaptedParams, apply_adapters
from cotgrpo.models.quantized.kernel import QUANTIZED_PARTS
from cotgrpo.sharding import (
    EXPERT,
    FOUND_LAYOUT,
    AxisLayout,
    apply_constraint,
    axes_size,
    axis_layout,
    axis_names,
    constrain,
    found_layout,
    open_axes,
    open_of,
    param_spec,
    partition_spec,
    path_name,
)
from cotgrpo.types import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

    from cotgrpo.types import PyTree

SHARE_OF_MEMORY = 0.9
"""Share of a device's memory that decoding may fill. The rest is for programs and what is not counted."""
STATE_COPIES = 3
"""Copies of trained parameters that a train state holds: they and AdamW's two moments."""
LOGITS_COPIES = 3
"""Arrays as large as the logits while a token is drawn: they, their exponentials and a filtered copy."""
INT = FLOAT = 4
WIDE = {"query": "Q", "key": "K", "value": "K", "gate": "F", "up": "F", "out": "Q", "down": "F"}
WIDE |= {"conv_in": "F", "conv_out": "F"}
WIDE |= dict.fromkeys(("delta_in", "delta_gate", "delta_strength", "delta_decay", "delta_out"), "F")
WIDE |= {"per_layer_gate": "F", "per_layer_out": "F"}
"""Letter of each projection's side that is not the residual stream."""
TO_RESIDUAL = ("out", "conv_out", "delta_out", "down", "per_layer_out")

Name = Literal["gathered", "tensor"]


@dataclasses.dataclass(frozen=True)
class DecodingBytes:
    """What decoding takes on one device, in bytes.

    Attributes:
        state: parameters and optimizer as they are trained, and other parameters that stay (`also_resident`).
        copy: the weights that the loop reads.
        cache: keys and values, and the states of other layers.
        temporaries: logits, the head in another order, and of the prompts' prefill the scores, the new part of the
            cache and a copy of the whole.
    """

    state: int
    copy: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.state + self.copy + self.cache + self.temporaries


@dataclasses.dataclass(frozen=True)
class DecodingLayout:
    """How a decode loop is laid out on a mesh.

    Attributes:
        name: as in the module's docstring.
        sizes: {axis: size} of the mesh that decoding uses. An axis of the training mesh may be cut into its factors.
        heads: axes that split query heads, key/value heads and the cache.
        tensor: axes that split the MLP and the vocabulary.
        rows: axes that split the sequences.
        bytes: what it takes on a device.
        memory: bytes of a device; None: not known.
    """

    name: Name
    sizes: Mapping[str, int]
    heads: tuple[str, ...]
    tensor: tuple[str, ...]
    rows: tuple[str, ...]
    bytes: DecodingBytes
    memory: int | None

    @property
    def fits(self) -> bool:
        """Whether a device has the memory, as far as it is known."""
        return self.memory is None or self.bytes.total <= SHARE_OF_MEMORY * self.memory

    @property
    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """Axes by the letter of a dimension, as `cotgrpo.sharding.DIMENSIONS`."""
        expert = tuple(axis for axis in self.sizes if axis.startswith(EXPERT) and self.sizes[axis] > 1)
        return {"B": self.rows, "Q": self.heads, "K": self.heads, "F": self.tensor, "V": self.tensor, "E": expert}

    def parts(self, letter: str, size: int) -> int:
        """Return into how many parts a dimension is split: 1 if its axes do not divide it."""
        parts = math.prod(self.sizes[axis] for axis in self.dimensions.get(letter, ()))
        return parts if size % parts == 0 else 1

    def shard_bytes(self, name: str, leaf: Array | jax.ShapeDtypeStruct) -> int:
        """Return the bytes on one device of a parameter of `decoding_params`."""
        letters = letters_of(name, leaf.ndim)
        parts = math.prod(self.parts(letter, size) for letter, size in zip(letters, leaf.shape, strict=True))
        return leaf.size * leaf.dtype.itemsize // parts

    def work_bytes(
        self, config: DecoderConfig, batch_size: int, prompt_columns: int, max_new_tokens: int
    ) -> tuple[int, int]:
        """Return the bytes on one device of the cache, and of the temporaries."""
        rows = batch_size // self.parts("B", batch_size)
        columns = prompt_columns + max_new_tokens
        kinds = Counter(config.layers).items()
        cache = 2 * INT * rows * columns + sum(self.layer_bytes(kind, rows, columns) * n for kind, n in kinds)
        heads = self.parts("K", config.num_kv_heads)
        scores = rows * config.num_heads // heads * prompt_columns**2 * (FLOAT + jnp.dtype(config.dtype).itemsize)
        inputs = 2 * rows * prompt_columns * config.input_width * jnp.dtype(config.dtype).itemsize
        columns_of_head = config.vocab_size // self.parts("V", config.vocab_size)
        logits = LOGITS_COPIES * rows * columns_of_head * FLOAT
        head = columns_of_head * config.width * jnp.dtype(config.dtype).itemsize
        admitted = cache + cache * prompt_columns // columns
        return cache, scores + inputs + logits + head + admitted

    def layer_bytes(self, config: DecoderConfig, rows: int, columns: int) -> int:
        """Return the bytes on one device of what a layer keeps: keys and values, or a state."""
        found = jax.eval_shape(lambda: init_layer_cache(config, rows, columns))
        heads = self.parts("K", config.num_kv_heads) if config.mixer == "attention" else 1
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found)) // heads

    def __str__(self) -> str:
        """Return one line: the layout, and why."""
        ways = {axes: math.prod(self.sizes[axis] for axis in getattr(self, axes)) for axes in ("rows", "tensor")}
        split = f"sequences over {ways['rows']} devices, weights over {ways['tensor']}"
        needs = f"weights {human(self.bytes.copy)}, cache {human(self.bytes.cache)}, {human(self.bytes.total)} in all"
        if self.memory is None:
            return f"decoding: {self.name}, {split} (a device takes {needs}; how much it has is not known)"
        why = "the first layout that fits" if self.fits else "no layout fits by this count, and this is the smallest"
        return f"decoding: {self.name}, {split} (a device takes {needs}, of {human(self.memory)}: {why})"


def human(count: int) -> str:
    """Return bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def decoding_bytes(
    config: DecoderConfig,
    sizes: Mapping[str, int],
    batch_size: int,
    prompt_columns: int,
    max_new_tokens: int,
    *,
    memory: int | None = None,
    params: Params | None = None,
    resident: int = 0,
) -> DecodingLayout:
    """Return the layout that a sampler chooses on a mesh, and the bytes of its copy and cache on one device.

    Args:
        config: the student's decoder.
        sizes: of the mesh's axes, as `mesh.shape`.
        batch_size: replies decoded at a time.
        prompt_columns: of the longest prompt.
        max_new_tokens: of the longest reply.
        memory: bytes of a device; None: not known, so all fits.
        params: the student's, or their shapes, which may be `AdaptedParams`; None: as `init_params` makes them.
        resident: bytes on a device of other arrays that stay meanwhile, such as a live teacher's.

    Returns:
        The layout. `.bytes` has `state`, `copy`, `cache` and `temporaries`.
    """
    if params is None:
        params = jax.eval_shape(functools.partial(init_params, config), jax.eval_shape(jax.random.key, 0))
    tree = jax.eval_shape(functools.partial(decoding_params, config), params)
    state = state_bytes(params, sizes) + resident
    seen = (batch_size, prompt_columns, max_new_tokens)
    found = []
    for finer, moved in axis_options(sizes):
        layout = layout_of(config, finer, moved, batch_size)
        copy = sum(layout.shard_bytes(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree))
        needs = DecodingBytes(state, copy, *layout.work_bytes(config, *seen))
        found.append(dataclasses.replace(layout, bytes=needs, memory=memory))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda layout: layout.bytes.total)


def axis_options(sizes: Mapping[str, int]) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
    """Yield ({axis: size} of a mesh of the same devices, its axes that split weights in place of sequences).

    First no axis does so. Then the axes but `tensor` are cut into their prime factors, and one factor more at a time
    does, the innermost of `fsdp` first.
    """
    yield dict(sizes), ()
    pieces = {axis: {axis: n} if axis == "tensor" or n == 1 else factors(axis, n) for axis, n in sizes.items()}
    finer = {name: n for own in pieces.values() for name, n in own.items()}
    order = [name for axis in ("data", "context", "fsdp") for name in pieces.get(axis, {}) if finer[name] > 1]
    for first in reversed(range(len(order))):
        yield finer, tuple(order[first:])


def factors(axis: str, size: int) -> dict[str, int]:
    """Return axes for the prime factors of an axis, outermost first: `{"fsdp0": 2, "fsdp1": 3}`."""
    found: list[int] = []
    while size > 1:
        found.append(next(n for n in range(2, size + 1) if size % n == 0))
        size //= found[-1]
    return {f"{axis}{index}": prime for index, prime in enumerate(found)}


def layout_of(
    config: DecoderConfig, sizes: Mapping[str, int], moved: tuple[str, ...], batch_size: int
) -> DecodingLayout:
    """Return the layout in which `tensor` and the `moved` axes split weights, without its bytes."""
    tensor = tuple(axis for axis in ("tensor", *reversed(moved)) if sizes.get(axis, 1) > 1)
    rest = tuple(axis for axis in sizes if sizes[axis] > 1 and axis not in tensor)
    return DecodingLayout(
        "tensor" if moved else "gathered",
        sizes,
        dividing(tensor, sizes, math.gcd(*{layer.num_kv_heads for layer in config.layers})),
        tensor,
        dividing(rest, sizes, batch_size),
        DecodingBytes(0, 0, 0, 0),
        None,
    )


def dividing(axes: Sequence[str], sizes: Mapping[str, int], number: int) -> tuple[str, ...]:
    """Return the axes, taken in turn, whose product divides a number."""
    taken: list[str] = []
    for axis in axes:
        if number % (math.prod(sizes[own] for own in taken) * sizes[axis]) == 0:
            taken.append(axis)
    return tuple(taken)


def letters_of(name: str, ndim: int) -> str:
    """Return the letters of a parameter's dimensions, as `cotgrpo.sharding.constrain` reads them.

    `name` is the path in a tree of `decoding_params`, such as "layer_0/query/transposed".
    """
    *_, module, leaf = ("", *name.split("/"))
    if leaf in ("embedding", "head"):
        return "VD" if leaf == "embedding" else "DV"
    if module == "experts":
        return LETTERS[leaf] if leaf in LETTERS and leaf not in IN_FLOAT32 else "N" * ndim
    if module not in WIDE:
        return "N" * ndim
    inputs, outputs = (WIDE[module], "D") if module in TO_RESIDUAL else ("D", WIDE[module])
    if leaf in QUANTIZED_PARTS:
        return inputs + outputs
    letters = {"transposed": outputs + inputs, "bias": outputs, "lora_a": inputs + "R", "lora_b": "R" + outputs}
    return letters.get(leaf, "N" * ndim)


def decoding_params(config: DecoderConfig, params: Params) -> Params:
    """Return what a decode loop reads: layers as `unstack_layers` returns them, all matrices in the compute type."""
    with apply_adapters(params) as (whole, _):
        tree = unstack_layers(config, whole)
    dtype, further = jnp.dtype(config.dtype), {}
    cast = lambda own: {name: own[name].astype(dtype) for name in ("embedding", "head") if name in own}
    if "per_layer" in tree:
        kernel = tree["per_layer"]["projection"]["kernel"].astype(dtype)
        further = {"per_layer": tree["per_layer"] | cast(tree["per_layer"]) | {"projection": {"kernel": kernel}}}
    return tree | cast(tree) | further


def state_bytes(params: Params, sizes: Mapping[str, int]) -> int:
    """Return the bytes on one device of a train state with these parameters."""
    if isinstance(params, AdaptedParams):
        return trained_bytes(params.base, sizes) + STATE_COPIES * trained_bytes(params.adapters, sizes)
    return STATE_COPIES * trained_bytes(params, sizes)


def trained_bytes(tree: PyTree, sizes: Mapping[str, int]) -> int:
    """Return the bytes of one device's share of parameters, by `cotgrpo.sharding.PARAM_RULES`."""

    def of(path: tuple[object, ...], leaf: Array | jax.ShapeDtypeStruct) -> int:
        spec = param_spec(path_name(path), leaf.shape, sizes)
        parts = math.prod(sizes.get(axis, 1) for axis in spec if axis is not None)
        return leaf.size * leaf.dtype.itemsize // parts

    return sum(of(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree))


RESIDENT: contextvars.ContextVar[tuple[PyTree, ...]] = contextvars.ContextVar("resident", default=())


@contextlib.contextmanager
def also_resident(params: PyTree) -> Iterator[None]:
    """Count these parameters too while a sampler is traced, such as a live teacher's. They stay where they are."""
    token = RESIDENT.set((*RESIDENT.get(), params))
    try:
        yield
    finally:
        RESIDENT.reset(token)


def ambient_layout(
    config: DecoderConfig, params: Params, batch_size: int, prompt_columns: int, max_new_tokens: int
) -> DecodingLayout | None:
    """Return the layout on JAX's ambient mesh.

    Returns None on one device, in a `shard_map`, and on a mesh with axes of other names, whose layout XLA chooses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not open_axes() or FOUND_LAYOUT.get() is not None or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    resident = sum(trained_bytes(tree, mesh.shape) for tree in RESIDENT.get())
    sizes = (batch_size, prompt_columns, max_new_tokens)
    return decoding_bytes(config, mesh.shape, *sizes, memory=device_memory(), params=params, resident=resident)


def device_memory() -> int | None:
    """Return the bytes of a device of this process; None if it does not tell, as a CPU.

    It is the same on all processes of a run, which have to compile the same program.
    """
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


@contextlib.contextmanager
def laid_out(
    config: DecoderConfig, whole: Params, layout: DecodingLayout | None, *rest: PyTree
) -> Iterator[tuple[PyTree, ...]]:
    """Yield what a decode loop reads, laid out. Inside, `constrain` and its kin follow the layout.

    Args:
        config: the student's decoder.
        whole: its parameters, with adapters next to their kernels.
        layout: from `ambient_layout`. None: only the layers are unstacked.
        rest: further arrays that the loop reads, such as prompts.

    Yields:
        The parameters, and the further arrays.
    """
    if layout is None:
        yield unstack_layers(config, whole), *rest
        return
    mesh, own = jax.sharding.get_abstract_mesh(), decoding_params(config, whole)
    finer = layout.sizes != mesh.shape
    if finer:
        names, sizes = tuple(layout.sizes), tuple(layout.sizes.values())
        mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    with jax.sharding.use_abstract_mesh(mesh), found_layout(AxisLayout(layout.dimensions, {})):
        own = jax.tree_util.tree_map_with_path(
            lambda path, leaf: gathered_once(layout, leaf, letters_of(path_name(path), leaf.ndim)), own
        )
        # An array's type names its mesh, so all of them have to be of the finer one.
        yield own, *(jax.tree.map(lambda x: constrain(x, "N" * x.ndim), rest) if finer else rest)


def gathered_once(layout: DecodingLayout, x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Lay out a parameter by its letters, from the layout that it is trained in."""
    if layout.name == "tensor":
        own = dict.fromkeys("QKFV", tuple(axis for axis in layout.tensor if axis == "tensor"))
        own["E"] = layout.dimensions["E"]
        shards = tuple(axis for axis in layout.sizes if axis.startswith("fsdp"))
        wide = next((layout.dimensions[letter] for letter in letters if letter in "QKFV"), ())
        # Axes move from one dimension to the other first, and the rest is gathered then. In one go XLA gathers all.
        for dimensions in (
            own | {"D": shards},
            layout.dimensions | {"D": tuple(axis for axis in shards if axis not in wide)},
        ):
            with found_layout(AxisLayout(dimensions, {})):
                x = constrain(x, letters)
    return constrain(x, letters)


def vocab_parts(vocab_size: int) -> int:
    """Return into how many equal parts the ambient layout splits the vocabulary."""
    return axes_size(axis_names(partition_spec("V", (vocab_size,))))


def row_parts() -> int:
    """Return over how many shards the ambient layout spreads the sequences."""
    return axes_size(open_of(axis_layout().dimensions["B"]))


def lay_out(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Lay out an array of the loop by its letters. Without a mesh whose axes are known, return it unchanged."""
    return apply_constraint(x, partition_spec(letters, x.shape))


def whole_rows(logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Spread logits by sequence also over the devices that split the vocabulary, each row whole on one device."""
    dimensions = axis_layout().dimensions
    axes = open_of((*dimensions["B"], *dimensions["V"]))
    if len(logits_BV) % axes_size(axes):
        axes = open_of(dimensions["B"])
    return apply_constraint(constrain(logits_BV, "BV"), PartitionSpec(axes or None, None))
