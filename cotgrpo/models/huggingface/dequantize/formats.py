"""Which quantization a config.json names, and which stored tensors make up each tensor of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cotgrpo.models.huggingface.dequantize.bitsandbytes import four_bit_tensor
from cotgrpo.models.huggingface.dequantize.fp4 import fp4_tensor, mxfp4_experts
from cotgrpo.models.huggingface.dequantize.packed_integers import awq_tensor, gptq_tensor, packed_tensor
from cotgrpo.models.huggingface.dequantize.scaled import scaled_tensor
from cotgrpo.models.huggingface.family import HfConfig, ModelError
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

Parts = dict[str, StoredTensor]
"""{ending of the name: tensor}, of the stored tensors that belong to one module."""

METHODS = (
    *("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "mxfp4", "mxfp8", "nvfp4"),
    *("bitsandbytes", "gptq", "awq", "auto-round"),
)
"""Values of `quant_method` that are read."""
QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json that describe a quantization."""
DTYPE_NAMES = {"bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
ACTIVATIONS = (
    *("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale"),
    *("input_zero_point", "input_global_scale", "input_activation_scale_ub", "weight_format"),
)
"""Endings of tensors that quantize activations or a cache, or that describe a layout. They do not change a weight."""


class QuantizationError(ModelError):
    """A checkpoint is quantized in a way that is not read."""


def quantization_of(hf: HfConfig) -> Mapping[str, Any] | None:
    """Return the quantization that config.json names, or None.

    Raises:
        ModelError: it is not a JSON object, or of a format that is not read.
    """
    text = hf.get("text_config")
    for fields in (hf, text if isinstance(text, Mapping) else {}):
        for name in QUANTIZATIONS:
            if fields.get(name) is not None:
                return check_quantization(name, fields[name], hf)
    return None


def check_quantization(name: str, found: Any, hf: HfConfig) -> Mapping[str, Any]:
    """Return a quantization whose format is read.

    Raises:
        QuantizationError: names the format and the model to use instead.
    """
    instead = "Use the model that it was made from, in bfloat16"
    if origin := hf.get("_name_or_path"):
        instead += f" (config.json was written as {origin!r})"
    if not isinstance(found, Mapping) or found.get("quant_method") not in METHODS:
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        kind = repr(method) if method else "MLX's" if isinstance(found, Mapping) and name == "quantization" else "none"
        raise QuantizationError(
            f"config.json: {name} is {found!r:.200}: quantized in a format that is not read ({kind}); supported: "
            f"{', '.join(METHODS)}. {instead}."
        )
    if reason := unread_option(found):
        raise QuantizationError(f"config.json: {name} is {found!r:.200}: {reason} is not read. {instead}.")
    return found


def unread_option(found: Mapping[str, Any]) -> str | None:
    """Return what of a known format is not read, or None."""
    method, bits = found["quant_method"], found.get("bits", found.get("w_bit", 4))
    packing = str(found.get("packing_format", ""))
    if method == "auto-round" and packing not in ("auto_round:auto_gptq", "auto_round:auto_awq"):
        return f"the packing_format {packing!r} of auto-round"
    if method == "gptq" and (bits not in (2, 3, 4, 8) or "bits" not in found):
        return f"GPTQ with bits {found.get('bits')!r} (expected 2, 3, 4 or 8)"
    if method == "gptq" and (found.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2")):
        return f"the checkpoint_format {found['checkpoint_format']!r} of GPTQ"
    if method == "awq" and (bits != 4 or str(found.get("version", "gemm")).lower() != "gemm"):
        return f"AWQ with bits {bits!r} and version {found.get('version')!r} (expected 4 and 'gemm')"
    if found.get("transform_config"):
        return "a rotation of the weights (transform_config)"
    sparsity = found.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return f"the sparsity format {sparsity['format']!r}"
    return None


def original_dtype(hf: HfConfig) -> np.dtype:
    """Return the number type of a model before it was quantized: that of config.json, else bfloat16."""
    return named_dtype(hf) or DTYPE_NAMES["bfloat16"]


def named_dtype(hf: HfConfig) -> np.dtype | None:
    """Return the number type that config.json names, or None."""
    text = hf.get("text_config")
    for fields in (hf, text if isinstance(text, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            if isinstance(fields.get(name), str):
                return DTYPE_NAMES.get(fields[name].removeprefix("torch."))
    return None


def decode_tensors(tensors: Mapping[str, StoredTensor], hf: HfConfig) -> dict[str, StoredTensor]:
    """Return the tensors of a quantized checkpoint under the names that they have in one of bfloat16.

    A tensor that is not quantized stays as it is.

    Raises:
        ModelError: a part of a quantized tensor is missing or does not fit the others.
    """
    quantization = quantization_of(hf) or {}
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        module, ending = split_name(name)
        modules.setdefault(module, {})[ending] = tensor
    decoded: dict[str, StoredTensor] = {}
    for module, parts in modules.items():
        for find in (packed_module, four_bit_module, fp4_module, scaled_module, mxfp4_module):
            if (found := find(module, parts, quantization, original_dtype(hf))) is not None:
                used, tensor = found
                decoded[tensor.name] = tensor
                parts = {key: part for key, part in parts.items() if key not in used}
        left = {key: part for key, part in parts.items() if key not in ACTIVATIONS or not quantization}
        decoded |= {part.name: part for part in left.values()}
    return decoded


def split_name(name: str) -> tuple[str, str]:
    """Return the module and the ending of a tensor's name.

    `weight` and what follows it is one ending, as in `q_proj.weight.absmax`. The endings of gpt-oss have no dot.
    """
    module, dot, ending = name.rpartition(".weight.")
    if dot:
        return module, f"weight.{ending}"
    module, _, ending = name.rpartition(".")
    for suffix in ("_blocks", "_scales"):
        if ending.endswith(suffix):
            return f"{module}.{ending.removesuffix(suffix)}", suffix
    return module, ending


Found = tuple[set[str], StoredTensor] | None
"""The endings that were used, and the tensor; None if the module does not have this form."""


def packed_module(module: str, parts: Parts, quantization: Mapping[str, Any], dtype: np.dtype) -> Found:
    """Find integers in words of 32 bits."""
    name = f"{module}.weight"
    if "weight_packed" in parts and "weight_shape" in parts:
        need(module, parts, "weight_scale")
        used = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        return used, packed_tensor(parts, name, dtype)
    if "qweight" not in parts:
        return None
    need(module, parts, "qzeros", "scales")
    used = {"qweight", "qzeros", "scales", "g_idx"}
    if quantization.get("quant_method") == "awq" or str(quantization.get("packing_format", "")).endswith("awq"):
        return used, awq_tensor(parts, name, dtype)
    return used, gptq_tensor(
        parts,
        name,
        dtype,
        bits=int(quantization.get("bits", 4)),
        group_size=int(quantization.get("group_size", 128)),
        zero_offset=0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
    )


def four_bit_module(module: str, parts: Parts, quantization: Mapping[str, Any], dtype: np.dtype) -> Found:
    """Find bitsandbytes' numbers of 4 bits."""
    prefix = "weight."
    if f"{prefix}absmax" not in parts or "weight" not in parts:
        return None
    used = {key for key in parts if key == "weight" or key.startswith(prefix)}
    pieces = {key[len(prefix) :]: parts[key] for key in used}
    return used, four_bit_tensor(pieces, f"{module}.weight", dtype)


def fp4_module(module: str, parts: Parts, quantization: Mapping[str, Any], dtype: np.dtype) -> Found:
    """Find MXFP4 and NVFP4 of linear layers, as compressed-tensors and ModelOpt store them."""
    key = "weight_packed" if "weight_packed" in parts else "weight"
    if key not in parts or parts[key].dtype != np.uint8 or "weight_scale" not in parts:
        return None
    factor = 1.0
    if "weight_global_scale" in parts:
        factor = 1 / float(parts["weight_global_scale"].read().reshape(-1)[0])
    elif "weight_scale_2" in parts:
        factor = float(parts["weight_scale_2"].read().reshape(-1)[0])
    used = {key, "weight_scale", "weight_global_scale", "weight_scale_2"}
    return used, fp4_tensor(f"{module}.weight", parts[key], parts["weight_scale"], dtype, factor)


def scaled_module(module: str, parts: Parts, quantization: Mapping[str, Any], dtype: np.dtype) -> Found:
    """Find numbers of 8 bits with a scale."""
    scales = [name for name in ("weight_scale_inv", "weight_scale", "SCB") if name in parts]
    if "weight" not in parts or parts["weight"].dtype.itemsize != 1 or not scales:
        return None
    tensor = scaled_tensor(
        parts["weight"],
        parts[scales[0]],
        dtype,
        block=quantization.get("weight_block_size"),
        zero_point=parts.get("weight_zero_point"),
        factor=1 / 127 if scales[0] == "SCB" else 1.0,
    )
    return {"weight", scales[0], "weight_zero_point"}, tensor


def mxfp4_module(module: str, parts: Parts, quantization: Mapping[str, Any], dtype: np.dtype) -> Found:
    """Find the stacked experts of gpt-oss."""
    if "_blocks" not in parts:
        return None
    need(module, parts, "_scales")
    return {"_blocks", "_scales"}, mxfp4_experts(module, parts["_blocks"], parts["_scales"], dtype)


def need(module: str, parts: Parts, *endings: str) -> None:
    """Raise ModelError unless a module has these parts."""
    if missing := [ending for ending in endings if ending not in parts]:
        path = next(iter(parts.values())).path
        raise ModelError(f"{path}: the quantized {module} lacks its {', '.join(missing)}: download the model again.")
