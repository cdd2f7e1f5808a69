"""From a pure step to a compiled one: jit, donation of the state, and shardings by rules over parameter paths."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"(^|/)head$", ("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"(out|down)/kernel$", (None, "tensor", "fsdp")),
    # LoRA's A and B beside a kernel lie as its inputs and outputs do; their rank is small and stays whole.
    (r"(query|key|value|gate|up)/lora_a$", (None, "fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", (None, None, "tensor")),
    (r"(out|down)/lora_a$", (None, "tensor", None)),
    (r"(out|down)/lora_b$", (None, None, "fsdp")),
)
"""(pattern searched in the path, mesh axis of each dimension). The first match counts; a leaf that none matches is on every device.
Optimizer moments have their parameter's path at the end of their own, and so its sharding."""


def make_mesh(**sizes: int) -> Mesh:
    """A device mesh, as `make_mesh(data=2, fsdp=4)`; one size may be -1, for all devices that are left.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"Unknown mesh axis {unknown[0]!r}: the axes are {', '.join(AXES)}.")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    open_axes = [axis for axis, size in shape.items() if size == -1]
    fixed = 1
    for size in shape.values():
        fixed *= size if size != -1 else 1
    devices = jax.device_count()
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"Mesh sizes must be positive, with at most one -1, got {sizes}.")
    if open_axes and devices % fixed == 0:
        shape[open_axes[0]] = devices // fixed
        fixed = devices
    if fixed != devices:
        raise ValueError(f"The mesh {sizes} asks for {fixed} devices (or a multiple), but there are {devices}.")
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of a train state or parameter tree, by `PARAM_RULES`."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)
        for pattern, axes in PARAM_RULES:
            if re.search(pattern, name) and len(axes) == leaf.ndim:
                # A dimension that the axis does not divide stays whole.
                fits = [a if a and leaf.shape[i] % mesh.shape.get(a, 1) == 0 else None for i, a in enumerate(axes)]
                return NamedSharding(mesh, PartitionSpec(*fits))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences over the `data` and `fsdp` axes together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def jit_step(step: Any, mesh: Mesh | None = None) -> Any:
    """Compiles a train step: `jax.jit`, the state donated, and with a mesh the shardings of state and batch.

    Args:
        step: `step(state, batch, ...) -> (state, metrics)`. Arguments after the batch (a reference's parameters) are sharded as the state is.
        mesh: from `make_mesh`; None: no shardings, JAX's default device.

    Returns:
        The compiled step. The state passed in is donated: its buffers are reused, so keep only the state that comes back.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    return ShardedStep(step, mesh)


class ShardedStep:
    """A jitted step whose shardings follow from the trees of its first call."""

    def __init__(self, step: Any, mesh: Mesh) -> None:
        self.step, self.mesh = step, mesh
        self.compiled: Any = None

    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any:
        return self.jitted(state, *rest)(state, batch, *rest)

    def lower(self, state: Any, batch: Any, *rest: Any) -> Any:
        """As `jax.jit(...).lower`: arguments may be abstract."""
        return self.jitted(state, *rest).lower(state, batch, *rest)

    def jitted(self, state: Any, *rest: Any) -> Any:
        if self.compiled is None:
            state_shardings = state_sharding(state, self.mesh)
            rest_shardings = tuple(state_sharding(tree, self.mesh) for tree in rest)
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            self.compiled = jax.jit(
                self.step,
                in_shardings=(state_shardings, batch_sharding(self.mesh), *rest_shardings),
                out_shardings=(state_shardings, everywhere),
                donate_argnums=0,
            )
        return self.compiled
