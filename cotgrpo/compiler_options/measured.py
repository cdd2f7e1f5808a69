"""XLA's options that a train step is compiled with, each with what was measured.

`jit_step` passes them as JAX's `compiler_options`, for its own program alone. Nothing is written to the environment. An
option that `LIBTPU_INIT_ARGS` or `XLA_FLAGS` names is left to it.

The table holds an option if the compiled text of a step got better by it: the compiler's estimate of computation, the
bytes that a device sends, or the temporaries. docs/scaling.md has the figures. An option that the compiler does not
know is an error ("No such compile option"), which names it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

OptionValue = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class MeasuredOption:
    """One of XLA's options.

    Attributes:
        name, value: as XLA calls it, without dashes.
        reason: what it changes, in a few words.
        platform: JAX's name, "cpu", "gpu" or "tpu".
        chips: names of `chip_name`; empty: all of the platform.
        devices: least number of devices of the program.
    """

    name: str
    value: OptionValue
    reason: str
    platform: str
    chips: tuple[str, ...] = ()
    devices: int = 1


MEASURED = (
    MeasuredOption(
        "xla_cpu_copy_insertion_use_region_analysis",
        True,
        "without it XLA of jax 0.10 and 0.11 copies all of the donated optimizer state",
        "cpu",
    ),
    MeasuredOption(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        1_000_000,
        "each weight is gathered once and multiplied in one product, not in a loop over its shards",
        "tpu",
        devices=2,
    ),
)

CHIP_NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
"""The chip of each `jax.Device.device_kind`, as `cotgrpo plan --topology` calls it."""


@dataclasses.dataclass(frozen=True)
class CompilerConfig:
    """XLA's options that train steps are compiled with.

    Attributes:
        measured: use the options that were measured to help on this chip. The run prints them, and so does `plan`.
        options: options of your own, as {xla_tpu_scoped_vmem_limit_kib: 65536}. They win over the measured ones.
    """

    measured: bool = True
    options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if not re.fullmatch(r"xla_\w+", str(name)):
                raise ValueError(
                    f"CompilerConfig.options must have names that begin with xla_, without dashes, got {name!r}."
                )
            if not re.fullmatch(r"[\w.,:+-]+", str(value)):
                raise ValueError(
                    f"CompilerConfig.options must have a number, true, false or a word as {name}, got {value!r}."
                )

    def given(self, platform: str) -> dict[str, OptionValue | None]:
        """Return what `jit_step` takes as `compiler_options` on JAX's platform. None turns a measured option off."""
        off = () if self.measured else (option.name for option in MEASURED if option.platform == platform)
        return {**dict.fromkeys(off), **self.options}


def options_for(
    platform: str, chip: str = "", devices: int = 1, given: Mapping[str, OptionValue | None] | None = None
) -> dict[str, OptionValue] | None:
    """Return XLA's options of a train step; None if there are none.

    Args:
        platform: JAX's name, "cpu", "gpu" or "tpu".
        chip: of `chip_name`.
        devices: number of devices of the program.
        given: options of the user's, which win; None as a value leaves a measured option out.
    """
    environment = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {os.environ.get('XLA_FLAGS', '')}"
    own = {
        option.name: option.value
        for option in MEASURED
        if option.platform == platform
        and (not option.chips or chip in option.chips)
        and devices >= option.devices
        and f"--{option.name}=" not in environment
    }
    options = {name: value for name, value in {**own, **(given or {})}.items() if value is not None}
    return options or None


def chip_name(device_kind: str) -> str:
    """Return the chip of a `jax.Device.device_kind`, as v5e; empty if it is not a TPU that is known."""
    return CHIP_NAMES.get(device_kind, "")


def options_line(options: Mapping[str, OptionValue] | None) -> str:
    """Return options as a line of text."""
    return ", ".join(f"{name}={value}" for name, value in (options or {}).items()) or "none"
