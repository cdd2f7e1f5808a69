"""Rotary positions in config.json: `rope_theta`, `rope_scaling` and `rope_parameters`, read and written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from cotgrpo.models.huggingface.family import Family, HfConfig, ModelError
from cotgrpo.models.rotary import RopeScaling

ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
    "proportional": frozenset({"factor"}),
}
"""Fields of each kind of scaling."""

SOME_FAMILIES = frozenset({"longrope", "proportional"})
"""Kinds of scaling that only families with this kind in `Family.rope_kinds` have."""

NOT_READ = frozenset({"attn_factor"})
"""Fields of any kind that transformers does not read. Other engines multiply YaRN's factor by `attn_factor`."""


def rope_fields(field: dict[str, Any], family: Family) -> dict[str, Any]:
    """Convert `rope_parameters` and `rope_scaling` to one form.

    Returns:
        `field` with `rope_theta`, `rope_scaling` (an object without `rope_theta`), `partial_rotary_factor`, and
        `local_rope_theta` if the family has another base in local layers.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(field[name] or {}, Mapping):
            raise ModelError(f"config.json: {name} is {field[name]!r}; expected an object.")
    specs = [merge_layers(field[name], field, family) for name in ("rope_scaling", "rope_parameters") if field[name]]
    if len(specs) == 2 and specs[0] != specs[1]:
        differing = sorted(k for k in {*specs[0], *specs[1]} if specs[0].get(k) != specs[1].get(k))
        raise ModelError(
            "config.json holds both rope_scaling and rope_parameters, and they differ "
            f"({', '.join(differing)}): remove one."
        )
    spec = specs[0] if specs else merge_layers(family.default_rope or {}, field, family)
    share = spec.pop("partial_rotary_factor", field.get("partial_rotary_factor") or 1)
    if share != 1 and "partial_rotary_factor" not in family.defaults:
        raise ModelError("config.json: unsupported partial_rotary_factor in rope_scaling; supported: 1.")
    return {
        **field,
        "rope_theta": spec.pop("rope_theta"),
        "local_rope_theta": spec.pop("local_rope_theta"),
        "rope_scaling": spec,
        "partial_rotary_factor": share,
    }


def merge_layers(spec: Mapping[str, Any], field: HfConfig, family: Family) -> dict[str, Any]:
    """Return rotary fields in one form: no nulls, `rope_type`, `rope_theta`, and the base of the local layers.

    Gemma 3 and OLMo 3 may hold an object for each type of layer. Their local layers have no scaling.
    """
    spec = dict(spec)
    local_theta = field.get("rope_local_base_freq") or family.local_rope_theta
    if family.local_rope_theta is not None and {"full_attention", "sliding_attention"} & set(spec):
        local = dict(spec.pop("sliding_attention", None) or {})
        spec = dict(spec.pop("full_attention", None) or {}) | spec
        local_theta = local.pop("rope_theta", local_theta)
        if local and local != {"rope_type": "default"}:
            raise ModelError(f"config.json: unsupported scaling of sliding_attention in rope_parameters: {local}.")
    spec = {name: value for name, value in spec.items() if value is not None and name not in family.ignored_rope}
    old, new = spec.pop("type", None), spec.pop("rope_type", None)
    spec["rope_type"] = new or old or "default"
    spec.setdefault("rope_theta", field["rope_theta"])
    return {**spec, "local_rope_theta": local_theta}


def rope_scaling(field: HfConfig, family: Family) -> RopeScaling | None:
    """Return the `RopeScaling` of the field `rope_scaling`, as `rope_fields` returns it."""
    spec = {name: value for name, value in field["rope_scaling"].items() if name not in NOT_READ}
    kind = spec.pop("rope_type")
    if kind == "dynamic" and "alpha" in family.rope_kinds and spec.get("alpha"):
        return RopeScaling("alpha", spec["alpha"])
    if "longrope" in family.rope_kinds and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3 was first published with
    kinds = [name for name in ROPE_KEYS if name not in SOME_FAMILIES - family.rope_kinds]
    if kind not in kinds:
        raise ModelError(f"config.json: unsupported rope_scaling type {kind!r}; supported: {', '.join(kinds)}.")
    growth = spec.pop("llama_4_scaling_beta", 0.0) if "llama_4_scaling_beta" in family.rope_kinds else 0.0
    unknown = sorted(set(spec) - ROPE_KEYS[kind])
    if unknown:
        raise ModelError(f"config.json: unsupported field {', '.join(unknown)} in rope_scaling of type {kind!r}.")
    if growth and kind not in ("yarn", "llama3"):
        raise ModelError(f"config.json: llama_4_scaling_beta needs rope_scaling of type 'yarn', got {kind!r}.")
    if kind == "default":
        return None
    needed = {
        "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
        "longrope": {"short_factor", "long_factor"},
        "proportional": set(),
    }.get(kind, {"factor"})
    if needed - set(spec):
        raise ModelError(f"config.json: rope_scaling of type {kind!r} lacks {', '.join(sorted(needed - set(spec)))}.")
    if kind == "linear":
        return RopeScaling(kind, spec["factor"])
    if kind == "proportional":
        return RopeScaling(kind, spec.get("factor", 1.0), rotated_share=field["partial_rotary_factor"])
    length = spec.pop("original_max_position_embeddings", field["max_position_embeddings"])
    if kind == "longrope":
        return longrope(field, spec, length)
    mscales = spec.pop("mscale", 0), spec.pop("mscale_all_dim", 0)
    if kind == "yarn" and "attention_factor" not in spec:
        over, under = mscales if all(mscales) else (1.0, 0.0)
        spec["attention_factor"] = yarn_factor(spec["factor"], over) / yarn_factor(spec["factor"], under)
    return RopeScaling(kind, original_length=length, query_growth=growth, **spec)


def longrope(field: HfConfig, spec: Mapping[str, Any], length: int) -> RopeScaling:
    """Return Phi's scaling. Its original length is a field of its own, which counts first."""
    length = field.get("original_max_position_embeddings") or length
    factor = spec.get("factor", field["max_position_embeddings"] / length)
    grown = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return RopeScaling(
        "longrope",
        factor,
        length,
        attention_factor=spec.get("attention_factor", grown),
        short_factors=tuple(spec["short_factor"]),
        long_factors=tuple(spec["long_factor"]),
    )


def yarn_factor(factor: float, mscale: float) -> float:
    """Return YaRN's factor of queries and keys: `0.1 mscale ln(factor) + 1`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the field of config.json that `rope_scaling` reads."""
    if scaling is None:
        return None
    if scaling.kind == "alpha":
        return {"rope_type": "dynamic", "alpha": scaling.factor, "factor": 1.0}
    field = {
        **dataclasses.asdict(scaling),
        "original_max_position_embeddings": scaling.original_length,
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
    }
    growth = {"llama_4_scaling_beta": scaling.query_growth} if scaling.query_growth else {}
    return (
        {"rope_type": scaling.kind}
        | growth
        | {name: field[name] for name in sorted(ROPE_KEYS[scaling.kind]) if name in field}
    )
