"""Quantized checkpoints: each format against what its own library makes of the same bytes, whole and by slices.

reference_quantized.safetensors holds, for each case, the stored tensors and `want`. Their makers: bitsandbytes 0.50,
AutoGPTQ 0.7, AutoAWQ 0.2, compressed-tensors 0.20, and transformers 5.24 for fp8 in blocks and the experts in MXFP4.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotgrpo.models.huggingface.dequantize.decoded import DecodedTensor
from cotgrpo.models.huggingface.dequantize.formats import QuantizationError, decode_tensors, quantization_of
from cotgrpo.models.huggingface.dequantize.original import name_original
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.models.huggingface.safetensors_files import ALL_DTYPES, StoredTensor, list_tensors, open_tensors

REFERENCE = Path(__file__).parent / "reference_quantized.safetensors"


def reference_configs() -> dict[str, dict[str, Any]]:
    with open_tensors(REFERENCE) as file:
        return dict(json.loads(file.metadata()["configs"]))


CONFIGS = reference_configs()


@functools.cache
def stored_tensors() -> dict[str, StoredTensor]:
    return list_tensors(REFERENCE, ALL_DTYPES)


@dataclasses.dataclass(frozen=True)
class Renamed(StoredTensor):
    """A tensor of the reference file under the name that it has in a checkpoint."""

    original: StoredTensor

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.original.read(index)


def tensors_of(case: str) -> tuple[dict[str, StoredTensor], np.ndarray]:
    """The stored tensors of a case, and what its library makes of them."""
    found = {name.partition("/")[2]: t for name, t in stored_tensors().items() if name.startswith(f"{case}/")}
    want = found.pop("want").read().astype(np.float32)
    return {name: Renamed(t.path, name, t.dtype, t.shape, t) for name, t in found.items()}, want


def decoded(case: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return decode_tensors(tensors, {"quantization_config": CONFIGS[case], "torch_dtype": "float16"})


@pytest.mark.parametrize("case", CONFIGS)
def test_the_values_are_those_of_the_formats_own_library(case: str) -> None:
    tensors, want = tensors_of(case)
    found = decoded(case, tensors)
    name = "model.experts.gate_up_proj" if "experts" in case else "model.proj.weight"
    assert set(found) == {name} | {bias for bias in tensors if bias.endswith(".bias")}
    tensor = found[name]
    assert isinstance(tensor, DecodedTensor) and tensor.shape == want.shape and tensor.dtype == np.float16
    got = tensor.read()
    assert got.dtype == np.float32
    # Some libraries round their result, or a scale, to the type of the model.
    loose = 2**-8 if "nested" in case else 1e-4 if "nvfp4" in case else 1e-6
    np.testing.assert_allclose(got, want, rtol=loose, atol=1e-8 if "int8" not in case else 1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_slice_is_a_slice_of_the_whole(case: str) -> None:
    tensors, want = tensors_of(case)
    tensor = next(t for t in decoded(case, tensors).values() if isinstance(t, DecodedTensor))
    got = tensor.read()
    *_, rows, columns = want.shape
    first = (slice(1, 2),) * (len(want.shape) - 2)
    for part in (
        (slice(0, rows // 2), slice(None)),
        (slice(5, 7), slice(3, columns - 5)),
        (slice(rows - 1, None), slice(columns // 2, None)),
        (slice(None), slice(1, 2)),
    ):
        np.testing.assert_array_equal(tensor.read((*first, *part)), got[(*first, *part)], err_msg=str(part))


def test_a_slice_reads_its_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the rows of the weight; the scales are small."""
    read, taken = Renamed.read, dict[str, int]()

    def counted(self: Renamed, index: Any = None) -> np.ndarray:
        part = read(self, index)
        taken[self.name] = taken.get(self.name, 0) + part.nbytes
        return part

    for case in CONFIGS:
        tensors, want = tensors_of(case)
        tensor = next(t for t in decoded(case, tensors).values() if isinstance(t, DecodedTensor))
        *others, rows, _ = want.shape
        with monkeypatch.context() as patch:
            patch.setattr(Renamed, "read", counted)
            taken.clear()
            # The outputs are the last axis of stacked experts. Three bits are read 32 rows at a time.
            part = (slice(0, 1), slice(None), slice(0, 6)) if others else (slice(0, rows // 4), slice(None))
            tensor.read(part)
        big = max(tensors.values(), key=lambda t: np.prod(t.shape) * t.dtype.itemsize)
        size = int(np.prod(big.shape)) * big.dtype.itemsize
        assert 0 < taken[big.name] <= size / 4 * (1.5 if "awq" in case else 1.0), case


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}: quantized in a format"),
        ({"quantization_config": {"quant_method": "exl3"}}, r"not read \('exl3'\); supported: fp8, .*in bfloat16\.$"),
        ({"quantization_config": {"quant_method": "hqq"}, "_name_or_path": "a/b"}, "written as 'a/b'"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is .* format that is not read .MLX's."),
        ({"text_config": {"quantization_config": {"quant_method": "aqlm"}}}, "aqlm"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ with bits None"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}, "marlin"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "AWQ with bits 4 and version"),
        ({"quantization_config": {"quant_method": "auto-round", "bits": 4}}, "packing_format '' of auto-round"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}}, "rotation"),
        (
            {"compression_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "bitmask"}}},
            "the sparsity format 'bitmask'",
        ),
    ],
    ids=str,
)
def test_formats_that_are_not_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message) as error:
        quantization_of({"model_type": "llama", **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("gptq 4 bits", "scales"),
        ("awq", "qzeros"),
        ("compressed-tensors packed 4 bits", "weight_scale"),
        ("bitsandbytes nf4", "weight.quant_map"),
        ("bitsandbytes nf4", "weight.quant_state.bitsandbytes__nf4"),
        ("mxfp4 experts", "gate_up_proj_scales"),
    ],
)
def test_a_missing_part_is_named(case: str, lost: str) -> None:
    tensors, _ = tensors_of(case)
    left = {name: t for name, t in tensors.items() if not name.endswith(lost)}
    assert len(left) == len(tensors) - 1
    with pytest.raises(ModelError, match=lost.rpartition("gate_up_proj")[2]):
        decoded(case, left)


@pytest.mark.parametrize(
    ("card", "name", "sentence"),
    [
        ("---\nbase_model: Qwen/Qwen3-8B\n---\n", "x/y", " Its model card names Qwen/Qwen3-8B."),
        ("---\nbase_model:\n- a/b\n---\n", "x/y", " Its model card names a/b."),
        ("---\nbase_model: 3\n---\n", "x/y", ""),
        ("---\n: [\n---\n", "Qwen/Qwen2.5-7B-Instruct-AWQ", " Its name suggests Qwen2.5-7B-Instruct."),
        (None, "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", " Its name suggests Qwen2.5-7B-Instruct."),
        (None, "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", " Its name suggests Llama-3.2-1B-Instruct."),
        (None, "RedHatAI/Llama-3.1-8B-quantized.w4a16", " Its name suggests Llama-3.1-8B."),
        (None, "mlx-community/Qwen3-0.6B-4bit", " Its name suggests Qwen3-0.6B."),
        (None, "Qwen/Qwen3-8B-FP8", " Its name suggests Qwen3-8B."),
        (None, "Qwen/Qwen3-8B", ""),
    ],
)
def test_the_unquantized_model_is_named(card: str | None, name: str, sentence: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert name_original(tmp_path, name) == sentence
