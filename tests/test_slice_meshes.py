"""Meshes of several slices of TPUs and several nodes of GPUs, of devices that this machine does not have."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

import cotgrpo
from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.config import Config, ConfigError, MeshConfig
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.objectives import Nll
from cotgrpo.planning.hlo import collectives
from cotgrpo.planning.slice_transfers import slice_transfers
from cotgrpo.planning.step_arguments import StepArguments, abstract_batch
from cotgrpo.planning.tpu_compile import compile_step, tpu_devices
from cotgrpo.sharding import AXES, make_mesh, mesh_shape
from cotgrpo.training.mesh import run_mesh
from cotgrpo.types import TrainState

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@dataclasses.dataclass(frozen=True, eq=False)  # a mesh is compared with others that JAX has made
class Device:
    """What a mesh is made of, for the checks of signatures a `jax.Device`."""

    id: int
    platform: str
    device_kind: str
    slice_index: int
    process_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return jax.Device


def tpus(sides: tuple[int, int, int], slices: int = 1, kind: str = "TPU v5 lite") -> list[Any]:
    """The chips of each slice, four a host."""
    numbered = itertools.product(range(slices), itertools.product(*map(range, reversed(sides))))
    return [
        Device(100000 * (1 + number) + i, "tpu", kind, number, i // 4, place[::-1])
        for i, (number, place) in enumerate(numbered)
    ]


def gpus(nodes: int, a_node: int = 8) -> list[Any]:
    """One process a GPU. JAX numbers the nodes as slices."""
    return [Device(i, "gpu", "NVIDIA H100", i // a_node, i) for i in range(nodes * a_node)]


def slices_along(mesh: jax.sharding.Mesh, axis: str) -> set[tuple[int, ...]]:
    """The slices that devices along an axis are in, for every line of devices along it."""
    lines = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return {tuple(device.slice_index for device in line) for line in lines}


@pytest.mark.parametrize(
    ("sides", "slices", "sizes", "shape"),
    [
        ((2, 4, 1), 2, {"data": 2, "fsdp": 8}, (2, 8, 1, 1)),
        ((2, 4, 1), 2, {"data": -1, "fsdp": 8}, (2, 8, 1, 1)),
        ((2, 4, 1), 2, {"data": 2, "fsdp": -1}, (2, 8, 1, 1)),
        ((2, 4, 1), 2, {"data": 4, "fsdp": 2, "tensor": 2}, (4, 2, 2, 1)),
        ((2, 4, 1), 2, {"data": -1}, (16, 1, 1, 1)),
        ((2, 2, 1), 4, {"data": 4, "tensor": 2, "context": 2}, (4, 1, 2, 2)),
        ((2, 2, 1), 3, {"data": 3, "fsdp": 4}, (3, 4, 1, 1)),
        ((1, 1, 1), 2, {"data": 2}, (2, 1, 1, 1)),
        ((4, 4, 1), 2, {"data": 2, "fsdp": 2, "tensor": 8}, (2, 2, 8, 1)),  # two axes share a side of the torus
    ],
)
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_data_lies_over_the_slices(
    sides: tuple[int, int, int],
    slices: int,
    sizes: dict[str, int],
    shape: tuple[int, ...],
    kind: str,
    shuffled: bool,
) -> None:
    devices = tpus(sides, slices, kind)
    given = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))] if shuffled else devices
    mesh = make_mesh(devices=given, **sizes)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    for axis in AXES[1:]:
        assert all(len(set(line)) == 1 for line in slices_along(mesh, axis)), f"{axis} leaves a slice"
    in_one = shape[0] // slices
    assert slices_along(mesh, "data") == {tuple(number for number in range(slices) for _ in range(in_one))}


def test_each_slice_is_laid_out_as_one_alone() -> None:
    """So links within a slice are used as well as on one slice."""
    one, two = tpus((2, 4, 1)), tpus((2, 4, 1), 2)
    alone = make_mesh(devices=one, data=1, fsdp=4, tensor=2).devices
    both = make_mesh(devices=two, data=2, fsdp=4, tensor=2).devices
    for number in range(2):
        places = [device.coords for device in both[number].flat]
        assert places == [device.coords for device in alone.flat]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 16}, r"data=1 on 2 slices of 8 devices. The axis data .* expected data to be a multiple of 2,"),
        ({"data": 1, "fsdp": -1}, "expected data to be a multiple of 2"),
        ({"data": -1, "fsdp": 16}, "expected data to be a multiple of 2"),
        ({"tensor": 16}, "expected data to be a multiple of 2"),
        ({"data": -1, "context": 16}, "expected data to be a multiple of 2"),
        ({"data": 2, "fsdp": 4}, "asks for 8 devices, but there are 16"),
        ({"data": 3, "fsdp": -1}, "asks for a multiple of 3 devices, but there are 16"),
        ({"slices": 2, "data": 8}, "Unknown mesh axis 'slices'"),
    ],
)
def test_sizes_that_do_not_fit_the_slices(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        make_mesh(devices=tpus((2, 4, 1), 2), **sizes)
    assert "\n" not in str(found.value)


def test_three_slices_and_an_even_number() -> None:
    with pytest.raises(ValueError, match=r"data=4 on 3 slices of 4 devices.* a multiple of 3"):
        make_mesh(devices=tpus((2, 2, 1), 3), data=4, fsdp=-1)
    assert mesh_shape({"data": 3, "fsdp": -1}, 12, 3)["fsdp"] == 4


def test_slices_of_different_sizes() -> None:
    devices = [*tpus((2, 4, 1), 2), *(d for d in tpus((2, 2, 1), 3) if d.slice_index == 2)]
    with pytest.raises(ValueError, match=r"same number of devices, got \[8, 8, 4\]: start the run on slices of one"):
        make_mesh(devices=devices, data=-1)


def test_one_slice_of_two_needs_no_axis_over_slices() -> None:
    second = [device for device in tpus((2, 4, 1), 2) if device.slice_index == 1]
    assert make_mesh(devices=second, fsdp=8).devices.shape == (1, 8, 1, 1)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8, "tensor": 2}, {"fsdp": 2, "tensor": 8}, {"fsdp": 4, "context": 4}])
def test_axes_may_share_a_side_of_the_torus(kind: str, sizes: dict[str, int]) -> None:
    mesh = make_mesh(devices=tpus((4, 4, 1), kind=kind), **sizes)
    assert len({device.id for device in mesh.devices.flat}) == 16 == math.prod(sizes.values())


@pytest.mark.parametrize(
    ("nodes", "sizes", "lines"),
    [
        (1, {"fsdp": 8}, {"fsdp": {(0,) * 8}}),
        # A node's GPUs stay together along the inner axes. The outermost is over nodes, whichever it is.
        (2, {"data": 2, "fsdp": 8}, {"data": {(0, 1)}, "fsdp": {(0,) * 8, (1,) * 8}}),
        (2, {"fsdp": 16}, {"fsdp": {(0,) * 8 + (1,) * 8}}),
        (2, {"fsdp": 4, "tensor": 4}, {"fsdp": {(0, 0, 1, 1)}, "tensor": {(0,) * 4, (1,) * 4}}),
        (3, {"data": -1, "tensor": 8}, {"data": {(0, 1, 2)}, "tensor": {(0,) * 8, (1,) * 8, (2,) * 8}}),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_nodes_of_gpus(
    nodes: int, sizes: dict[str, int], lines: dict[str, set[tuple[int, ...]]], shuffled: bool
) -> None:
    """JAX's own make_mesh refuses more than one node."""
    devices = gpus(nodes)
    if shuffled and nodes > 1:
        devices = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    mesh = make_mesh(devices=devices, **sizes)
    assert {axis: slices_along(mesh, axis) for axis in lines} == lines


@pytest.mark.parametrize(
    ("devices", "mesh", "message"),
    [
        (tpus((2, 4, 1), 2), MeshConfig(data=1, fsdp=-1), r"^mesh: .*expected data to be a multiple of 2"),
        (tpus((2, 4, 1), 2), MeshConfig(data=2, fsdp=-1), None),
        (gpus(2), MeshConfig(data=1, fsdp=-1), None),
    ],
)
def test_the_mesh_of_a_run(
    devices: list[Any], mesh: MeshConfig, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.default_device(None), monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: devices)
        patched.setattr(jax, "device_count", lambda: len(devices))
        if message is None:
            made = run_mesh(Config(mesh=mesh))
            assert made is not None and made.devices.size == len(devices)
        else:
            with pytest.raises(ConfigError, match=message):
                run_mesh(Config(mesh=mesh))


SMALL = DecoderConfig(
    vocab_size=512, width=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64, mlp_width=256, tied_head=False
)


def compiled_for(topology: str, sizes: dict[str, int]) -> str:
    """The text of an SFT step with AdamW, compiled for slices of TPUs."""
    mesh = make_mesh(devices=tpu_devices(parse_topology(topology)), **sizes)
    tx = optax.adamw(1e-3)
    params = jax.eval_shape(functools.partial(init_params, SMALL), jax.random.key(0))
    state = jax.eval_shape(lambda params: TrainState.create(params=params, tx=tx, key=0), params)
    batch = abstract_batch(Nll(), 16, 128, SMALL.width)
    step = cotgrpo.make_sft_step(make_student(SMALL), tx)
    return compile_step(step, mesh, StepArguments(state, batch, ())).as_text() or ""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 8}, {"data": 4, "fsdp": 2, "tensor": 2}], ids=["data-fsdp", "data-fsdp-tensor"]
)
def test_only_sums_of_gradients_cross_slices(sizes: dict[str, int]) -> None:
    """Each device sends its own share of the gradients, reduced within the slice before; no weights or activations."""
    text = compiled_for("2xv5e:2x4", sizes)
    crossing = slice_transfers(text)
    assert {(transfer.kind, transfer.slices) for transfer in crossing} == {("all-reduce", 2)}
    share = SMALL.num_params() * 4 / 8  # of a slice's eight devices
    sent = sum(transfer.bytes * transfer.times() for transfer in crossing)
    # A pipelined loop over two layers may send one of them twice. Gradients of layers may be in bfloat16. What is small
    # is padded. All weights, or the gradients of a device without reduction in its slice, would be 8 times as much.
    assert share / 2 <= sent <= 2 * share
    assert max(collective.group for collective in collectives(text)) <= 8, "all else stays in a slice"
    assert not slice_transfers(compiled_for("v5e:2x4", {"fsdp": 8}))
