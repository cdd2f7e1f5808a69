"""The mesh of a run: made from its config, checked against model and batches, and filled with parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from cotgrpo.compiler_options.measured import options_line
from cotgrpo.config import Config, ConfigError
from cotgrpo.models.config import DecoderConfig
from cotgrpo.sharding import check_batch, check_mesh, make_mesh, mesh_shape, options_on, state_sharding
from cotgrpo.types import Params

if TYPE_CHECKING:
    from cotgrpo.types import PRNGKeyArray, PyTree


def run_mesh(config: Config) -> jax.sharding.Mesh | None:
    """Return the mesh of `config.mesh` over all devices.

    Returns None if there is one device, or if `jax_default_device` restricts JAX to one.

    Raises:
        ConfigError: sizes whose product is not the number of devices.
    """
    sizes = dataclasses.asdict(config.mesh)
    try:
        if jax.config.values["jax_default_device"] is not None or jax.device_count() == 1:
            mesh_shape(sizes, 1)
            return None
        return make_mesh(**sizes)
    except ValueError as error:
        raise ConfigError(f"mesh: {error} (mesh.data is -1 by default.)") from error


def run_options(config: Config, mesh: jax.sharding.Mesh | None) -> str:
    """Return XLA's options of the run's train step as a line; empty if it has only the workarounds for a CPU."""
    if jax.default_backend() != "tpu" and not config.compiler.options:
        return ""
    return options_line(options_on(mesh, config.compiler.given(jax.default_backend())))


def check_stage_batch(config: Config, stage: str) -> None:
    """Raise ConfigError unless the stage's batch, and each micro-batch, can be spread evenly over the mesh."""
    mesh, settings = run_mesh(config), getattr(config, stage)
    if mesh is not None:
        try:
            check_batch(mesh.shape, settings.batch_size, config.data.seq_len, settings.micro_batches)
        except ValueError as error:
            raise ConfigError(f"{stage}.batch_size, data.seq_len and mesh do not go together. {error}") from error


def check_model(config: Config, decoder: DecoderConfig, name: str = "student") -> None:
    """Raise ConfigError unless the mesh divides each dimension of the model that it splits.

    `name` is what the error calls the model.
    """
    mesh = run_mesh(config)
    if mesh is not None:
        try:
            check_mesh(mesh.shape, dataclasses.asdict(decoder))
        except ValueError as error:
            raise ConfigError(f"mesh and {name} do not go together. {error}") from error


def abstract_on_mesh(tree: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Return the tree's shapes and types with the shardings of the mesh. Without a mesh, return it unchanged."""
    if mesh is None:
        return tree
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, state_sharding(tree, mesh))


def init_on_mesh(mesh: jax.sharding.Mesh | None, init: Callable[[PRNGKeyArray], Params], key: PRNGKeyArray) -> Params:
    """Return `init(key)`, a tree of parameters. Each device makes its own shard."""
    if mesh is None:
        return init(key)
    return jax.jit(init, out_shardings=state_sharding(jax.eval_shape(init, key), mesh))(key)
