"""`cotgrpo plan`: whether a run fits on accelerators that are not there, and how fast it can be.

For TPUs the very train step of the config (`run/stage_step.py`) is compiled for the slice by `libtpu`, with abstract arguments: no TPU, no weights and
no data are needed. Memory, collectives and the compiler's estimate are read off the result. For GPUs, whose compiler needs the device, all is arithmetic, and
says so. The roofline (`run/roofline.py`) is the same for both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cotgrpo import objectives
from cotgrpo.accelerators.chips import Topology
from cotgrpo.accelerators.roofline import Work, step_time
from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.lora import init_lora
from cotgrpo.planning.hlo import Collective, collectives, estimated_cycles
from cotgrpo.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    check_mesh,
    jit_step,
    make_mesh,
    mesh_shape,
    state_sharding,
)
from cotgrpo.tiled_loss import default_tile_size
from cotgrpo.training.steps import StageName, needs_reference, stage_step
from cotgrpo.types import GhostBatch, SftBatch, TrainState


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A step's arguments, abstract: `jax.ShapeDtypeStruct`s. `rest` holds frozen parameters: LoRA's base, a reference."""

    state: TrainState
    batch: SftBatch | GhostBatch
    rest: tuple[Any, ...]

    def bytes_on(self, mesh: Any) -> dict[str, int]:
        """Bytes of each kind on one device of the mesh, by `cotgrpo.sharding`'s rules."""
        batch = jax.tree.map(lambda _: batch_sharding(mesh), self.batch)
        kinds = {
            "parameters": (self.state.params, state_sharding(self.state.params, mesh)),
            "optimizer": (self.state.opt_state, state_sharding(self.state.opt_state, mesh)),
            "frozen parameters": (self.rest, state_sharding(self.rest, mesh)),
            "batch": (self.batch, batch),
        }
        return {kind: shard_bytes(*trees) for kind, trees in kinds.items()}


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of one device's share of the arrays."""
    of = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage of a config on a topology.

    Attributes:
        config: the settings; data is not read, and weights neither.
        stage: "sft" or "grpo".
        topology: the chips.
        mesh: sizes of the axes, one may be -1; None: those of the config.
    """

    config: Config
    stage: StageName
    topology: Topology
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a mesh that does not make the topology's devices, or that the model or the batch does not divide over."""
        _ = self.mesh_sizes

    @property
    def settings(self) -> Any:
        return getattr(self.config, self.stage)

    @functools.cached_property
    def decoder(self) -> DecoderConfig:
        """The student's shape: from its config.json, or from scratch with as many tokens as its tokenizer may have."""
        student = self.config.student
        from_scratch = lambda: student.decoder(self.config.tokenizer.vocab_size)
        shape = from_scratch() if student.path is None else open_folder(student.path).config
        return student.computed(shape, self.topology.chip.platform)

    @functools.cached_property
    def mesh_sizes(self) -> dict[str, int]:
        """The size of every axis."""
        sizes = dict(self.mesh or dataclasses.asdict(self.config.mesh))
        try:
            whole = mesh_shape(sizes, self.topology.num_devices)
            check_mesh(whole, dataclasses.asdict(self.decoder))
            check_batch(whole, self.settings.batch_size, self.config.data.seq_len, self.settings.micro_batches)
        except ValueError as error:
            raise ConfigError(f"mesh on {self.topology.name}: {error}") from error
        return whole

    @functools.cached_property
    def work(self) -> Work:
        data, settings = self.config.data, self.settings
        return Work(
            decoder=self.decoder,
            tokens=settings.batch_size * data.seq_len,
            seq_len=data.seq_len,
            micro_batches=settings.micro_batches,
            reference=needs_reference(self.config, self.stage),
            frozen=self.config.lora.build() is not None,
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of the token engine on one device, where every token is supervised."""
        return -(-self.shard_tokens // self.tile_size)

    @property
    def shard_tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        shards = math.prod(self.mesh_sizes[axis] for axis in AXES if axis != "tensor")
        return max(self.work.tokens // self.settings.micro_batches // shards, 1)

    @property
    def tile_size(self) -> int:
        return default_tile_size(self.shard_tokens, self.decoder.vocab_size, self.topology.chip.platform)

    def step(self) -> tuple[Any, Arguments]:
        """The stage's step, not jitted, and its arguments."""
        tx = self.settings.optimizer.build(self.settings.steps)
        step = stage_step(self.config, self.stage, make_student(self.decoder), tx, tile_size=self.tile_size)

        key = jax.eval_shape(jax.random.key, 0)
        params = jax.eval_shape(functools.partial(init_params, self.decoder), key)
        rest = (params,) * (self.work.frozen + self.work.reference)
        lora = self.config.lora.build()
        trained = params if lora is None else jax.eval_shape(functools.partial(init_lora, params, lora), key)
        state = jax.eval_shape(lambda params, key: TrainState.create(params=params, tx=tx, key=key), trained, key)
        shape = (self.settings.batch_size, self.config.data.seq_len)
        ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
        weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        batch: SftBatch | GhostBatch = SftBatch(ids, ids, ids, ids, weights)
        if self.stage == "grpo" and self.config.grpo.objective.name == "group_relative":
            batch = GhostBatch(ids, ids, ids, ids, weights, ids, weights, weights)
        top_k = objectives.top_k(self.config.grpo.objective.build()) if self.stage == "grpo" else 0
        if top_k:
            tops: Any = (jax.ShapeDtypeStruct((*shape, top_k), kind) for kind in (jnp.int32, jnp.float32))
            batch = GhostBatch(ids, ids, ids, ids, weights, None, None, None, *tops)
        return step, Arguments(state, batch, rest)

    def figures(self, by_arithmetic: bool = False) -> dict[str, Any]:
        """All that the plan says, as JSON holds it; `by_arithmetic` compiles nothing, as for GPUs."""
        estimate = by_arithmetic or self.topology.chip.platform != "tpu"
        step, arguments = self.step()
        memory: dict[str, Any] = dict(self.argument_bytes(arguments))
        found = self.estimated(memory) if estimate else self.compiled(step, arguments)
        memory |= found.pop("memory")
        memory["total"] = memory.get("total", sum(memory.values()))
        memory["hbm"] = round(self.topology.hbm_bytes)
        state_bytes = memory["parameters"] + memory["optimizer"]
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "devices": self.topology.num_devices,
            "mesh": self.mesh_sizes,
            "stage": self.stage,
            "student": {"path": self.config.student.path, "parameters": self.decoder.num_params()}
            | {name: getattr(self.decoder, name) for name in ("dtype", "param_dtype", "remat", "attention")},
            "batch": {"sequences": self.settings.batch_size, "seq_len": self.config.data.seq_len}
            | {"micro_batches": self.settings.micro_batches},
            "optimizer": self.settings.optimizer.name,
            "lora_rank": self.config.lora.rank,
            "estimate": estimate,
            "fits": found.pop("fits", memory["total"] <= memory["hbm"]),
            "bytes_per_device": memory,
            **found,
            **self.speed(state_bytes, found.get("sent_bytes"), found.get("compiler_seconds")),
        }

    def argument_bytes(self, arguments: Arguments) -> dict[str, int]:
        """Bytes of each kind of argument on one device."""
        sizes = self.mesh_sizes
        return arguments.bytes_on(
            AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        )

    def estimated(self, memory: Mapping[str, int]) -> dict[str, Any]:
        """Temporaries and communication by arithmetic; `memory` holds what the arguments take."""
        temporaries = self.work.activation_bytes(self.mesh_sizes) + self.gradient_bytes(memory["parameters"])
        return {"memory": {"temporaries": round(temporaries)}, "sent_bytes": self.work.sent_bytes(self.mesh_sizes)}

    def gradient_bytes(self, params_bytes: int) -> int:
        """Gradients on one device: float32 where they are summed over micro-batches, else as the parameters."""
        wide = self.settings.micro_batches > 1 and self.config.student.param_dtype == "bfloat16"
        return params_bytes * (2 if wide else 1)

    def speed(self, state_bytes: int, sent_bytes: float | None, compiler_seconds: float | None) -> dict[str, Any]:
        """Operations, the roofline's times, and the MFU and tokens a second that they allow."""
        work, topology = self.work, self.topology
        sent_bytes = work.sent_bytes(self.mesh_sizes) if sent_bytes is None else sent_bytes
        times = step_time(work, topology, float(state_bytes), float(sent_bytes), self.mesh_sizes)
        range_of = lambda per_second: [per_second(times.in_turn), per_second(times.overlapped)]
        peak = topology.num_chips * topology.chip.flops
        return {
            "flops": {"model": work.model_flops, "hardware": work.hardware_flops},
            "seconds": dataclasses.asdict(times)
            | {"step": [times.overlapped, times.in_turn], "compiler": compiler_seconds},
            "mfu": range_of(lambda seconds: work.model_flops / (seconds * peak)),
            "tokens_per_second": range_of(lambda seconds: work.tokens / seconds),
        }

    def compiled(self, step: Any, arguments: Arguments) -> dict[str, Any]:
        """The step compiled for the slice: memory, collectives, the compiler's estimate."""
        started = time.perf_counter()
        mesh = make_mesh(devices=tpu_devices(self.topology), **self.mesh_sizes)
        try:
            program = compile_step(step, mesh, arguments)
        except jax.errors.JaxRuntimeError as error:
            return {"fits": False, "memory": {"total": needed_bytes(error)}} | seconds_since(started)
        text, memory = program.as_text(), program.memory_analysis()
        found = collectives(text)
        clock = self.topology.chip.clock
        return {
            "memory": {
                "temporaries": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "program": memory.generated_code_size_in_bytes,
                "total": memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.generated_code_size_in_bytes,
            },
            "fits": True,  # or it would not have compiled
            "argument_bytes": memory.argument_size_in_bytes,
            "sent_bytes": sum(c.sent * self.times(c) for c in found),
            "collectives": self.by_kind(found),
            "tile_loop": self.tile_loop(found),
            "compiler_seconds": estimated_cycles(text, self.num_tiles) / clock if clock else None,
        } | seconds_since(started)

    def times(self, collective: Collective) -> int:
        """How often it runs in a step. A loop that the compiler made around a product, to send while it multiplies, has a turn for each device."""
        return collective.times(self.num_tiles if in_tile_loop(collective) else collective.group)

    def by_kind(self, found: list[Collective]) -> dict[str, dict[str, float]]:
        """How often each kind of collective runs in a step, and the bytes that a device sends in it."""
        sums: dict[str, dict[str, float]] = {}
        for collective in found:
            own = sums.setdefault(collective.kind, {"times": 0.0, "sent_bytes": 0.0})
            own["times"] += self.times(collective)
            own["sent_bytes"] += collective.sent * self.times(collective)
        return sums

    def tile_loop(self, found: list[Collective]) -> dict[str, Any]:
        """The largest array that a collective moves inside the token engine's loop, whose length the data decides, beside a tile of hidden states."""
        inside = [size for c in found if in_tile_loop(c) for size in c.sizes]
        tile = self.tile_size * self.decoder.width * jnp.dtype(self.decoder.dtype).itemsize
        return {"tiles": self.num_tiles, "largest_collective_bytes": max(inside, default=0), "tile_bytes": tile}


def compile_step(step: Any, mesh: Any, arguments: Arguments) -> Any:
    """The program that `jit_step` makes of the step on a mesh, whose devices need not be there."""
    with quiet_cache():
        return jit_step(step, mesh).lower(arguments.state, arguments.batch, *arguments.rest).compile()


@contextlib.contextmanager
def quiet_cache() -> Iterator[None]:
    """No compilation cache: a program for a device that is not there cannot be kept."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def tpu_devices(topology: Topology) -> Any:
    """The slice's devices as `libtpu` describes them.

    Raises:
        ConfigError: no libtpu, or a slice that there is not.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "plan compiles for TPUs with libtpu, which is not installed (no TPU is needed). Install cotgrpo's `tpu` extra: "
            "pip install 'cotgrpo[tpu]'."
        )
    # Else libtpu looks for the TPUs of this machine, or for the one process that may use them.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    one_device_a_chip = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        devices = topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **one_device_a_chip).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology {topology.name}: libtpu knows no such slice ({error}).") from error
    return devices


def needed_bytes(error: Exception) -> int:
    """What a program would have needed, from the compiler's message (either form of it). Raises the error if it is another one."""
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds)", str(error))
    if used is None:
        raise error
    return round(float(used[1]) * 2 ** (10 * " KMGT".index(used[2] or " ")))


def in_tile_loop(collective: Collective) -> bool:
    """Whether it is in the token engine's loop, whose length the data decides, and not in one that the compiler made around a product."""
    return None in collective.loops and "shard_map/while" in collective.name


def seconds_since(started: float) -> dict[str, float]:
    """What compiling took."""
    return {"compile_seconds": round(time.perf_counter() - started, 1)}
