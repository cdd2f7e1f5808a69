"""The arguments of a train step as shapes: neither weights nor data are needed to compile it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cotgrpo import objectives
from cotgrpo.objectives import Objective
from cotgrpo.sharding import batch_sharding, state_sharding
from cotgrpo.types import GhostBatch, SftBatch, TrainState

if TYPE_CHECKING:
    from cotgrpo.types import PyTree


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """Abstract arguments of a step; `frozen` holds LoRA's base and a reference's parameters."""

    state: TrainState
    batch: SftBatch | GhostBatch
    frozen: tuple[PyTree, ...]

    def bytes_on(self, mesh: Mesh | AbstractMesh) -> dict[str, int]:
        """Return the bytes of each kind on one device of the mesh, by `cotgrpo.sharding`'s rules."""
        batch = jax.tree.map(lambda _: batch_sharding(mesh), self.batch)
        kinds = {
            "parameters": (self.state.params, state_sharding(self.state.params, mesh)),
            "optimizer": (self.state.opt_state, state_sharding(self.state.opt_state, mesh)),
            "frozen parameters": (self.frozen, state_sharding(self.frozen, mesh)),
            "batch": (self.batch, batch),
        }
        return {kind: shard_bytes(*trees) for kind, trees in kinds.items()}


def shard_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Return the bytes of one device's share of the arrays."""
    of = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


def abstract_batch(objective: Objective, batch_size: int, seq_len: int, width: int) -> SftBatch | GhostBatch:
    """Return the shapes of a batch with the arrays that the objective reads; `width` is that of the live teacher."""
    shape, top_k = (batch_size, seq_len), objectives.top_k(objective)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    floats: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    wide: dict[str, Any] = {
        "top_ids": jax.ShapeDtypeStruct((*shape, top_k), jnp.int32),
        "top_log_probs": jax.ShapeDtypeStruct((*shape, top_k), jnp.float32),
        "reference_rows": jax.ShapeDtypeStruct((*shape, width), jnp.float32),
    }
    names = (objectives.batch_fields(objective) or ()) + ("reference_rows",) * objectives.reads_teacher(objective)
    if not names:
        return SftBatch(ids, ids, ids, ids, floats)
    drawn = ids if "drawn_log_probs" in names else None
    return GhostBatch(ids, ids, ids, ids, floats, drawn, {name: wide.get(name, floats) for name in names})
