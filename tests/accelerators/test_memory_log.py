"""The memory in use, as a run logs it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cotgrpo.accelerators import memory


@pytest.mark.parametrize(
    ("stats", "want"),
    [
        ([{"bytes_in_use": 2e9, "peak_bytes_in_use": 3e9}], {"memory_gb": 2.0, "peak_memory_gb": 3.0}),
        ([{"bytes_in_use": 1e9}, {"bytes_in_use": 4e9}], {"memory_gb": 4.0}),
    ],
)
def test_the_fullest_device_is_logged(
    stats: list[dict[str, float]], want: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(stats)
    monkeypatch.setattr(jax, "local_devices", lambda: stats)
    monkeypatch.setattr(memory, "memory_stats", lambda device: next(left))
    assert memory.memory_in_use() == want


def test_without_figures_of_devices_the_process_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_stats", lambda device: {})
    before = memory.memory_in_use()["host_memory_gb"]
    taken = np.ones(30_000_000)
    assert memory.memory_in_use()["host_memory_gb"] - before == pytest.approx(taken.nbytes / 1e9, abs=0.1)
