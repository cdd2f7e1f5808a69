"""`cotgrpo plan`: memory by arithmetic and real arrays, operations by hand, and programs compiled for TPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.accelerators.chips import CHIPS, TopologyError, parse_topology
from cotgrpo.accelerators.roofline import Work, step_time
from cotgrpo.cli import main
from cotgrpo.config import (
    Config,
    ConfigError,
    DataConfig,
    GrpoConfig,
    LoraConfig,
    OptimizerConfig,
    PrivilegedSelf,
    StudentConfig,
    TokenizerConfig,
    VerifiedReward,
)
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.lora import init_lora
from cotgrpo.objectives import ForwardKl, GroupRelative
from cotgrpo.planning.hlo import estimated_cycles
from cotgrpo.planning.search import candidates
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.planning.tpu_compile import compile_step, needed_bytes, no_compilation_cache, tpu_devices
from cotgrpo.sharding import batch_sharding, make_mesh, mesh_shape, state_sharding
from cotgrpo.training.steps import stage_optimizer
from cotgrpo.types import TrainState
from cotgrpo.xla_cpu import vocab_sum

ROOT = Path(__file__).parents[2]
TINY = Config(
    student=StudentConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64),
    tokenizer=TokenizerConfig(vocab_size=64),
    data=DataConfig(seq_len=16),
    grpo=GrpoConfig(batch_size=8, optimizer=OptimizerConfig(weight_decay=0.1)),
)
GPUS = parse_topology("h100:8")
COMPARISON = {"objective": GroupRelative(), "ghosts": VerifiedReward()}
DISTRIBUTION = {"objective": ForwardKl(top_k=5), "ghosts": PrivilegedSelf()}
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def llama(topology: str, **student: Any) -> StagePlan:
    settings = StudentConfig(path=str(ROOT / "configs" / "models" / "llama-3-8b"), dtype="bfloat16", **student)
    config = Config(student=settings, data=DataConfig(seq_len=2048), grpo=GrpoConfig(batch_size=64))
    return StagePlan(config, "grpo", parse_topology(topology), {"fsdp": -1})


@pytest.mark.parametrize(
    ("topology", "chips", "devices"), [("v5p:4x4x4", 64, 64), ("tpu7x:2x2x1", 4, 8), ("h100:8", 8, 8)]
)
def test_topologies_by_name(topology: str, chips: int, devices: int) -> None:
    found = parse_topology(topology)
    assert (found.num_chips, found.num_devices) == (chips, devices)
    assert found.hbm_bytes * devices == found.chip.hbm_bytes * chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", "unknown chip 'v5x'; there are v4, v5e"),
        ("v5p:64", "expected the sides of a slice, as in v5p:4x4x4"),
        ("v5e:0x4", "expected the sides of a slice"),
        ("h100:2x4", "expected a number of GPUs, as in h100:8"),
    ],
)
def test_an_unknown_topology_is_an_error(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(("topology", "devices"), [("v5p:4x4x4", 64), ("v5e:4x4", 16)])
@pytest.mark.parametrize(("param_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_llama_3_8b_are_the_arithmetic(topology: str, devices: int, param_dtype: str, size: int) -> None:
    """Its 8,030,261,248 parameters: all over fsdp but the norms' scales, which are whole on every device."""
    plan = llama(topology, param_dtype=param_dtype)
    found = plan.argument_bytes(plan.step()[1])
    scales = 32 * 2 * 4096 + 4096
    expected = size * ((8_030_261_248 - scales) // devices + scales)
    assert plan.decoder.num_params() == 8_030_261_248
    assert found["parameters"] == expected
    counters = found["optimizer"] - 2 * expected  # AdamW's two moments, and a few scalars
    assert 0 < counters < 64
    assert found["batch"] == 64 // devices * 2048 * 5 * 4


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"grpo": COMPARISON | {"optimizer": OptimizerConfig("adafactor")}}),
        ({"fsdp": 4, "context": 2}, {"grpo": DISTRIBUTION | {"reference_kl": 0.1}, "lora": LoraConfig(rank=4)}),
        ({"fsdp": 8}, {"grpo": {"reward_weight": 0.5, "ghosts": PrivilegedSelf(num_generations=2, self="ema")}}),
    ],
    ids=[
        "group_relative and adafactor",
        "the ghost's distribution, LoRA and a reference",
        "a reward and a ghost whose parameters are an average",
    ],
)
def test_argument_bytes_are_those_of_real_arrays(mesh: dict[str, int], changes: dict[str, Any]) -> None:
    """On eight devices: the plan, the compiled program and the arrays of a real start."""
    grpo = dataclasses.replace(TINY.grpo, **changes.get("grpo", {}))
    config = dataclasses.replace(TINY, grpo=grpo, lora=changes.get("lora", TINY.lora))
    plan = StagePlan(config, "grpo", GPUS, mesh)
    step, arguments = plan.step()
    real_mesh = make_mesh(**mesh)
    expected = plan.argument_bytes(arguments)
    assert expected == arguments.bytes_on(real_mesh)
    program = compile_step(step, real_mesh, arguments)

    tx, lora, key = stage_optimizer(config, "grpo"), config.lora, jax.random.key(0)
    params = init_params(plan.decoder, key)
    trained = params if lora is None else init_lora(params, lora, key)
    state = TrainState.create(params=trained, tx=tx, key=key)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments.batch)
    trees = (state.params, state.opt_state, (params,) * len(arguments.frozen), batch, (state.step, state.key))
    places = (*(state_sharding(tree, real_mesh) for tree in trees[:3]), batch_sharding(real_mesh))
    placed = (*map(jax.device_put, trees[:4], places), jax.tree.map(lambda x: x, trees[4]))
    on_first = [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) for tree in placed[:4]]
    assert on_first == [expected[kind] for kind in ("parameters", "optimizer", "frozen parameters", "batch")]
    step_and_key = 4 + 8
    # A reference that is LoRA's own base is the same argument twice. A program leaves out what it does not read, such
    # as a few scalars, and with some versions of JAX the ghost tokens of an objective without ghosts.
    unread = [0]
    if isinstance(grpo.objective, GroupRelative):
        unread.append(placed[3].ghost_tokens.addressable_shards[0].data.nbytes)
    difference = sum(on_first) + step_and_key - program.memory_analysis().argument_size_in_bytes
    assert any(0 <= difference - size < 64 for size in unread), difference


def test_operations_by_hand() -> None:
    shape = DecoderConfig(
        vocab_size=10, width=4, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=2, mlp_width=8, remat="full",
        attention="splash", window=4, local_layers=(0,), dtype="bfloat16",
    )  # fmt: skip
    work = Work(shape, tokens=32, seq_len=16)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8
    keys = 2 * 8 + (4 - 4 * 4 / 32)  # two layers see half the sequence; the window's ramp costs 16 / 32
    assert work.layer_weights == 3 * layer
    assert work.seen_keys == keys
    scores = 2 * 2 * 2 * keys
    assert work.model_flops == 32 * (6 * 3 * layer + 6 * scores + 6 * 4 * 10)
    assert work.hardware_flops == 32 * (8 * 3 * layer + 11 * scores + 6 * 4 * 10)
    assert dataclasses.replace(work, supervised=0.25).model_flops == work.model_flops - 32 * 0.75 * 6 * 40
    frozen = dataclasses.replace(work, frozen=True)
    assert frozen.model_flops == 32 * (4 * 3 * layer + 6 * scores + 4 * 40)
    plain = Work(dataclasses.replace(shape, attention="xla", remat="none"), tokens=32, seq_len=16)
    assert plain.hardware_flops == 32 * (6 * 3 * layer + 6 * 2 * 2 * 2 * 3 * 16 + 6 * 40)  # all keys of all layers
    blocks = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, attention="blocks"))
    kept = dataclasses.replace(work, decoder=dataclasses.replace(shape, remat="dots"))
    # The scores again, twice, and no other product.
    assert kept.hardware_flops == 32 * (6 * 3 * layer + 9 * scores + 6 * 40)
    # Eight lengths of keys, 9 / 16 of all scores, and one product more: the scores again.
    assert blocks.hardware_flops == 32 * (6 * 3 * layer + 7 * 2 * 2 * 2 * 3 * 16 * 9 / 16 + 6 * 40)


def test_the_roofline_is_the_slowest_of_three() -> None:
    work = Work(DecoderConfig(128, 64, 2, 4, 2, 16, 128), tokens=4096, seq_len=64)
    mesh = mesh_shape({"fsdp": -1}, 8)
    times = step_time(work, GPUS, state_bytes=1e9, sent_bytes=9e9, mesh=mesh)
    assert times.network == pytest.approx(9e9 / 450e9)
    assert times.compute == pytest.approx(work.hardware_flops / (8 * 989e12))
    assert times.memory > 2e9 / 3350e9
    assert times.overlapped == times.network
    assert times.in_turn == pytest.approx(times.network + times.compute + times.memory)
    two_nodes = step_time(work, parse_topology("h100:16"), 1e9, 9e9, mesh_shape({"fsdp": -1}, 16))
    assert two_nodes.network == pytest.approx(9e9 / 50e9)


def test_meshes_and_batches_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"mesh on h100:8: The mesh .* asks for 3 devices, but there are 8"):
        StagePlan(TINY, "grpo", GPUS, {"fsdp": 3})
    with pytest.raises(ConfigError, match=r"tensor=4 does not divide the model's num_kv_heads, 2"):
        StagePlan(TINY, "grpo", GPUS, {"data": 2, "tensor": 4})
    odd = dataclasses.replace(TINY, grpo=GrpoConfig(batch_size=12))
    with pytest.raises(ConfigError, match=r"batch of 12 cannot fill evenly: expected a multiple of 8"):
        StagePlan(odd, "grpo", GPUS)


def test_a_search_yields_what_divides() -> None:
    found = list(candidates(StagePlan(TINY, "grpo", GPUS)))
    seen = {(tuple(way.mesh_sizes.items()), way.decoder.remat, way.settings.micro_batches) for way in found}
    assert len(seen) == len(found) > 20
    for way in found:
        sizes = way.mesh_sizes
        assert np.prod(list(sizes.values())) == 8
        assert sizes["tensor"] in (1, 2)  # two key/value heads
        assert 8 % (sizes["data"] * sizes["fsdp"] * way.settings.micro_batches) == 0


def test_the_command_plans_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    student = ["--student.path", str(ROOT / "configs" / "models" / "llama-3-8b"), "--student.remat", "full"]
    rest = [
        "--student.dtype",
        "bfloat16",
        "--topology",
        "h100:8",
        "--mesh.fsdp",
        "8",
        "--mesh.data",
        "1",
        "--out",
        str(out),
    ]
    assert main(["plan", *student, *rest]) == 0
    figures = json.loads(out.read_text())
    assert figures["estimate"] and figures["fits"]
    memory = figures["bytes_per_device"]
    assert memory["total"] == sum(memory[kind] for kind in memory if kind not in ("total", "hbm"))
    low, high = figures["mfu"]
    assert 0 < low < high <= figures["flops"]["model"] / figures["flops"]["hardware"]
    assert "estimate by arithmetic" in out.with_suffix(".txt").read_text()
    assert main(["plan", *student, *rest, "--sft.batch_size", "8", "--stage", "sft", "--search"]) == 0
    ranked = json.loads(out.read_text())["search"]
    middles = [sum(way["seconds"]["step"]) for way in ranked if way["fits"]]
    assert middles == sorted(middles) and len(middles) > 1
    capsys.readouterr()
    assert main(["plan", *student]) == 2
    assert "plan needs --topology" in capsys.readouterr().err


def test_without_libtpu_the_message_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find_spec(name, *a))
    assert main(["plan", "--topology", "v5e:4x4"]) == 2
    assert "Install cotgrpo's `tpu` extra: pip install 'cotgrpo[tpu]'" in capsys.readouterr().err


PROGRAM = """HloModule step

%body (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %attention = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="kernel"}
  ROOT %double = f32[8] add(%x, %x), backend_config={"window_config":{"estimated_cycles":"10"}}
}

%condition (x: f32[8]) -> pred[] {
  %x.1 = f32[8] parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.2 = f32[8] parameter(0)
  %scan = f32[8] while(%x.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %walk = f32[8] while(%scan), condition=%condition, body=%body
  %kernel = f32[8] fusion(%walk), kind=kCustom, calls=%body, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %last = f32[8] add(%kernel, %kernel), backend_config={"estimated_cycles":"5"}
}
"""


def test_cycles_count_as_often_as_they_run() -> None:
    assert estimated_cycles(PROGRAM, unknown=3) == 7 * 10 + 3 * 10 + 5


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "Ran out of memory in memory space hbm. Used 33.50G of 15.75G hbm. Exceeded hbm capacity by 17.75G.",
            33.5 * 2**30,
        ),
        (
            "the total memory required for HLO temporaries (116.50G) exceeds available HBM (15.75G).",
            116.5 * 2**30,
        ),
    ],
)
def test_the_memory_that_was_missing_is_read_from_the_message(message: str, size: float) -> None:
    assert needed_bytes(RuntimeError(f"RESOURCE_EXHAUSTED: {message}")) == size
    with pytest.raises(RuntimeError, match="another"):
        needed_bytes(RuntimeError("another"))


def test_every_chip_names_its_source() -> None:
    for chip in CHIPS.values():
        assert chip.source and chip.flops > 1e14 and chip.hbm_bandwidth > chip.network_bandwidth > chip.nic_bandwidth


@needs_libtpu
@pytest.mark.slow
def test_a_step_compiles_for_a_tpu_slice() -> None:
    """With the attention kernel, a tensor axis and micro-batches."""
    student = dataclasses.replace(TINY.student, head_dim=16, dtype="bfloat16", remat="full")
    grpo = dataclasses.replace(TINY.grpo, micro_batches=2)
    config = dataclasses.replace(TINY, student=student, grpo=grpo, data=DataConfig(seq_len=256))
    plan = StagePlan(config, "grpo", parse_topology("v5e:2x2"), {"fsdp": 2, "tensor": 2})
    assert plan.decoder.attention == "splash"
    figures = plan.figures()
    assert figures["fits"] and not figures["estimate"]
    assert figures["seconds"]["compiler"] > 0
    assert figures["collectives"]
    assert 0 < figures["tile_loop"]["largest_collective_bytes"] <= figures["tile_loop"]["tile_bytes"]
    planned = sum(plan.argument_bytes(plan.step()[1]).values())
    # The compiler pads small arrays to tiles of 8 x 128.
    assert planned <= figures["argument_bytes"] < 4 * planned + 2**20


@needs_libtpu
def test_a_total_is_a_plain_sum_on_a_tpu() -> None:
    """The program of `jnp.sum`, though the function holds another for CPUs."""
    device = jax.sharding.SingleDeviceSharding(tpu_devices(parse_topology("v5e:2x2"))[0])
    x_NV = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=device)

    def operations(sum_of: Any) -> list[str]:
        program = jax.jit(jax.vmap(lambda x_V: sum_of(jnp.exp(x_V) * x_V)), out_shardings=device)
        with no_compilation_cache():
            text = program.trace(x_NV).lower(lowering_platforms=("tpu",)).compile().as_text()
        return re.findall(r"\} ([a-z-]+)\(", text)

    assert "fusion" in operations(jnp.sum)
    assert operations(vocab_sum) == operations(jnp.sum)


@needs_libtpu
@pytest.mark.slow
def test_layers_inputs_in_the_hosts_memory_are_not_on_the_chip() -> None:
    """As `full`, less the residual stream at each of twelve layers: the tokens of a chip times D, in bfloat16."""
    temporaries = {}
    for remat in ("full", "offload"):
        student = dataclasses.replace(TINY.student, width=512, num_layers=12, dtype="bfloat16", remat=remat)
        grpo = dataclasses.replace(TINY.grpo, batch_size=64)
        config = dataclasses.replace(TINY, student=student, grpo=grpo, data=DataConfig(seq_len=2048))
        figures = StagePlan(config, "grpo", parse_topology("v5e:2x2"), {"fsdp": 2, "tensor": 2}).figures()
        temporaries[remat] = figures["bytes_per_device"]["temporaries"]
    stream = 12 * (64 * 2048 // 2) * 512 * 2
    assert temporaries["full"] - temporaries["offload"] > 0.7 * stream


@needs_libtpu
def test_what_does_not_fit_a_tpu_is_said() -> None:
    config = dataclasses.replace(TINY, student=StudentConfig(width=16_384, num_layers=2, mlp_width=65_536))
    figures = StagePlan(config, "grpo", parse_topology("v5e:2x2"), {"data": 4}).figures()
    assert not figures["fits"]
    assert figures["bytes_per_device"]["total"] > figures["bytes_per_device"]["hbm"]
