"""What cannot fit into memory is refused before it is allocated; what may fit is only warned of."""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cotgrpo.accelerators import memory
from cotgrpo.accelerators.memory import TooLarge, address_space_left, check_fits, check_step, host_memory, size_of
from cotgrpo.accelerators.out_of_memory import explain_out_of_memory
from cotgrpo.config import ConfigError


@dataclasses.dataclass
class Sizes:
    argument_size_in_bytes: int = 2 * 10**9
    temp_size_in_bytes: int = 30 * 10**9
    output_size_in_bytes: int = 10**9
    alias_size_in_bytes: int = 10**9


class Compiled:
    def memory_analysis(self) -> Any:
        return Sizes()


def set_memory(
    monkeypatch: pytest.MonkeyPatch, device: int | None = None, left: int | None = None, host: int = 10**15
) -> list[str]:
    """Give the device, the address space and the machine these sizes. Returns the warnings."""
    monkeypatch.setattr(memory, "memory_stats", lambda _: {} if device is None else {"bytes_limit": device})
    monkeypatch.setattr(memory, "address_space_left", lambda: left)
    monkeypatch.setattr(memory, "host_memory", lambda: host)
    return []


def test_a_device_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    said = set_memory(monkeypatch, device=31 * 10**9)
    with pytest.raises(ConfigError) as caught, explain_out_of_memory(lambda: "Lower sft.batch_size (8)."):
        check_step(Compiled(), said.append)
    assert str(caught.value) == (
        "Out of memory: a step needs 32.00 GB, and a device has 31.00 GB. Lower sft.batch_size (8)."
    )
    monkeypatch.setenv("TF_FORCE_UNIFIED_MEMORY", "1")
    check_step(Compiled(), said.append)
    monkeypatch.delenv("TF_FORCE_UNIFIED_MEMORY")
    set_memory(monkeypatch, device=33 * 10**9, left=0, host=0)  # a device's memory is not the machine's
    check_step(Compiled(), said.append)
    assert not said


def test_a_limit_on_the_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are there already: only what is new counts."""
    said = set_memory(monkeypatch, left=29 * 10**9)
    with pytest.raises(TooLarge, match=r"32.00 GB, 30.00 GB of them new, and the limit \(ulimit -v\) leaves 29.00 GB"):
        check_step(Compiled(), said.append)
    set_memory(monkeypatch, left=31 * 10**9)
    check_step(Compiled(), said.append)
    assert not said


def test_a_machine_may_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    said = set_memory(monkeypatch, host=31 * 10**9)
    check_step(Compiled(), said.append)
    assert said == ["Memory: a step needs 32.00 GB, and this machine has 31.00 GB. The system may end the run."]


def test_what_a_compiler_and_a_machine_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real program on this machine passes in silence; sizes are those of the arrays."""
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    said: list[str] = []
    check_step(compiled, said.append)
    assert not said and host_memory() > 10**8
    assert (
        size_of({"a": jnp.ones((3, 5)), "b": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "key": jax.random.key(0)}) == 64
    )
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if limits[0] == resource.RLIM_INFINITY:
        assert address_space_left() is None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    left = address_space_left()
    assert left is not None and 0 < left < 1 << 50
    with pytest.raises(TooLarge):
        check_fits("the train state", 1 << 50, 1 << 50, said.append)
