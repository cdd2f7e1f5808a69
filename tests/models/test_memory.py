"""Weights that do not fit into memory are refused before they are read, with both figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from cotgrpo import make_mesh
from cotgrpo.models import ModelError, load_pretrained, memory, save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

CONFIG = DecoderConfig(97, 16, 2, 4, 2, 8, 24)
SIZE = 4 * CONFIG.num_params()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("memory") / "model", CONFIG, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Set the free memory of the machine; no tensor may be read then."""

    def set_free(available: int, swap: int = 0, container: str = "max") -> None:
        (tmp_path / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\nSwapFree: {swap // 1024} kB\n")
        (tmp_path / "max").write_text(container)
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "max")

    return set_free


@pytest.mark.parametrize(
    ("available", "swap", "container", "fits"),
    [
        (SIZE + 2048, 0, "max", True),
        (SIZE - 2048, 0, "max", False),
        (SIZE - 2048, 4096, "max", True),
        (10**12, 0, str(SIZE - 1), False),
        (10**12, 0, str(SIZE), True),
    ],
)
def test_the_memory_of_the_host(
    available: int, swap: int, container: str, fits: bool, folder: Path, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(available, swap, container)
    if fits:
        load_pretrained(folder)
        return
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=r"The weights take 0\.00 GB, and this machine has 0\.00 GB free.*bfloat16"):
        load_pretrained(folder)


def test_half_the_bytes_need_half_the_memory(folder: Path, free: Any) -> None:
    free(SIZE // 2 + 4096)
    load_pretrained(folder, "bfloat16")
    with pytest.raises(ModelError, match="The weights take"):
        load_pretrained(folder)


@pytest.mark.parametrize(("room", "fits"), [(0.6, True), (0.2, False)])
def test_the_memory_of_a_device(room: float, fits: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of half the weights, on devices that tell their memory."""
    leaves = {("x",): jax.ShapeDtypeStruct((1024, 64), "float32")}
    mesh = make_mesh(fsdp=2, data=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    limit = 10**7
    used = limit - int(room * 4 * 1024 * 64)
    stats = {"bytes_limit": limit, "bytes_in_use": used}
    monkeypatch.setattr(memory, "device_memory", lambda device: stats)
    monkeypatch.setattr(memory, "is_host", lambda device: False)
    text = memory.missing_memory(leaves, {("x",): sharding})
    assert (text == "") is fits
    if not fits:
        assert text.startswith("0.00 GB on each device, and ") and text.endswith("has 0.00 GB free")


def test_unknown_figures_are_enough(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    load_pretrained(folder)
