"""The plan of one training stage on absent accelerators: memory, collectives, operations and time.

For TPUs, `libtpu` compiles the very train step of the config for the slice. Memory, collectives and the compiler's
estimate are read from the compiled program. Compiling for GPUs needs the device, so their plan is arithmetic.
`cotgrpo.accelerators.step_estimate` turns what a step does into the time to expect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from cotgrpo.accelerators.chips import Topology
from cotgrpo.accelerators.roofline import Work, step_time
from cotgrpo.accelerators.step_estimate import (
    RANGE,
    StepLoad,
    arithmetic_load,
    collective_seconds,
    expected_seconds,
)
from cotgrpo.compiler_options.measured import OptionValue, options_for
from cotgrpo.config import Config, ConfigError, StageConfig
from cotgrpo.config.ghosts import StudentReplies
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.models.huggingface.folder import open_folder
from cotgrpo.models.lora import AdaptedParams, init_lora, with_adapters
from cotgrpo.models.quantized.kernel import Quantization
from cotgrpo.models.quantized.quantize import abstract_base
from cotgrpo.objectives import Nll
from cotgrpo.planning.hlo import Collective, attention_kernels, collectives, estimated_cycles
from cotgrpo.planning.rollout_plan import RolloutPlan, teacher_paths
from cotgrpo.planning.slice_transfers import slice_transfers
from cotgrpo.planning.step_arguments import StepArguments, abstract_batch
from cotgrpo.planning.tpu_compile import compile_step, needed_bytes, tpu_devices
from cotgrpo.sharding import (
    check_batch,
    check_mesh,
    make_mesh,
    mesh_shape,
)
from cotgrpo.tiled_loss import default_tile_size
from cotgrpo.train_steps import Step
from cotgrpo.training.steps import StageName, needs_reference, needs_teacher, stage_optimizer, stage_step
from cotgrpo.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage of a config on a topology.

    Attributes:
        config: the settings. Neither data nor weights are read.
        stage: "sft" or "grpo".
        topology: the chips.
        mesh: sizes of the axes, one may be -1; None for those of the config.
    """

    config: Config
    stage: StageName
    topology: Topology
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a mesh that does not match the topology's devices, the model or the batch."""
        _ = self.mesh_sizes

    @property
    def settings(self) -> StageConfig:
        return self.config.sft if self.stage == "sft" else self.config.grpo

    @functools.cached_property
    def decoder(self) -> DecoderConfig:
        """The student's shape.

        It is that of its config.json, or from scratch with the most tokens that its tokenizer may have.
        """
        student = self.config.student
        from_scratch = lambda: student.decoder(self.config.tokenizer.vocab_size)
        shape = from_scratch() if student.path is None else open_folder(student.path).config
        return student.computed(shape, self.topology.chip.platform)

    @functools.cached_property
    def mesh_sizes(self) -> dict[str, int]:
        """The size of every axis."""
        sizes = dict(self.mesh or dataclasses.asdict(self.config.mesh))
        try:
            whole = mesh_shape(sizes, self.topology.num_devices, self.topology.slices)
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
            frozen=self.config.lora is not None,
            dequantized=self.config.lora is not None and self.config.lora.quantization is not None,
        )

    @property
    def compiler_options(self) -> dict[str, OptionValue]:
        """XLA's options that `jit_step` compiles the step with on these chips."""
        chip, devices = self.topology.chip, self.topology.num_devices
        return options_for(chip.platform, chip.name, devices, self.config.compiler.given(chip.platform)) or {}

    @property
    def num_tiles(self) -> int:
        """Tiles of the loss on one device if every token is supervised."""
        return -(-self.shard_tokens // self.tile_size)

    @property
    def shard_tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        shards = math.prod(size for axis, size in self.mesh_sizes.items() if axis != "tensor")
        return max(self.work.tokens // self.settings.micro_batches // shards, 1)

    @property
    def tile_size(self) -> int:
        return default_tile_size(self.shard_tokens, self.decoder.vocab_size, self.topology.chip.platform)

    def step(self) -> tuple[Step, StepArguments]:
        """Return the stage's step, not jitted, and its arguments."""
        tx = stage_optimizer(self.config, self.stage)
        student = with_adapters(make_student(self.decoder))
        step = stage_step(self.config, self.stage, student, tx, tile_size=self.tile_size)

        key = jax.eval_shape(jax.random.key, 0)
        params = jax.eval_shape(functools.partial(init_params, self.decoder), key)
        lora = self.config.lora
        trained = params if lora is None else jax.eval_shape(functools.partial(init_lora, params, lora), key)
        frozen = (params,) * (self.work.frozen + self.work.reference)
        if lora is not None and lora.quantization is not None:
            base = self.quantized_base(params, lora.quantization)
            first = params if needs_teacher(self.config, self.stage) else AdaptedParams(base, trained, lora)
            frozen = (base, *(first,) * self.work.reference)
        state = jax.eval_shape(lambda params, key: TrainState.create(params=params, tx=tx, key=key), trained, key)
        objective = self.config.grpo.full_objective if self.stage == "grpo" else Nll()
        batch = abstract_batch(objective, self.settings.batch_size, self.config.data.seq_len, self.decoder.width)
        return step, StepArguments(state, batch, frozen)

    def quantized_base(self, params: Params, quantization: Quantization) -> Params:
        """Return the shapes of the frozen parameters with their kernels quantized."""
        try:
            return abstract_base(params, *quantization)
        except ValueError as error:
            raise ConfigError(f"lora.block_size: {error}") from error

    def figures(self, by_arithmetic: bool = False) -> dict[str, Any]:
        """Return the whole plan as JSON holds it; `by_arithmetic` compiles nothing, as for GPUs."""
        estimate = by_arithmetic or self.topology.chip.platform != "tpu"
        step, arguments = self.step()
        memory = self.argument_bytes(arguments)
        state_bytes = memory["parameters"] + memory["optimizer"]
        found = self.estimated(memory) if estimate else self.compiled(step, arguments)
        memory |= found.pop("memory")
        memory["total"] = memory.get("total", sum(memory.values()))
        fits, load = found.pop("fits", True), found.pop("load", None)
        speed = self.speed(load or self.load_by_arithmetic(state_bytes), state_bytes, found, compiled=load is not None)
        phases = self.phases(arguments, memory, speed["expected"]["seconds"])
        memory["hbm"] = round(self.topology.hbm_bytes)
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "devices": self.topology.num_devices,
            "mesh": self.mesh_sizes,
            "stage": self.stage,
            "versions": versions(),
            "student": {"path": self.config.student.path, "parameters": self.decoder.num_params()}
            | {name: getattr(self.decoder, name) for name in ("dtype", "param_dtype", "remat", "attention")},
            "batch": {"sequences": self.settings.batch_size, "seq_len": self.config.data.seq_len}
            | {"micro_batches": self.settings.micro_batches},
            "optimizer": self.settings.optimizer.name,
            "compiler_options": self.compiler_options,
            "lora_rank": self.config.lora.rank if self.config.lora else 0,
            "quantized_base": self.config.lora.quantize_base if self.config.lora else "none",
            "estimate": estimate,
            "fits": fits and memory["total"] <= memory["hbm"],
            "bytes_per_device": memory,
            **found,
            **speed,
            **phases,
        }

    def argument_bytes(self, arguments: StepArguments) -> dict[str, int]:
        """Return the bytes of each kind of argument on one device."""
        sizes = self.mesh_sizes
        return arguments.bytes_on(
            AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        )

    def estimated(self, memory: Mapping[str, int]) -> dict[str, Any]:
        """Estimate temporaries and communication by arithmetic; `memory` holds what the arguments take."""
        temporaries = self.work.activation_bytes(self.mesh_sizes) + self.gradient_bytes(memory["parameters"])
        return {"memory": {"temporaries": round(temporaries)}, "sent_bytes": self.work.sent_bytes(self.mesh_sizes)}

    def gradient_bytes(self, params_bytes: int) -> int:
        """Return the bytes of gradients on one device: float32 if summed over micro-batches, else as the parameters."""
        wide = self.settings.micro_batches > 1 and self.config.student.param_dtype == "bfloat16"
        return params_bytes * (2 if wide else 1)

    def load_by_arithmetic(self, state_bytes: int) -> StepLoad:
        """Return what a device does in a step, without a compiled program."""
        return arithmetic_load(self.work, self.topology, float(state_bytes), self.mesh_sizes)

    def speed(self, load: StepLoad, state_bytes: int, found: Mapping[str, Any], *, compiled: bool) -> dict[str, Any]:
        """Return operations, the roofline's times, the time to expect, and the speed that follows, with ranges."""
        work, topology = self.work, self.topology
        sent_bytes = found.get("sent_bytes", work.sent_bytes(self.mesh_sizes))
        times = step_time(work, topology, float(state_bytes), float(sent_bytes), self.mesh_sizes)
        seconds = expected_seconds(load, topology.chip, self.decoder.head_dim, compiled=compiled)
        low, high = (seconds * factor for factor in RANGE)
        peak = topology.num_chips * topology.chip.flops
        mfu = lambda seconds: work.model_flops / (seconds * peak)
        return {
            "flops": {"model": work.model_flops, "hardware": work.hardware_flops},
            "seconds": dataclasses.asdict(times)
            | {"step": [low, high], "compiler": found.get("compiler_seconds"), "load": dataclasses.asdict(load)},
            "expected": {
                "seconds": seconds,
                "mfu": mfu(seconds),
                "tokens_per_second": work.tokens / seconds,
                "tokens_per_second_per_chip": work.tokens / seconds / topology.num_chips,
            },
            "mfu": [mfu(high), mfu(low)],
            "tokens_per_second": [work.tokens / high, work.tokens / low],
        }

    def phases(self, arguments: StepArguments, memory: dict[str, int], step_seconds: float) -> dict[str, Any]:
        """Return the times of an update's phases with replies of the student; add to `memory` what they need.

        The total becomes that of the larger phase: the train step, or the rollout.
        """
        if self.stage != "grpo" or not isinstance(self.config.grpo.ghosts, StudentReplies):
            return {}
        plan = self.rollouts(arguments)
        counted = needs_teacher(self.config, self.stage)  # it is an argument of the step
        teacher = 0 if counted else plan.teacher_bytes
        if plan.holds_first_self(self.work.reference or self.work.frozen):
            teacher += memory["parameters"]
        stays = memory["parameters"] + memory["optimizer"] + memory["frozen parameters"] + teacher
        layout = plan.layout(memory["frozen parameters"] + teacher)
        names = ("copy", "cache", "temporaries")
        decoding = {name: 0 if plan.on_server else getattr(layout.bytes, name) for name in names}
        memory["live teacher"] = teacher
        memory["total"] = max(memory["total"] + teacher, stays + sum(decoding.values()))
        seconds = {"rollout": plan.rollout_seconds(layout), "ghosts": plan.ghost_seconds(), "train step": step_seconds}
        whole = sum(seconds.values())
        return {
            "phases": {name: {"seconds": time, "share": time / whole} for name, time in seconds.items()},
            "decoding": {"layout": layout.name, "bytes_per_device": decoding, "total": stays + sum(decoding.values())},
            "notes": list(plan.notes()),
        }

    def rollouts(self, arguments: StepArguments) -> RolloutPlan:
        """Return the plan of the rollouts."""
        student, lora = arguments.state.params, self.config.lora
        if lora is not None:
            student = AdaptedParams(arguments.frozen[0], student, lora)
        teachers = tuple(open_folder(path).config for path in teacher_paths(self.config.grpo))
        seq_len, topology = self.config.data.seq_len, self.topology
        return RolloutPlan(self.config.grpo, self.decoder, teachers, seq_len, topology, self.mesh_sizes, student)

    def compiled(self, step: Step, arguments: StepArguments) -> dict[str, Any]:
        """Compile the step for the slice; return memory, collectives and the compiler's estimate."""
        started = time.perf_counter()
        mesh = make_mesh(devices=tpu_devices(self.topology), **self.mesh_sizes)
        try:
            program = compile_step(step, mesh, arguments, self.config.compiler.given("tpu"))
        except jax.errors.JaxRuntimeError as error:
            return {"fits": False, "memory": {"total": needed_bytes(error)}} | seconds_since(started)
        memory: Any = program.memory_analysis()
        text = program.as_text() or ""
        found = collectives(text)
        load = self.compiled_load(text, found, [place_of(device) for device in mesh.devices.flat])
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
            "sent_bytes_between_slices": sum(t.sent * t.times(self.num_tiles) for t in slice_transfers(text)),
            "collectives": self.by_kind(found),
            "tile_loop": self.tile_loop(found),
            "compiler_seconds": load.compute,
            "load": load,
        } | seconds_since(started)

    def compiled_load(self, text: str, found: list[Collective], places: Sequence[Sequence[int]]) -> StepLoad:
        """Return what one device does in a step, from the compiled text.

        Args:
            text: of the program.
            found: its collectives.
            places: of each device of the mesh, the number of its slice and the coordinates of its chip.
        """
        chip, decoder = self.topology.chip, self.decoder
        seen_keys = self.work.seen_keys / max(decoder.num_attention, 1)
        kernels = sum(kernel.flops(seen_keys) for kernel in attention_kernels(text, self.num_tiles))
        network = {True: 0.0, False: 0.0}
        for collective in found:
            sent = collective.sent * self.times(collective)
            network[collective.asynchronous] += collective_seconds(sent, collective.members, places, self.topology)
        for transfer in slice_transfers(text):
            # Those of a loop are sent while its next turn computes.
            sent = transfer.sent * transfer.times(self.num_tiles)
            network[bool(transfer.loops)] += sent / (chip.nic_bandwidth / chip.devices)
        return StepLoad(
            compute=estimated_cycles(text, self.num_tiles) / chip.clock,
            kernels=kernels / (chip.flops / chip.devices),
            waited=network[False],
            hidden=network[True],
        )

    def times(self, collective: Collective) -> int:
        """Return how often a collective runs in a step.

        The compiler may loop over a matrix product's parts, to send while it multiplies.
        Such a loop has one turn per device.
        """
        return collective.times(self.num_tiles if in_tile_loop(collective) else collective.group)

    def by_kind(self, found: list[Collective]) -> dict[str, dict[str, float]]:
        """Return how often each kind of collective runs in a step, and the bytes that a device sends in it."""
        sums: dict[str, dict[str, float]] = {}
        for collective in found:
            own = sums.setdefault(collective.kind, {"times": 0.0, "sent_bytes": 0.0})
            own["times"] += self.times(collective)
            own["sent_bytes"] += collective.sent * self.times(collective)
        return sums

    def tile_loop(self, found: list[Collective]) -> dict[str, Any]:
        """Return the largest array that a collective moves in the loss's loop over tiles, and a tile's size.

        The length of that loop depends on the data.
        """
        inside = [size for c in found if in_tile_loop(c) for size in c.sizes]
        tile = self.tile_size * self.decoder.width * jnp.dtype(self.decoder.dtype).itemsize
        return {"tiles": self.num_tiles, "largest_collective_bytes": max(inside, default=0), "tile_bytes": tile}


def in_tile_loop(collective: Collective) -> bool:
    """Return whether a collective is in the loss's loop over tiles.

    That loop's length depends on the data, unlike that of a loop that the compiler made around a matrix product.
    """
    return None in collective.loops and "shard_map/while" in collective.name


def place_of(device: Any) -> tuple[int, ...]:
    """Return the number of a TPU's slice and the coordinates of its chip."""
    return (getattr(device, "slice_index", 0) or 0, *device.coords)


def versions() -> dict[str, str]:
    """Return the versions of jax and libtpu that made a plan."""
    found = {"jax": jax.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["libtpu"] = importlib.metadata.version("libtpu")
    return found


def seconds_since(started: float) -> dict[str, float]:
    """Return what compiling took."""
    return {"compile_seconds": round(time.perf_counter() - started, 1)}
