"""Chips and topologies by name: the forms in which Google and data sheets write them, and links of a slice."""

from __future__ import annotations

import pytest

from cotgrpo.accelerators.chips import CHIPS, TopologyError, parse_topology, standard_slices


@pytest.mark.parametrize(
    ("name", "canonical", "chips", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
        ("v5p-32", "v5p:2x2x4", 16, 16),  # TensorCores, two a chip
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-1024", "v5p:8x8x8", 512, 512),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v4-384", "v4:4x4x12", 192, 192),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-8", "v5e:2x4", 8, 8),  # chips
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("V6E-8", "v6e:2x4", 8, 8),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128),  # a chip of two devices
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8),
        ("v5p-2x2x4", "v5p:2x2x4", 16, 16),
        ("2xv5e:4x4", "2xv5e:4x4", 32, 32),  # slices
        ("4xV5P-32", "4xv5p:2x2x4", 64, 64),
        ("2xtpu7x:2x2x1", "2xtpu7x:2x2x1", 8, 16),
        ("1xv5e-8", "v5e:2x4", 8, 8),
        ("h100:8", "h100:8", 8, 8),
        ("b200-16", "b200:16", 16, 16),
        ("mi300x:8", "mi300x:8", 8, 8),
    ],
)
def test_names(name: str, canonical: str, chips: int, devices: int) -> None:
    found = parse_topology(name)
    assert (found.name, found.num_chips, found.num_devices) == (canonical, chips, devices)
    assert found.hbm_bytes * devices == found.chip.hbm_bytes * chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "",
            "unknown chip ''; there are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200, gb200, mi300x, l4, rtx4090.",
        ),
        ("v5x:4x4", "unknown chip 'v5x'; there are v4, .* Did you mean v5"),
        ("v5p", "expected the sides of a slice, as in v5p:4x4x4 or v5p-128"),
        ("v5p:64", "expected the sides of a slice, as in v5p:4x4x4 or v5p-128"),
        ("v5e:0x4", "expected the sides of a slice, as in v5e:4x4 or v5e-16"),
        ("v5e:-2x4", "expected the sides of a slice"),
        ("v5e:2x2x2", "expected 2 sides for v5e"),
        ("v5p:4x4", "expected 3 sides for v5p"),
        ("v5p-100", r"no slice of this size \(in TensorCores, two a chip\). Near it are .*v5p-64, v5p-128"),
        ("v5e-9", r"no slice of this size \(in chips\). Near it are .*v5e-8, v5e-16"),
        ("h100:2x4", "expected a number of GPUs, as in h100:8"),
        ("b200:0", "expected a number of GPUs, as in b200:8"),
        ("h100", "expected a number of GPUs"),
        ("0xv5e-8", "expected a number of slices, as in 2xv5e:4x4"),
        ("2xv5e", "expected the sides of a slice"),
        ("2xh100:8", "expected all GPUs together, as in h100:16"),
    ],
)
def test_a_wrong_name_is_one_line_that_lists_what_is_known(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message) as found:
        parse_topology(name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "spans", "links"),
    [
        ("v5e:2x4", (2, 4), 2),  # two lines
        ("v5e:2x4", (1, 4), 1),
        ("v5e:2x4", (2, 1), 1),  # an axis of two has one link
        ("v5e:4x4", (4, 4), 2),  # too short to wrap around
        ("v5e:16x16", (16, 16), 4),
        ("v5e:8x16", (8, 16), 3),  # one side wraps around
        ("v5e:16x16", (4, 1), 1),  # a part of a ring is a line
        ("v5p:4x4x4", (4, 4, 4), 6),
        ("v5p:4x4x4", (1, 1, 4), 2),
        ("v5p:2x2x4", (2, 2, 4), 3),  # no whole cube, no ring
        ("v5p:2x2x4", (1, 1, 1), 0),
    ],
)
def test_links_of_a_group(name: str, spans: tuple[int, ...], links: int) -> None:
    assert parse_topology(name).links(spans) == links


def test_every_chip_is_whole() -> None:
    for chip in CHIPS.values():
        assert chip.source and chip.flops > 1e14 and chip.hbm_bandwidth > chip.network_bandwidth > chip.nic_bandwidth
        if chip.platform == "tpu":
            assert chip.clock > 1e9 and chip.wrap and chip.sides in (2, 3)
            sizes = [slice_ for slice_ in standard_slices(chip)]
            assert all(len(sides) == chip.sides for sides in sizes)
        else:
            assert chip.node and chip.nic_bandwidth and chip.clock == 0


@pytest.mark.parametrize(("name", "per_cycle"), [("v4", 2**18), ("v5e", 2**17), ("v5p", 2**18), ("v6e", 2**19)])
def test_clocks_are_the_peak_over_what_the_matrix_units_do_in_a_cycle(name: str, per_cycle: int) -> None:
    chip = CHIPS[name]
    assert chip.clock * per_cycle == pytest.approx(chip.flops, rel=0.01)


def test_several_slices() -> None:
    two = parse_topology("2xv5e-16")
    assert (two.slices, two.slice_name, two.sides) == (2, "v5e:4x4", (4, 4))
    assert parse_topology("v5e-16").slices == 1
    for chip in CHIPS.values():
        assert 0 < chip.nic_bandwidth < chip.network_bandwidth, "other slices and nodes are farther than neighbours"
