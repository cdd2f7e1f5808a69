"""What a family of Hugging Face models is: the form of the rows of `cotgrpo.models.huggingface.families`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from cotgrpo.models.config import DecoderConfig

HfConfig = Mapping[str, Any]


class ModelError(ValueError):
    """A model cannot be read or written. The message names the place, what was expected and the fix."""


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
"""Fields of every family with the defaults of transformers. `Family.defaults` override them."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "auto_map": (None,),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": (None, {}, []),
}
"""Fields that are allowed with these values only. Other values would change the model. `Family.fixed` adds to them."""

WITHOUT_EFFECT = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "tokenizer_class"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "pretraining_tp", "is_llama_config"}
    | {"output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"}
    | {"quantization_config", "compression_config", "quantization"}  # read on their own
    | {"is_decoder", "problem_type", "id2label", "label2id", "num_labels", "task_specific_params", "finetuning_task"}
    | {"max_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "transformers.js_config"}
    | {"unsloth_fixed", "unsloth_version", "sep_token_id", "unk_token_id", "mask_token_id", "eod_token_id"}
    | {"resid_pdrop", "embd_pdrop", "residual_dropout", "hidden_dropout", "classifier_dropout", "name_or_path"}
)
"""Fields that do not change a logit. Names with a leading underscore, transformers' bookkeeping, are allowed too."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""{`hidden_act`: `DecoderConfig.activation`} of families with a gated MLP."""


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """The tensors of the experts of a layer.

    Attributes:
        router: module of the router.
        each: {"gate", "up", "down": a tensor `[outputs, inputs]` of each expert}, with `{}` for its number. None: one
            tensor holds all experts.
        gate_up: the tensor of all experts' gates and ups, `[E, outputs, inputs]`, with `_bias` after it for the biases.
        down: the same for down.
        inputs_first: these two are `[E, inputs, outputs]`.
        interleaved: gate and up alternate in `gate_up`, and do not follow each other.
        shared_gate: module of the gate of the shared MLP.
        shared: {our name: the module in a layer with experts} of the shared MLP, where other layers have other names.
    """

    router: str
    each: Mapping[str, str] | None = None
    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    inputs_first: bool = False
    interleaved: bool = False
    shared_gate: str = "mlp.shared_expert_gate"
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def first_name(self) -> str:
        """Return the name of a tensor that a checkpoint of this form has."""
        return self.gate_up if self.each is None else self.each["gate"].format(0)


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        architecture: the class in transformers.
        defaults: fields of its config.json that `COMMON` lacks or has with another default.
        reads: `reads(field) -> {name: value}`, options of the `DecoderConfig`. `field` is config.json with defaults
            filled in.
        writes: the inverse: the family's own fields of config.json.
        without_embedding: tokens of its tokenizer without a row in the embedding. They never occur in text.
        activations: as `ACTIVATIONS`.
        fixed: as `FIXED`, for fields that other families may not have.
        ignored: pattern of names of further fields that the class in transformers does not read.
        default_rope: `rope_parameters` if config.json has neither these nor `rope_scaling`.
        local_rope_theta: base of the rotary frequencies in local layers if config.json does not give it. None: the
            local layers have no rotary fields of their own.
        rope_kinds: kinds and fields of `rope_scaling` besides those that every family has.
        ignored_rope: fields of `rope_scaling` that the class in transformers does not read.
        modules: {our name: the module's name in a layer}, where it differs from `MODULES`.
        fused: {the module's name in a layer: our projections whose outputs it holds, in this order}.
        interleaved: whether rotary pairs are neighbours in the checkpoint's queries and keys.
        experts: how a checkpoint may name the tensors of experts. The first form is what is written.
    """

    architecture: str
    defaults: dict[str, Any]
    reads: Callable[[HfConfig], dict[str, Any]]
    writes: Callable[[DecoderConfig], dict[str, Any]]
    without_embedding: frozenset[str] = frozenset()
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: str | None = None
    default_rope: Mapping[str, Any] | None = None
    local_rope_theta: float | None = None
    rope_kinds: frozenset[str] = frozenset()
    ignored_rope: frozenset[str] = frozenset()
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    experts: tuple[ExpertNames, ...] = ()

    def knows(self, name: str) -> bool:
        """Return whether a field of config.json is read, or is known to have no effect."""
        named = name in self.defaults or name in self.fixed or name in {*REQUIRED, *COMMON, *FIXED, *WITHOUT_EFFECT}
        return named or name.startswith("_") or bool(self.ignored and re.fullmatch(self.ignored, name))


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A `model_type` with images, whose `text_config` is one of `FAMILIES`.

    Attributes:
        architecture: the class in transformers.
        text: the families that its text part may have. The first is that of a `text_config` without `model_type`.
        defaults: fields of `text_config` that may be absent, with the wrapper's own defaults.
    """

    architecture: str
    text: tuple[str, ...]
    defaults: dict[str, Any]
