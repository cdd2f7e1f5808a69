"""The mesh of a run: made from its config, held against its model and batches before anything is read or compiled, and what lies on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.models.config import DecoderConfig
from cotgrpo.sharding import check_batch, check_mesh, make_mesh, mesh_shape, state_sharding


def run_mesh(config: Config) -> jax.sharding.Mesh | None:
    """The mesh of `config.mesh` over all devices; None where there is one device, or JAX was told to use one (`jax_default_device`).

    Raises:
        ConfigError: sizes that do not make the number of devices.
    """
    devices = 1 if jax.config.values["jax_default_device"] is not None else jax.device_count()
    sizes = dataclasses.asdict(config.mesh)
    try:
        mesh_shape(sizes, devices)
    except ValueError as error:
        raise ConfigError(f"mesh: {error} (mesh.data is -1 where it is not given.)") from error
    return None if devices == 1 else make_mesh(**sizes)


def check_stage_batch(config: Config, stage: str) -> None:
    """Raises ConfigError where the stage's batch, or a micro-batch of it, cannot be spread evenly over the mesh."""
    mesh, settings = run_mesh(config), getattr(config, stage)
    if mesh is not None:
        try:
            check_batch(mesh.shape, settings.batch_size, config.data.seq_len, settings.micro_batches)
        except ValueError as error:
            raise ConfigError(f"{stage}.batch_size, data.seq_len and mesh do not go together. {error}") from error


def check_model(config: Config, decoder: DecoderConfig, name: str = "student") -> None:
    """Raises ConfigError where the mesh splits a dimension of the model that it does not divide; `name` is what the model is called."""
    mesh = run_mesh(config)
    if mesh is not None:
        try:
            check_mesh(mesh.shape, dataclasses.asdict(decoder))
        except ValueError as error:
            raise ConfigError(f"mesh and {name} do not go together. {error}") from error


def laid_out(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes and types with the shardings of the mesh, for what restores arrays; without a mesh, as they are."""
    if mesh is None:
        return tree
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, state_sharding(tree, mesh))


def made_on(mesh: jax.sharding.Mesh | None, make: Callable[..., Any], *arguments: Any) -> Any:
    """`make(*arguments)`, a tree of parameters, each shard made on its own device."""
    if mesh is None:
        return make(*arguments)
    return jax.jit(make, out_shardings=state_sharding(jax.eval_shape(make, *arguments), mesh))(*arguments)
