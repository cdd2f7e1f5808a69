"""Hugging Face's config.json, read and written by the rows of `cotgrpo.models.huggingface.families`.

An unknown field is an error that names it: a setting that is silently ignored makes a silently wrong model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.dequantize.formats import quantization_of
from cotgrpo.models.huggingface.families import FAMILIES, LACKING, WRAPPERS
from cotgrpo.models.huggingface.family import COMMON, FIXED, REQUIRED, Family, HfConfig, ModelError
from cotgrpo.models.huggingface.rope_fields import rope_fields, rope_scaling, write_rope

LARGEST_SIZE, MOST_LAYERS = 2**24, 10_000
"""What a model cannot have more of. A damaged config.json would else fill the memory."""


OFF: tuple[Any, ...] = ("", [], {})
NO_SWITCH = re.compile(r"^use_(?!.*bias)|rope|rotary|norm|scal|causal|gate")
"""Fields that may change a model by being false."""
COUNT = re.compile(r"^n(um)?_|experts|dropout|pdrop|_coef$|_prob$")
"""Fields that change nothing by being 0."""
OF_OTHER_PARTS = re.compile(
    r"(?!.*text).*(vision|image|video|audio|projector|mm_tokens|bo[iav]_token|eo[iav]_token|spatial).*"
)
"""Fields of a model with images that do not concern its text part."""


def decoder_config(hf: HfConfig) -> DecoderConfig:
    """Return the decoder that a config.json describes, with float32 storage and compute.

    Raises:
        ModelError: an unknown `model_type`, or a field that is missing, unknown or has an unsupported value.
    """
    quantization_of(hf)
    family, hf = family_of(hf), text_config(hf)
    check_fields(hf, family)
    field = rope_fields({**COMMON, **family.defaults, **hf}, family)
    sizes = {name: positive(field, name) for name in REQUIRED}
    heads = sizes["num_attention_heads"]
    if field["head_dim"] is None and sizes["hidden_size"] % heads:
        raise ModelError(
            f"config.json: no head_dim, and hidden_size {sizes['hidden_size']} is not a multiple of "
            f"num_attention_heads {heads}."
        )
    try:
        options: dict[str, Any] = {
            "vocab_size": sizes["vocab_size"],
            "width": sizes["hidden_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": heads if field["num_key_value_heads"] is None else positive(field, "num_key_value_heads"),
            "head_dim": sizes["hidden_size"] // heads if field["head_dim"] is None else positive(field, "head_dim"),
            "mlp_width": sizes["intermediate_size"],
            "rope_theta": float(field["rope_theta"]),
            "norm_eps": float(field["rms_norm_eps"]),
            "tied_head": field["tie_word_embeddings"],
            "init_scale": float(field["initializer_range"]),
            "activation": activation(field, family),
            "rope_scaling": rope_scaling(field, family),
            "max_positions": field["max_position_embeddings"],
        }
        return DecoderConfig(**(options | family.reads(field)))
    except ModelError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json of a {hf['model_type']} model: {error}") from error


def check_fields(hf: HfConfig, family: Family) -> None:
    """Raise ModelError if config.json has a field that is unknown or whose value is not supported."""
    unknown = sorted(name for name in hf if not family.knows(name) and not has_no_effect(name, hf[name]))
    if unknown:
        raise ModelError(
            f"config.json of a {hf['model_type']} model: unsupported field {', '.join(unknown)}. "
            "Remove it from config.json if it does not change the logits."
        )
    for name, allowed in {**FIXED, **family.fixed}.items():
        if name in hf and name not in family.defaults and hf[name] not in allowed:
            raise ModelError(f"config.json: {name} is {hf[name]!r}; supported: {allowed[0]!r}.")


def has_no_effect(name: str, value: Any) -> bool:
    """Return whether an unknown field is off: null, empty, or a switch or count that changes nothing at false or 0."""
    if value is None or (not isinstance(value, bool | int | float) and value in OFF):
        return True
    if isinstance(value, bool):
        return not value and not NO_SWITCH.search(name)
    return value == 0 and bool(COUNT.search(name))


def family_of(hf: HfConfig) -> Family:
    """Return the row of `FAMILIES` for the `model_type` of config.json, or of its `text_config`."""
    kind = text_config(hf).get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = str(kind).removesuffix("_text")
        lacks = f" (the decoder has no {LACKING[known]})" if known in LACKING else ""
        supported = ", ".join({**FAMILIES, **WRAPPERS})
        raise ModelError(f"config.json: unknown model_type {kind!r}{lacks}; supported: {supported}.")
    return FAMILIES[kind]


def is_wrapped(hf: HfConfig) -> bool:
    """Return whether the text model is a part of a model with images."""
    return isinstance(hf.get("model_type"), str) and hf["model_type"] in WRAPPERS


def text_config(hf: HfConfig) -> HfConfig:
    """Return the config.json of the text model: `text_config` of a model with images, else `hf` itself.

    Raises:
        ModelError: a model with images has no `text_config`, or one of an unknown type.
    """
    if not is_wrapped(hf):
        return hf
    kind = hf["model_type"]
    wrapper, text = WRAPPERS[kind], hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(
            f"config.json of a {kind} model: no text_config (its text-only checkpoints are {wrapper.text[0]})."
        )
    text = {"model_type": wrapper.text[0], **text}
    if text["model_type"] not in wrapper.text:
        raise ModelError(
            f"config.json of a {kind} model: text_config has the model_type {text['model_type']!r}; "
            f"supported: {', '.join(wrapper.text)}."
        )
    family = FAMILIES[text["model_type"]]
    outer = {name: hf[name] for name in hf if name != "text_config" and not OF_OTHER_PARTS.fullmatch(name)}
    check_fields(outer, family)
    # The whole model's field counts. Older files have it in the text part only.
    tied = {name: hf[name] for name in ("tie_word_embeddings",) if hf.get(name) is not None}
    return {**wrapper.defaults, **text, **tied}


def positive(field: HfConfig, name: str) -> int:
    """Return a size from config.json."""
    value, most = field.get(name), MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        found = "is missing" if name not in field else f"is {value!r}"
        raise ModelError(f"config.json: {name} {found}; expected a positive integer, at most {most}.")
    return value


def activation(field: HfConfig, family: Family) -> str:
    """Return the activation. Gemma's config.json has two fields, and transformers reads `hidden_activation`."""
    name = field["hidden_activation"] if "hidden_activation" in family.defaults else field["hidden_act"]
    if name not in family.activations:
        raise ModelError(f"config.json: unsupported hidden_act {name!r}; supported: {', '.join(family.activations)}.")
    return family.activations[name]


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
            act: next((theirs for theirs, ours in family.activations.items() if ours == config.activation), None),
            "max_position_embeddings": config.max_positions or family.defaults["max_position_embeddings"],
            "rms_norm_eps": config.norm_eps,
            "initializer_range": min(config.init_scale, 1.0),  # transformers refuses more
            "tie_word_embeddings": config.tied_head,
            "rope_theta": config.rope_theta,
            "rope_scaling": write_rope(config.rope_scaling),
            **family.writes(config),
        }
        if "rope_parameters" in written:  # transformers takes one form
            written = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
        if not differences(config, written):
            return written
    raise ModelError(f"No family of transformers ({', '.join(FAMILIES)}) has this combination of settings: {config}.")


def check_exportable(config: DecoderConfig) -> None:
    """Check that transformers has a class for a decoder, and that this class takes its shape.

    Raises:
        ModelError: no family can express the decoder, or the class refuses the shape.
    """
    from transformers import AutoConfig

    hf = config_json(config)
    fields = {name: value for name, value in hf.items() if name != "model_type"}
    try:
        AutoConfig.for_model(hf["model_type"], **fields)
    except Exception as error:  # the checks of a class raise errors of several kinds
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"A student of this shape could not be exported: {hf['architectures'][0]} of transformers refuses it "
            f"({reason}). Change the shape (student.width, student.num_heads, student.num_kv_heads, student.head_dim)."
        ) from error


def differences(config: DecoderConfig, hf: HfConfig) -> list[str]:
    """Return the fields in which a decoder differs from a config.json, apart from how it computes and is stored."""

    def essence(c: DecoderConfig) -> DecoderConfig:
        c = c if c.layer_kinds is None or c.runs else c.of_kind(c.layer_kinds[0])
        return dataclasses.replace(
            c,
            biases=tuple(sorted(c.biases)),
            local_layers=tuple(sorted(set(range(c.num_layers) if c.local_layers is None else c.local_layers)))
            if c.window is not None
            else None,
            max_positions=config.max_positions and c.max_positions,
            experts=c.experts and dataclasses.replace(c.experts, balance_weight=0.0, products="auto"),
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
