"""Where a checkpoint keeps the decoder's parameters: names, prefixes, fused tensors and orders of rows, by family."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import numpy as np

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.expert_layout import ExpertSlot, expert_form, expert_slots
from cotgrpo.models.huggingface.families import FAMILIES, MODULES, POST_NORM_MODULES
from cotgrpo.models.huggingface.family import Family
from cotgrpo.models.huggingface.safetensors_files import StoredTensor

TreePath = tuple[str, ...]
"""Path of a leaf in the parameter tree."""

PREFIXES = ("model.", "")
"""What names of a text model begin with. Those of a checkpoint without a head may begin with nothing."""
WRAPPED_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
"""The same for the text part of a model with images: in transformers 5, on the hub, and without a head."""
EMBEDDING = "embed_tokens.weight"
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
OTHER_PARTS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|vision_embed_tokens|vision_embedder|"
    r"audio_tower|embed_vision|embed_audio)\."
)
"""Tensors of a model with images that its text part does not have. An export copies them."""
OF_KEYS = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")
"""Tensors of a layer's keys and values."""
FURTHER_TOKENS = re.compile(r"^(model\.)?mtp\.")
"""Tensors of a head that predicts more than the next token, which no class of transformers reads."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one tensor of the parameter tree: rows of a stored tensor, which is `[outputs, inputs]`.

    Attributes:
        name: of the stored tensor.
        start: its first row.
        rows: their number. None: all.
        heads: in each of so many heads, rotary pairs are neighbours in the checkpoint and halves in the decoder.
            0: the rows are in the same order.
    """

    name: str
    start: int = 0
    rows: int | None = None
    heads: int = 0

    def from_stored(self, part: np.ndarray) -> np.ndarray:
        """Return the rows in the decoder's order."""
        return part if not self.heads else part[np.argsort(self.order(len(part)))]

    def to_stored(self, part: np.ndarray) -> np.ndarray:
        """Return the rows in the checkpoint's order."""
        return part if not self.heads else part[self.order(len(part))]

    def order(self, rows: int) -> np.ndarray:
        """Return the decoder's row of each stored row."""
        return np.arange(rows).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclasses.dataclass(frozen=True)
class SlotTensor:
    """What a `Slot` holds, read as a tensor of its own."""

    slot: Slot
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.stored.shape[0] if self.slot.rows is None else self.slot.rows
        return (rows, *self.stored.shape[1:])

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return a slice of the tensor, or all of it."""
        if self.slot.rows is None and not self.slot.heads:
            return self.stored.read(index)
        rows, *others = index or (slice(None),) * len(self.shape)
        start, stop, _ = rows.indices(self.shape[0])
        if not self.slot.heads:
            return self.stored.read((slice(self.slot.start + start, self.slot.start + stop), *others))
        whole = self.stored.read((slice(self.slot.start, self.slot.start + self.shape[0]), *others))
        return self.slot.from_stored(whole)[start:stop]


def tensor_layout(
    config: DecoderConfig,
    family: Family | None = None,
    prefix: str = "model.",
    head: str = HEADS[0],
    names: Collection[str] = (),
) -> dict[TreePath, list[Slot | ExpertSlot]]:
    """Return {path in the parameter tree: places of its tensors}: one per layer if layers are stacked, else one.

    A leaf of experts has one for each expert of each layer.

    Args:
        config: the decoder.
        family: its row of `FAMILIES`. None: Llama's names.
        prefix: what the names of the checkpoint begin with.
        head: name of the head.
        names: those in the checkpoint, as experts may have several. Empty: a new checkpoint.
    """
    family = family or FAMILIES["llama"]
    layout: dict[TreePath, list[Slot | ExpertSlot]] = {("embedding",): [Slot(f"{prefix}embed_tokens.weight")]}
    layout["final_norm", "scale"] = [Slot(f"{prefix}{family.modules.get('final_norm', 'norm')}.weight")]
    if not config.tied_head:
        layout["head",] = [Slot(head)]
    if config.per_layer_embeddings is not None:
        layout["per_layer", "embedding"] = [Slot(f"{prefix}embed_tokens_per_layer.weight")]
        layout["per_layer", "projection", "kernel"] = [Slot(f"{prefix}per_layer_model_projection.weight")]
        layout["per_layer", "scale"] = [Slot(f"{prefix}per_layer_projection_norm.weight")]
    for index, (own, place) in enumerate(zip(config.layers, config.layer_places, strict=True)):
        for path, slot in layer_slots(own, family).items():
            stored = dataclasses.replace(slot, name=f"{prefix}layers.{index}.{slot.name}")
            layout.setdefault((*place.path, *path[1:]), []).append(stored)
        if own.mlp == "experts":
            for name, slots in slots_of_experts(own, family, f"{prefix}layers.{index}.", names).items():
                layout.setdefault((*place.path, "experts", name), []).extend(slots)
    return layout


def slots_of_experts(
    config: DecoderConfig, family: Family, prefix: str, names: Collection[str]
) -> dict[str, list[Slot | ExpertSlot]]:
    """Return {leaf of the experts: its places in one layer}. The arguments are those of `expert_slots`."""
    experts, forms = config.experts, family.experts or FAMILIES["qwen3_moe"].experts
    assert experts is not None
    form = expert_form(forms, prefix, names)
    slots: dict[str, list[Slot | ExpertSlot]] = {"router": [Slot(f"{prefix}{form.router}.weight")]}
    if experts.biases:
        slots["router_bias"] = [Slot(f"{prefix}{form.router}.bias")]
    if experts.shared_gate:
        name, shape = f"{prefix}{form.shared_gate}.weight", (1, config.width)
        slots["shared_gate"] = [ExpertSlot(name, shape, 0, 0, 1, config.width, False)]
    for name, own in expert_slots(config, form, prefix).items():
        slots[name] = [*own]
    return slots


def layer_slots(config: DecoderConfig, family: Family) -> dict[TreePath, Slot]:
    """Return {"layers" and the path in a layer: its place there} of one of a decoder's `layers`."""
    modules = {**MODULES, **(POST_NORM_MODULES if config.post_norms else {}), **family.modules}
    slots: dict[TreePath, Slot] = {}
    for name, slot in projection_slots(config, family).items():
        parts = {"kernel": "weight"} | ({"bias": "bias"} if name in config.biases else {})
        for ours, theirs in parts.items():
            slots["layers", name, ours] = dataclasses.replace(slot, name=f"{slot.name}.{theirs}")
    norms: tuple[str, ...] = ("attention_norm", "mlp_norm") if config.pre_norms else ()
    norms += ("post_attention_norm", "post_mlp_norm") if config.post_norms else ()
    if config.qk_norm and config.mixer == "attention":
        norms += ("query_norm",) if config.shared_keys else ("query_norm", "key_norm")
    norms += ("post_per_layer_norm",) if config.per_layer_embeddings is not None else ()
    slots |= {("layers", name, "scale"): Slot(f"{modules[name]}.weight") for name in norms}
    if config.mixer == "conv" and config.short_conv is not None:
        parts = {"filters": "weight"} | ({"bias": "bias"} if config.short_conv.bias else {})
        slots |= {("layers", "conv", ours): Slot(f"{modules['conv']}.{theirs}") for ours, theirs in parts.items()}
    if config.mixer == "delta":
        parts = {"filters": "conv1d.weight", "decay_log": "A_log", "decay_bias": "dt_bias", "scale": "norm.weight"}
        slots |= {("layers", "delta", ours): Slot(f"{modules['delta']}.{theirs}") for ours, theirs in parts.items()}
    if config.sinks and config.mixer == "attention":
        slots["layers", "sinks"] = Slot("self_attn.sinks")
    if config.layer_scale:
        slots["layers", "layer_scale"] = Slot("layer_scalar")
    if config.activation == "xielu":
        slots |= {("layers", "xielu", name): Slot(f"mlp.act_fn.{name}") for name in ("alpha_p", "alpha_n")}
    return slots


def projection_slots(config: DecoderConfig, family: Family) -> dict[str, Slot]:
    """Return {projection: its place in a layer, without `.weight`}."""
    return {name: projection_slot(config, family, name) for name in config.projections}


def projection_slot(config: DecoderConfig, family: Family, name: str) -> Slot:
    """Return the place of a projection in a layer, without `.weight`."""
    heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(name, 0) if family.interleaved else 0
    for module, names in family.fused.items():
        if name in names:
            before = names[: names.index(name)]
            start = sum(config.projections[other][1] for other in before)
            return Slot(module, start, config.projections[name][1], heads)
    shared = family.experts[0].shared if family.experts and config.mlp == "experts" else {}
    return Slot(shared.get(name, family.modules.get(name, MODULES[name])), heads=heads)


def constants(config: DecoderConfig, prefix: str = "model.") -> dict[str, float]:
    """Return {name: value} of the numbers that a checkpoint holds and the decoder fixes: those of xIELU."""
    if config.activation != "xielu":
        return {}
    return {
        f"{prefix}layers.{i}.mlp.act_fn.{name}": value
        for i in range(config.num_layers)
        for name, value in (("beta", 0.5), ("eps", -1e-6))
    }


def is_unread(config: DecoderConfig, name: str) -> bool:
    """Return whether the decoder does not read a tensor of a text model. An export copies it.

    It is of keys that a layer has in the checkpoint, but reads from an earlier layer, or of a head for further tokens.
    """
    if FURTHER_TOKENS.match(name):
        return True
    layer = int(found[1]) if (found := OF_KEYS.search(name)) else config.num_layers
    return layer < config.num_layers and config.layers[layer].shared_keys


def find_prefix(names: Collection[str], wrapped: bool) -> tuple[str, str]:
    """Return the prefix of the text model's names in a checkpoint, and the name of its head.

    A prefix that no class of transformers writes is found by the embedding, as that of a compiled or wrapped module.
    """
    candidates = (*WRAPPED_PREFIXES, *PREFIXES) if wrapped else (*PREFIXES, *WRAPPED_PREFIXES)
    found = {name.removesuffix(EMBEDDING) for name in names if name.endswith(EMBEDDING)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    prefix = next((p for p in candidates if p in found), None)
    if prefix is None:
        others = sorted(prefix for prefix in found if not OTHER_PARTS.match(prefix))
        prefix = others[0] if len(others) == 1 else candidates[0]
    heads = [name for name in names if name == HEADS[0] or name.endswith(f".{HEADS[0]}")]
    return prefix, next((head for head in HEADS if head in heads), heads[0] if len(heads) == 1 else HEADS[0])
