"""Hugging Face's config.json, read and written by the rows of `cotgrpo.models.huggingface.families`.

An unknown field is an error that names it: a setting that is silently ignored makes a silently wrong model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.families import (
    ACTIVATIONS,
    COMMON,
    FAMILIES,
    FIXED,
    REQUIRED,
    WITHOUT_EFFECT,
    Family,
    HfConfig,
    ModelError,
)
from cotgrpo.models.rotary import RopeScaling

LARGEST_SIZE, MOST_LAYERS = 2**24, 10_000
"""What a model cannot have more of. A damaged config.json would else fill the memory."""


def decoder_config(hf: HfConfig) -> DecoderConfig:
    """Return the decoder that a config.json describes, with float32 storage and compute.

    Raises:
        ModelError: an unknown `model_type`, or a field that is missing, unknown or has an unsupported value.
    """
    family = family_of(hf)
    known = {*REQUIRED, *COMMON, *family.defaults, *FIXED, *WITHOUT_EFFECT}
    unknown = sorted(name for name in hf if name not in known and not name.startswith("_"))
    if unknown:
        raise ModelError(
            f"config.json of a {hf['model_type']} model: unsupported field {', '.join(unknown)}. "
            "Remove it from config.json if it does not change the logits."
        )
    for name, allowed in FIXED.items():
        if name in hf and hf[name] not in allowed:
            raise ModelError(f"config.json: {name} is {hf[name]!r}; supported: {allowed[0]!r}.")
    field = rope_fields({**COMMON, **family.defaults, **hf})
    sizes = {name: positive(field, name) for name in REQUIRED}
    heads = sizes["num_attention_heads"]
    if field["head_dim"] is None and sizes["hidden_size"] % heads:
        raise ModelError(
            f"config.json: no head_dim, and hidden_size {sizes['hidden_size']} is not a multiple of "
            f"num_attention_heads {heads}."
        )
    try:
        return DecoderConfig(
            vocab_size=sizes["vocab_size"],
            width=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads if field["num_key_value_heads"] is None else positive(field, "num_key_value_heads"),
            head_dim=sizes["hidden_size"] // heads if field["head_dim"] is None else positive(field, "head_dim"),
            mlp_width=sizes["intermediate_size"],
            rope_theta=float(field["rope_theta"]),
            norm_eps=float(field["rms_norm_eps"]),
            tied_head=field["tie_word_embeddings"],
            init_scale=float(field["initializer_range"]),
            activation=activation(field),
            rope_scaling=rope_scaling(field),
            max_positions=field["max_position_embeddings"],
            **family.reads(field),
        )
    except ModelError:
        raise
    except (ValueError, TypeError) as error:
        raise ModelError(f"config.json of a {hf['model_type']} model: {error}") from error


def family_of(hf: HfConfig) -> Family:
    """Return the row of `FAMILIES` for the `model_type` of config.json."""
    if not isinstance(hf.get("model_type"), str) or hf["model_type"] not in FAMILIES:
        hint = " (its text-only checkpoints are gemma3_text)" if hf.get("model_type") == "gemma3" else ""
        raise ModelError(
            f"config.json: unknown model_type {hf.get('model_type')!r}{hint}; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[hf["model_type"]]


def positive(field: HfConfig, name: str) -> int:
    """Return a size from config.json."""
    value, most = field.get(name), MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        found = "is missing" if name not in field else f"is {value!r}"
        raise ModelError(f"config.json: {name} {found}; expected a positive integer, at most {most}.")
    return value


def activation(field: HfConfig) -> str:
    """Return the activation. Gemma's config.json has two fields, and transformers reads `hidden_activation`."""
    name = field.get("hidden_activation", field["hidden_act"])
    if name not in ACTIVATIONS:
        raise ModelError(f"config.json: unsupported hidden_act {name!r}; supported: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def rope_fields(field: dict[str, Any]) -> dict[str, Any]:
    """Convert `rope_parameters` of transformers 5 to `rope_theta`, `rope_scaling` and `rope_local_base_freq`."""
    if field["rope_scaling"] and field["rope_parameters"]:
        raise ModelError("config.json holds both rope_scaling and rope_parameters: remove one.")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(field[name] or {}, dict):
            raise ModelError(f"config.json: {name} is {field[name]!r}; expected an object.")
    spec = dict(field["rope_scaling"] or field["rope_parameters"] or {})
    if "rope_local_base_freq" in field and {"full_attention", "sliding_attention"} & set(spec):
        local = dict(spec.pop("sliding_attention", None) or {})
        spec = dict(spec.pop("full_attention", None) or {}) | spec
        field["rope_local_base_freq"] = local.pop("rope_theta", field["rope_local_base_freq"])
        if local and local != {"rope_type": "default"}:
            raise ModelError(f"config.json: unsupported scaling of sliding_attention in rope_parameters: {local}.")
    theta = spec.pop("rope_theta", None)
    return {**field, "rope_theta": field["rope_theta"] if theta is None else theta, "rope_scaling": spec}


ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"}
    ),
}
"""Fields of each kind of scaling."""


def rope_scaling(field: HfConfig) -> RopeScaling | None:
    """Return the `RopeScaling` of the field `rope_scaling`."""
    spec = {name: value for name, value in field["rope_scaling"].items() if value is not None}
    old, new = spec.pop("type", None), spec.pop("rope_type", None)
    kind = new or old or "default"
    if kind not in ROPE_KEYS:
        raise ModelError(f"config.json: unsupported rope_scaling type {kind!r}; supported: {', '.join(ROPE_KEYS)}.")
    if spec.pop("partial_rotary_factor", 1) != 1:
        raise ModelError("config.json: unsupported partial_rotary_factor in rope_scaling; supported: 1.")
    unknown = sorted(set(spec) - ROPE_KEYS[kind])
    if unknown:
        raise ModelError(f"config.json: unsupported field {', '.join(unknown)} in rope_scaling of type {kind!r}.")
    if kind == "default":
        return None
    needed = {"factor", "low_freq_factor", "high_freq_factor"} if kind == "llama3" else {"factor"}
    if needed - set(spec):
        raise ModelError(f"config.json: rope_scaling of type {kind!r} lacks {', '.join(sorted(needed - set(spec)))}.")
    if kind == "linear":
        return RopeScaling(kind, spec["factor"])
    length = spec.pop("original_max_position_embeddings", field["max_position_embeddings"])
    mscales = spec.pop("mscale", 0), spec.pop("mscale_all_dim", 0)
    if kind == "yarn" and "attention_factor" not in spec:
        over, under = mscales if all(mscales) else (1.0, 0.0)
        spec["attention_factor"] = yarn_factor(spec["factor"], over) / yarn_factor(spec["factor"], under)
    return RopeScaling(kind, original_length=length, **spec)


def yarn_factor(factor: float, mscale: float) -> float:
    """Return YaRN's factor of queries and keys: `0.1 mscale ln(factor) + 1`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the field of config.json that `rope_scaling` reads."""
    if scaling is None:
        return None
    field = {**dataclasses.asdict(scaling), "original_max_position_embeddings": scaling.original_length}
    return {"rope_type": scaling.kind} | {
        name: field[name] for name in sorted(ROPE_KEYS[scaling.kind]) if name in field
    }


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """Return config.json of the first family that can express a decoder.

    Raises:
        ModelError: no family can.
    """
    for model_type, family in FAMILIES.items():
        act = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
        written = {
            "architectures": [family.architecture],
            "model_type": model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            act: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
            "max_position_embeddings": config.max_positions or family.defaults["max_position_embeddings"],
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_scale,
            "tie_word_embeddings": config.tied_head,
            "rope_theta": config.rope_theta,
            "rope_scaling": write_rope(config.rope_scaling),
            **family.writes(config),
        }
        if not differences(config, written):
            return written
    raise ModelError(f"No family of transformers ({', '.join(FAMILIES)}) has this combination of settings: {config}.")


def differences(config: DecoderConfig, hf: HfConfig) -> list[str]:
    """Return the fields in which a decoder differs from a config.json, apart from how it computes and is stored."""

    def essence(c: DecoderConfig) -> DecoderConfig:
        return dataclasses.replace(
            c,
            biases=tuple(sorted(c.biases)),
            local_layers=tuple(sorted(set(range(c.num_layers) if c.local_layers is None else c.local_layers)))
            if c.window is not None
            else None,
            max_positions=config.max_positions and c.max_positions,
            **{name: getattr(config, name) for name in ("dtype", "param_dtype", "remat", "attention", "init_scale")},
        )

    try:
        described = essence(decoder_config(hf))
    except ModelError as error:
        return [str(error)]
    mine = essence(config)
    return [
        f"{f.name} ({getattr(mine, f.name)} here, {getattr(described, f.name)} there)"
        for f in dataclasses.fields(DecoderConfig)
        if getattr(mine, f.name) != getattr(described, f.name)
    ]
