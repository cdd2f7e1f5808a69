"""The safetensors format, read and written one tensor at a time.

A file is eight bytes with the header's length, the header (JSON: name to dtype, shape and byte range), and the bytes of the tensors. Nothing
in it is code. Tensors are read with plain reads, not through a memory map, so a tensor that has been passed on leaves no pages behind.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from cotgrpo.models.huggingface.families import ModelError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `shape` numbers of `dtype` in the file at `path`, from byte `offset` on."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own."""
        raw = np.empty(self.nbytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            filled = 0
            while filled < raw.size and (count := file.readinto(raw.data[filled:])):
                filled += count
        if filled < raw.size:
            raise ModelError(f"{self.path} became shorter while it was read: download or copy it again.")
        return raw.view(self.dtype).reshape(self.shape)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from `model.safetensors` or the shards of its index.

    Raises:
        ModelError: no safetensors, only pickled weights, a file that is corrupt, or an index that does not fit its shards.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return read_index(folder / INDEX_FILE)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run any code when they are read, and no safetensors. "
            "Convert them where you trust them: transformers' model.save_pretrained(folder) writes safetensors."
        )
    raise ModelError(f"No weights in {folder}: expected {SINGLE_FILE}, or {INDEX_FILE} and its shards.")


def read_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a sharded checkpoint."""
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is corrupt: expected JSON with a weight_map ({type(error).__name__}: {error})."
        ) from error
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted({str(name) for name in places.values()}):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise ModelError(f"{path.name} names the shard {shard!r}, but no such file is in {path.parent}.")
        shards[shard] = read_header(path.parent / shard)
    for name, shard in places.items():
        if name not in shards[shard]:
            raise ModelError(f"{path.name} says that {name} is in {shard}, but it is not there.")
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; every byte range is checked against its shape and the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise corrupt(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ranges = {name: tuple(int(i) for i in entry["data_offsets"]) for name, entry in entries.items()}
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        kinds = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(path, f"a header that is not the format's JSON ({type(error).__name__}: {error})") from error
    tensors, end = {}, 0
    for name in sorted(entries, key=lambda name: ranges[name]):
        if kinds[name] not in DTYPES:
            raise ModelError(f"{path}: {name} is stored as {kinds[name]}; supported: {', '.join(DTYPES)}.")
        tensors[name] = StoredTensor(path, DTYPES[kinds[name]], shapes[name], 8 + length + end)
        if min(shapes[name], default=1) < 0 or ranges[name] != (end, end + tensors[name].nbytes):
            raise corrupt(path, f"{name} of shape {list(shapes[name])} in the bytes {list(ranges[name])}")
        end += tensors[name].nbytes
    if 8 + length + end != size:
        raise corrupt(path, f"{size} bytes where the header promises {8 + length + end}")
    return tensors


def corrupt(path: Path, found: str) -> ModelError:
    """The error for a file that is not what the format says."""
    return ModelError(f"{path} is no whole safetensors file: it has {found}. Download or copy it again.")


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `array()` is called when its turn comes, and only then is it in memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Sequence[NewTensor], max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` of tensors (or one tensor) and their index."""
    shards = list(split(tensors, max_shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split(tensors: Sequence[NewTensor], max_bytes: int) -> Iterator[list[NewTensor]]:
    """Runs of tensors, each as long as fits."""
    shard: list[NewTensor] = []
    for tensor in tensors:
        if shard and sum(other.nbytes for other in shard) + tensor.nbytes > max_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_file(path: Path, tensors: Sequence[NewTensor]) -> None:
    """One safetensors file, its header padded to a multiple of eight bytes."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entry = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        header[tensor.name] = entry
        end += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            write_array(file, tensor)


def write_array(file: BinaryIO, tensor: NewTensor) -> None:
    """The bytes of one tensor, row by row."""
    array = np.ascontiguousarray(tensor.array().astype(tensor.dtype, copy=False))
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has the shape {array.shape}, but {tensor.shape} was announced.")
    file.write(array.reshape(-1).view(np.uint8).data)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a model folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"No {path.name} in {path.parent}: expected a Hugging Face model folder.") from error
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}; expected a JSON object.")
    return value
