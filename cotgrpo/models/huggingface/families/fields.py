"""Fields of config.json that several families share: windows and biases."""

from __future__ import annotations

from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.family import HfConfig, ModelError

TYPES = ("full_attention", "sliding_attention")
"""`layer_types` of a layer without and with a window."""


def used_windows(field: HfConfig, layer_types: list[str]) -> dict[str, Any]:
    """Return the windows of a family with `use_sliding_window`, which switches them off."""
    if not field["use_sliding_window"] or field["sliding_window"] is None:
        if "sliding_attention" in (field["layer_types"] or ()):
            raise ModelError(
                "config.json: layer_types holds sliding_attention, but use_sliding_window is false: set it to true, "
                "or make every layer full_attention."
            )
        return {}
    return windows(field, layer_types)


def window_between(field: HfConfig, pattern: int) -> dict[str, Any]:
    """Return Gemma's windows: in all layers but every `pattern`-th."""
    return windows(field, [TYPES[bool((i + 1) % pattern)] for i in range(field["num_hidden_layers"])])


def all_windows(field: HfConfig) -> dict[str, Any]:
    """Return the windows of a family whose layers all have one, unless `layer_types` says otherwise."""
    kind = "full_attention" if field["sliding_window"] is None else "sliding_attention"
    return windows(field, [kind] * field["num_hidden_layers"])


def windows(field: HfConfig, layer_types: list[str]) -> dict[str, Any]:
    """Return `window` and `local_layers` from config.json's `layer_types`, or from the argument if it has none."""
    layer_types = field["layer_types"] or layer_types
    if len(layer_types) != field["num_hidden_layers"] or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            "config.json: layer_types must name full_attention or sliding_attention for each of the "
            f"{field['num_hidden_layers']} layers, got {layer_types}."
        )
    local = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    if not local:
        return {}
    if field["sliding_window"] is None:
        raise ModelError(
            "config.json: layer_types holds sliding_attention, but sliding_window is null: give its length."
        )
    return {"window": field["sliding_window"], "local_layers": None if len(local) == len(layer_types) else local}


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `windows` reads."""
    local = range(config.num_layers) if config.local_layers is None else config.local_layers
    local = local if config.window is not None else ()
    return {"sliding_window": config.window, "layer_types": [TYPES[i in local] for i in range(config.num_layers)]}


def attention_biases(field: HfConfig) -> tuple[str, ...]:
    """Return the projections that have a bias with `attention_bias`."""
    return ("query", "key", "value", "out") if field["attention_bias"] else ()


def llama_biases(field: HfConfig) -> dict[str, Any]:
    """Return the biases of `attention_bias` and `mlp_bias`."""
    return {"biases": attention_biases(field) + (("gate", "up", "down") if field["mlp_bias"] else ())}


def write_llama_biases(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields that `llama_biases` reads."""
    return {"attention_bias": "out" in config.biases, "mlp_bias": "down" in config.biases}
