"""Weights of a GGUF file, read with the `gguf` package under the names of Hugging Face.

The folder needs the config.json and the tokenizer of the model, which the file has in another form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.dequantize.decoded import Bounds, DecodedTensor
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Values of `general.architecture` whose tensors differ from Hugging Face's in known ways."""
PERMUTED = ("llama",)
"""Architectures whose queries and keys have neighbours as rotary pairs."""
SHIFTED = ("gemma2", "gemma3")
"""Architectures whose norms are stored with 1 added."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF file of a folder, or the parts of one, maybe none.

    Raises:
        ModelError: several models, or a part is missing.
    """
    found = sorted(folder.glob("*.gguf"))
    names = {match[1] if (match := PART.fullmatch(path.name)) else path.name for path in found}
    if len(names) > 1:
        raise ModelError(f"{folder} holds {len(names)} GGUF models ({', '.join(sorted(names)[:3])}): keep one.")
    counts = {int(match[3]) for path in found if (match := PART.fullmatch(path.name))}
    if counts and counts != {len(found)}:
        raise ModelError(f"{folder} holds {len(found)} of {max(counts)} parts of a GGUF model: download it again.")
    return found


def gguf_tensors(
    paths: list[Path], config: DecoderConfig, names: Iterable[str], dtype: np.dtype
) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF model under these names, as far as it has them.

    Args:
        paths: the file, or its parts.
        config: the decoder.
        names: of the tensors in a checkpoint of Hugging Face.
        dtype: of the model before it was quantized.

    Raises:
        ModelError: the `gguf` package is missing, or the file is corrupt or of an unknown architecture.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"{paths[0]} needs the gguf package: pip install 'cotgrpo[gguf]'.") from error
    opened = [open_gguf(path) for path in paths]
    kind = opened[0][0]
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{paths[0]}: a GGUF model of the architecture {kind!r} is not read; supported: {', '.join(ARCHITECTURES)}."
            " Use the model that it was made from, in bfloat16."
        )
    stored = {name: entry for _, entries in opened for name, entry in entries.items()}
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    theirs = gguf.get_tensor_name_map(arch, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if kind in PERMUTED else {}
    found: dict[str, StoredTensor] = {}
    for name in names:
        mapped = theirs.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped in stored:
            split = next((count for key, count in heads.items() if f".{key}." in name), 0)
            shift = 1.0 if kind in SHIFTED and name.endswith("norm.weight") else 0.0
            found[name] = decoded_gguf(stored[mapped], name, dtype, split, shift)
    return found


@dataclasses.dataclass(frozen=True)
class GgufEntry:
    """A tensor of a GGUF file, mapped into memory.

    Attributes:
        path: of the file.
        data: rows of numbers, or of the bytes of quantized ones.
        kind: the `GGMLQuantizationType`.
        shape: `[outputs, inputs]`, as in a checkpoint of Hugging Face.
    """

    path: Path
    data: np.ndarray
    kind: int
    shape: tuple[int, ...]


def open_gguf(path: Path) -> tuple[str, dict[str, GgufEntry]]:
    """Return the architecture of a GGUF file and its tensors by name, which are read when they are used."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        entries = {
            tensor.name: GgufEntry(
                path, tensor.data, tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape))
            )
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}): download or copy it again.") from error
    return "" if field is None else str(field.contents()), entries


def decoded_gguf(entry: GgufEntry, name: str, dtype: np.dtype, heads: int, shift: float) -> DecodedTensor:
    """Return a tensor of a GGUF file.

    Args:
        entry: the stored tensor.
        name: its name in Hugging Face's form.
        dtype: of the model before it was quantized.
        heads: in each of so many heads, rotary pairs are neighbours. 0: the rows are in the same order.
        shift: is subtracted.
    """
    from gguf import GGMLQuantizationType, dequantize

    shape, kind = entry.shape, GGMLQuantizationType(entry.kind)
    rows = np.arange(shape[0])
    order = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1) if heads else rows

    def decode(bounds: Bounds) -> np.ndarray:
        if len(shape) == 1:
            values = np.asarray(dequantize(entry.data, kind), np.float32).reshape(-1)[order][bounds]
            return values - np.float32(shift)
        data = entry.data.reshape(shape[0], -1)[order[bounds[0]]]
        values = np.asarray(dequantize(data, kind), np.float32).reshape(-1, *shape[1:])
        return values[(slice(None), *bounds[1:])] - np.float32(shift)

    return DecodedTensor(entry.path, name, dtype, shape, decode)
