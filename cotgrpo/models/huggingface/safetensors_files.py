"""Tensors of a checkpoint folder: read by slices, written by shards, with the `safetensors` library."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from cotgrpo.atomic_files import read_json
from cotgrpo.models.huggingface.family import ModelError

if TYPE_CHECKING:
    from safetensors import safe_open

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
SMALL_FLOATS = {
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
"""Types that the library cannot give to NumPy."""
INTEGERS = {
    code: np.dtype(code.replace("U", "uint").replace("I", "int"))
    for code in ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
}
ALL_DTYPES = DTYPES | SMALL_FLOATS | INTEGERS | {"F64": np.dtype(np.float64), "BOOL": np.dtype(np.bool_)}
"""Types of quantized tensors and of the other parts of a model, too."""
PIECE = 2**22
"""Numbers that are checked at a time."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return a slice of the tensor, or all of it. Nothing else is copied into memory.

        The file is opened each time: its memory map, and with it the pages that were read, ends with the call.
        """
        if self.dtype in SMALL_FLOATS.values():
            return read_mapped(self, index)
        with open_tensors(self.path) as file:
            return file.get_tensor(self.name) if index is None else file.get_slice(self.name)[index]


def read_mapped(tensor: StoredTensor, index: tuple[slice, ...] | None) -> np.ndarray:
    """Return a slice of a tensor by the offsets of the file's header. `list_tensors` has checked the file."""
    with tensor.path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(size))[tensor.name]["data_offsets"][0]
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, tensor.dtype)[index or ...]
    mapped = np.memmap(tensor.path, tensor.dtype, "r", 8 + size + start, tensor.shape or (1,))
    return np.array(mapped.reshape(tensor.shape)[... if index is None else index])


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file.

    Raises:
        ModelError: the file is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        refuse_pointer(path)
        raise ModelError(f"{path} is not a whole safetensors file ({error}): download or copy it again.") from error


def refuse_pointer(path: Path) -> None:
    """Raise ModelError if a file is Git LFS's pointer to a file, or a web page that was saved instead of one."""
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(b"version https://git-"):
        raise ModelError(
            f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {path.parent}, or download "
            "the model with `hf download`."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ModelError(f"{path} is a web page, not the file itself: download it again with `hf download`.")


def list_tensors(path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name.

    Args:
        path: the file.
        dtypes: {name in the file: type} of the types that are supported.

    Raises:
        ModelError: the file is truncated or corrupt, or a dtype is not supported.
    """
    tensors = {}
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118  the file is not a mapping
            entry = file.get_slice(name)
            code = entry.get_dtype()
            if code not in dtypes:
                raise ModelError(f"{path}: {name} is stored as {code}; supported: {', '.join(dtypes)}.")
            tensors[name] = StoredTensor(path, name, dtypes[code], tuple(entry.get_shape()))
    return tensors


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint folder by name, from `model.safetensors` or the shards of its index.

    Types of quantized tensors are listed too.

    Raises:
        ModelError: the folder has no safetensors or only pickled weights, a file is corrupt, or the index names tensors
            or shards that do not exist.
    """
    if (folder / SINGLE_FILE).is_file():
        return list_tensors(folder / SINGLE_FILE, ALL_DTYPES)
    if (folder / INDEX_FILE).is_file():
        return read_index(folder / INDEX_FILE)
    if shards := shards_without_index(folder):
        return {name: tensor for path in shards for name, tensor in list_tensors(path, ALL_DTYPES).items()}
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise ModelError(
            f"{folder} has pickled weights ({pickled[0]}) and no safetensors. Reading a pickle can run any code. "
            "Convert them where you trust them: transformers' model.save_pretrained(folder) writes safetensors."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" It holds {others[0]}: if these are all weights, rename it to {SINGLE_FILE}." if others else ""
    raise ModelError(f"No weights in {folder}: expected {SINGLE_FILE}, or {INDEX_FILE} and its shards.{found}")


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder has weights as safetensors."""
    return any(folder.glob("*.safetensors"))


def shards_without_index(folder: Path) -> list[Path]:
    """Return the shards `model-00001-of-00003.safetensors` and so on of a folder whose index is missing, maybe none.

    Raises:
        ModelError: a shard is missing.
    """
    found = {path.name: match for path in folder.glob("model-*.safetensors") if (match := SHARD.fullmatch(path.name))}
    if not found:
        return []
    count = max(int(match[1]) for match in found.values())
    expected = [shard_name(number, count) for number in range(1, count + 1)]
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{folder} lacks {missing[0]}, one of {count} shards: download the model again.")
    return [folder / name for name in expected]


def shard_name(number: int, count: int) -> str:
    """Return the name of one of several files with weights."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a sharded checkpoint by name."""
    shard_of = read_weight_map(path)
    shards = {shard: list_tensors(path.parent / shard, ALL_DTYPES) for shard in sorted(set(shard_of.values()))}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ModelError(f"{path.name} lists {name} in {shard}, but that file does not have it.")
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def read_weight_map(path: Path) -> dict[str, str]:
    """Return {name of a tensor: its shard} of an index. Every shard exists."""
    try:
        shard_of = {str(k): str(v) for k, v in dict(read_json(path)["weight_map"]).items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path} is corrupt: expected JSON with a weight_map ({type(error).__name__}: {error})."
        ) from error
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise ModelError(f"{path.name} names the shard {shard!r}, but {path.parent} has no such file.")
    return shard_of


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that `find_tensors` reads, maybe none.

    Raises:
        ModelError: an index is corrupt, or names a file that does not exist.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return [folder / shard for shard in sorted(set(read_weight_map(folder / INDEX_FILE).values()))]
    return shards_without_index(folder) or sorted(folder.glob("*.gguf"))


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        name, dtype, shape: of the tensor as it is stored.
        array: returns it, and is called when its file is written.
        copied: whether it comes from the source as it is. Its numbers are not looked at: the bounds of a part that
            reads sounds, for example, are infinite.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]
    copied: bool = False

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Sequence[NewTensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or several shards and their index.

    A shard has at most `max_shard_bytes` of tensors, or one tensor. One shard at a time is in memory.
    """
    shards = list(split_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
        return
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = shard_name(number, len(shards))
        write_file(folder / name, shard)
        shard_of |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": shard_of}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_shards(tensors: Sequence[NewTensor], max_bytes: int) -> Iterator[list[NewTensor]]:
    """Yield runs of tensors of at most `max_bytes`, or one tensor."""
    shard: list[NewTensor] = []
    for tensor in tensors:
        if shard and sum(other.nbytes for other in shard) + tensor.nbytes > max_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_file(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write one safetensors file.

    Raises:
        ModelError: a number is NaN or infinite, or too large for the type it is stored in.
    """
    from safetensors.numpy import save_file

    arrays = {tensor.name: stored_array(tensor) for tensor in tensors}
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library's file is for its owner alone


def stored_array(tensor: NewTensor) -> np.ndarray:
    """Return a tensor in the type that it is stored in."""
    array = np.asarray(tensor.array())
    if tensor.dtype in DTYPES.values() and not tensor.copied:
        if (value := not_finite(array)) is not None:
            raise ModelError(
                f"{tensor.name} holds {value}: the student is ruined. Export it from an earlier checkpoint."
            )
        most = float(jnp.finfo(tensor.dtype).max)
        if tensor.dtype != array.dtype and array.size and (largest := float(np.abs(array).max())) > most:
            raise ModelError(
                f"{tensor.name} holds a number of the size {largest:.6g}, and {tensor.dtype} ends at {most:.6g}: "
                "export with --dtype bfloat16 or float32."
            )
    return np.asarray(array, tensor.dtype, order="C")


def not_finite(array: np.ndarray) -> str | None:
    """Return "nan", "inf" or "-inf" if an array holds one, else None. It is looked at piece by piece."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE].astype(np.float32, copy=False)
        if not np.isfinite(piece).all():
            return str(piece[~np.isfinite(piece)][0])
    return None
