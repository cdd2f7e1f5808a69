"""The time to expect of a step: its formula by hand, links along mesh axes, and the network of collectives."""

from __future__ import annotations

import dataclasses

import pytest

from cotgrpo.accelerators.chips import CHIPS, parse_topology
from cotgrpo.accelerators.roofline import Work
from cotgrpo.accelerators.step_estimate import (
    COMPILED_SHARES,
    KERNEL_SHARE,
    LINK_SHARE,
    PEAK_SHARES,
    StepLoad,
    arithmetic_load,
    axis_bandwidth,
    collective_seconds,
    covered_sides,
    expected_seconds,
)
from cotgrpo.models.config import DecoderConfig

V5P, V6E, H100 = CHIPS["v5p"], CHIPS["v6e"], CHIPS["h100"]


def test_a_compiled_step_is_compute_kernels_and_what_is_not_hidden() -> None:
    load = StepLoad(compute=2.0, kernels=0.1, waited=0.3, hidden=1.0)
    busy = 2 / COMPILED_SHARES["v5p"] + 0.1 / KERNEL_SHARE
    assert expected_seconds(load, V5P, 128, compiled=True) == pytest.approx(busy + 0.3 / LINK_SHARE)
    more = dataclasses.replace(load, hidden=5.0)  # more than there is to compute
    assert expected_seconds(more, V5P, 128, compiled=True) == pytest.approx((5.0 + 0.3) / LINK_SHARE)


def test_without_a_compiler_it_is_a_share_of_the_peak_and_at_least_the_memory() -> None:
    load = StepLoad(compute=1.0)
    assert expected_seconds(load, V5P, 128, compiled=False) == pytest.approx(1 / PEAK_SHARES["v5p"])
    assert expected_seconds(load, H100, 128, compiled=False) == pytest.approx(1 / PEAK_SHARES["gpu"])
    assert expected_seconds(dataclasses.replace(load, memory=9.0), H100, 128, compiled=False) == 9.0


def test_a_narrow_head_leaves_part_of_the_matrix_unit_idle() -> None:
    load = StepLoad(compute=0.0, kernels=1.0)
    wide, narrow = (expected_seconds(load, V6E, head_dim, compiled=True) for head_dim in (256, 64))
    assert (wide, narrow) == (pytest.approx(1 / KERNEL_SHARE), pytest.approx(4 / KERNEL_SHARE))


@pytest.mark.parametrize(
    ("topology", "mesh", "axis", "bandwidth"),
    [
        ("v5p:4x4x4", {"fsdp": 64}, "fsdp", 600e9),  # three rings: all six links
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "tensor", 200e9),  # one ring
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "fsdp", 400e9),  # two rings
        ("v5p:2x2x4", {"fsdp": 16}, "fsdp", 300e9),  # three lines
        ("v5e:2x4", {"fsdp": 4, "tensor": 2}, "tensor", 50e9),  # an axis of two
        ("v5e:16x16", {"fsdp": 256}, "fsdp", 200e9),
        ("tpu7x:4x4x4", {"fsdp": 128}, "fsdp", 300e9),  # half a chip's links for each of its devices
        ("h100:8", {"fsdp": 8}, "fsdp", 450e9),
        ("h100:16", {"data": 2, "fsdp": 8}, "fsdp", 450e9),  # within a node
        ("h100:16", {"data": 2, "fsdp": 8}, "data", 50e9),  # one card of each GPU
        ("h100:16", {"fsdp": 16}, "fsdp", 400e9),  # a ring enters a node through eight cards
        ("2xv5e:4x4", {"data": 2, "fsdp": 16}, "data", 3.125e9),  # one slice to the other
        ("2xv5e:4x4", {"data": 2, "fsdp": 16}, "fsdp", 100e9),
    ],
)
def test_bandwidth_of_a_mesh_axis(topology: str, mesh: dict[str, int], axis: str, bandwidth: float) -> None:
    whole = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh
    assert axis_bandwidth(parse_topology(topology), whole, axis) == pytest.approx(bandwidth)


def test_sides_that_an_axis_covers() -> None:
    assert covered_sides((4, 4, 4), 1, 64) == (4, 4, 4)
    assert covered_sides((4, 4, 4), 4, 16) == (4, 4, 1)
    assert covered_sides((2, 4), 2, 4) == (2, 2)


GRID = [(0, x, y, 0) for x in range(4) for y in range(4)]
"""Slice and coordinates of the devices of a v5e:4x4."""


@pytest.mark.parametrize(
    ("members", "links"),
    [(range(16), 2), ((0, 1, 2, 3), 1), ((0, 4, 8, 12), 1), ((0, 1), 1), ((0, 1, 4, 5), 2), ((), 1)],
    ids=["all", "a side", "the other side", "two", "a square", "a permute"],
)
def test_time_of_a_collective_by_the_links_of_its_group(members: tuple[int, ...], links: int) -> None:
    seconds = collective_seconds(1e9, tuple(members), GRID, parse_topology("v5e:4x4"))
    assert seconds == pytest.approx(1e9 / (links * 50e9))


def test_a_ring_has_two_links() -> None:
    ring = [(0, x, y, 0) for x in range(16) for y in range(16)]
    slice_ = parse_topology("v5e:16x16")
    assert collective_seconds(1e9, range(16), ring, slice_) == pytest.approx(1e9 / 100e9)
    assert collective_seconds(1e9, range(256), ring, slice_) == pytest.approx(1e9 / 200e9)


def test_devices_of_one_chip_share_its_memory() -> None:
    places = [(0, 0, 0, 0), (0, 0, 0, 0)]
    assert collective_seconds(1e9, (0, 1), places, parse_topology("tpu7x:2x2x1")) == pytest.approx(1e9 / 7380e9)


def test_between_slices_each_chip_sends_its_part_through_its_card() -> None:
    places = [(number, *place[1:]) for number in (0, 1) for place in GRID]
    two = parse_topology("2xv5e:4x4")
    assert collective_seconds(1e9, (0, 16), places, two) == pytest.approx(1e9 / 3.125e9)
    both = collective_seconds(1e9, range(32), places, two)
    assert both == pytest.approx(1e9 / 100e9 + 1e9 / (16 * 3.125e9))


def test_the_load_by_arithmetic_is_the_roofline_s() -> None:
    """Matrix products and kernels over the peak of all chips; gradients over `data` are waited for."""
    decoder = DecoderConfig(128, 64, 2, 4, 2, 16, 128, attention="splash", remat="full")
    work, topology = Work(decoder, tokens=4096, seq_len=64), parse_topology("2xv5e:2x4")
    mesh = {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}
    load, peak = arithmetic_load(work, topology, 1e6, mesh), 16 * 197e12
    assert load.kernels == pytest.approx(4096 * 11 * work.score_flops / peak)
    assert load.compute + load.kernels == pytest.approx(work.hardware_flops / peak)
    sent = work.sent_by_axis(mesh)
    assert sum(sent.values()) == pytest.approx(work.sent_bytes(mesh))
    assert load.waited == pytest.approx(sent["data"] / 3.125e9)
    assert load.hidden == pytest.approx(sent["fsdp"] / 100e9)
