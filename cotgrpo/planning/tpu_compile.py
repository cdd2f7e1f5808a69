"""Compile a train step for TPUs that this machine does not have, with `libtpu`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from cotgrpo.accelerators.chips import Topology
from cotgrpo.accelerators.refused_options import explain_refused_option
from cotgrpo.compiler_options.measured import OptionValue
from cotgrpo.config import ConfigError
from cotgrpo.planning.step_arguments import StepArguments
from cotgrpo.sharding import jit_step
from cotgrpo.train_steps import Step


def compile_step(
    step: Step,
    mesh: Mesh,
    arguments: StepArguments,
    compiler_options: Mapping[str, OptionValue | None] | None = None,
) -> jax.stages.Compiled:
    """Compile the program that `jit_step` makes of the step on a mesh; the mesh's devices may be absent."""
    with no_compilation_cache(), explain_refused_option():
        jitted = jit_step(step, mesh, compiler_options=compiler_options)
        return jitted.lower(arguments.state, arguments.batch, *arguments.frozen).compile()


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Turn off JAX's compilation cache, which cannot load a program for an absent device."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once, at its first program
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def tpu_devices(topology: Topology) -> Sequence[jax.Device]:
    """Return the devices of the slice, or of all slices, as `libtpu` describes them.

    Raises:
        ConfigError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "plan compiles for TPUs with libtpu, which is not installed (no TPU is needed). "
            "Install cotgrpo's `tpu` extra: pip install 'cotgrpo[tpu]' or, from a clone, "
            "pip install -e '.[tpu]'."
        )
    # Without these, libtpu looks for the TPUs of this machine, or for the one process that may use them.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, str | int] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        devices = topologies.get_topology_desc(topology_name=topology.slice_name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology {topology.name}: libtpu does not know this slice ({error}).") from error
    return devices


def needed_bytes(error: Exception) -> int:
    """Read the bytes that a program would have needed from the compiler's error, and raise any other error.

    The compiler has two forms of this message.
    """
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)(?: of [\d.]+[KMGT]? hbm|\) exceeds)", str(error))
    if used is None:
        raise error
    return round(float(used[1]) * 2 ** (10 * " KMGT".index(used[2] or " ")))
