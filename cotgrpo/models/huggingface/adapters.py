"""LoRA adapters in `peft`'s format: adapter_config.json and adapter_model.safetensors, written and read.

The format stores A and B per layer and transposed, `[rank, in]` and `[out, rank]`, under the names of Hugging Face's
modules. A setting of `peft` that this package does not support is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cotgrpo.atomic_files import whole_folder
from cotgrpo.models.huggingface.config import decoder_config, family_of, is_wrapped
from cotgrpo.models.huggingface.families import PROJECTIONS
from cotgrpo.models.huggingface.family import HfConfig, ModelError
from cotgrpo.models.huggingface.folder import (
    ADAPTER_FILES,
    ModelFolder,
    is_hub_id,
    local_folder,
    read_json_object,
    refuse_used,
)
from cotgrpo.models.huggingface.model_card import model_card
from cotgrpo.models.huggingface.safetensors_files import StoredTensor, list_tensors
from cotgrpo.models.huggingface.tensor_layout import Slot, TreePath, projection_slots
from cotgrpo.models.huggingface.weights import on_host
from cotgrpo.models.lora import Adapters, LoraConfig, flatten_adapters, kernels
from cotgrpo.types import Params

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
NAME = "base_model.model.{}layers.{}.{}.{}.weight"
NAMED = re.compile(
    r"base_model\.model\.(?:model|model\.language_model|language_model\.model)"
    r"\.layers\.(\d+)\.([\w.]+)\.(lora_[AB])\.weight"
)
PARTS = {"lora_A": "lora_a", "lora_B": "lora_b"}

READ = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"})
WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    # The tensors show what was adapted. The last three fields belong to methods that other fields turn on.
    | {"target_modules", "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"}
)
"""Fields of adapter_config.json with any value. All other fields must be off: false, null or empty."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
"""Initializations that keep the model's own weights. After others (pissa, olora, ...) the adapter fits changed ones."""


def save_adapter(
    folder: str | Path,
    adapters: Adapters,
    lora: LoraConfig,
    base_model_name: str | None = None,
    card: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    also: Callable[[Path], None] = lambda partial: None,
    hf_config: HfConfig | None = None,
) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` loads, atomically.

    With several processes all of them must call it, and process 0 writes.

    Args:
        folder: new or empty.
        adapters: what was trained.
        lora: what it was trained with.
        base_model_name: hub id or folder of the frozen model, for `peft`'s `AutoPeftModel`. None: left out.
        card: facts for a model card (`cotgrpo.models.huggingface.model_card.model_card`). None: no card.
        revision: the commit of the frozen model, if its name is a hub id.
        also: writes further files into the folder before it counts. Called on process 0.
        hf_config: config.json of the frozen model, for the names of its projections. None: Llama's names.

    Raises:
        ModelError: the folder is not empty, or the frozen model does not have an adapted projection.
    """
    folder = Path(folder)
    refuse_used(folder)
    pairs = flatten_adapters(adapters)
    slots, stacks = adapted_slots(hf_config), layers_by_stack(hf_config, pairs)
    names = set(PROJECTIONS) if hf_config is None else set(decoder_config(hf_config).projections)
    unknown = ["/".join(path) for path in pairs if path[:-1] not in stacks or path[-1] not in names]
    if unknown:
        raise ModelError(f"{unknown[0]} has no name in Hugging Face's models; expected layers/ and {names}.")
    refuse_fused([path[-1] for path in pairs if path[-1] not in slots], hf_config)
    prefix = "model." if hf_config is None or not is_wrapped(hf_config) else "model.language_model."
    tensors = {
        NAME.format(prefix, layer, slots[path[-1]].name, theirs): in_peft(slots[path[-1]], path, pair, ours, index)
        for path, pair in pairs.items()
        for theirs, ours in PARTS.items()
        for index, layer in enumerate(stacks[path[:-1]])
    }
    if jax.process_index() == 0:
        from safetensors.numpy import save_file

        with whole_folder(folder) as partial:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            text = json.dumps(adapter_config(pairs, lora, base_model_name, revision, slots), indent=2)
            (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            if card is not None:
                base = {"base_model": base_model_name} if base_model_name and is_hub_id(base_model_name) else {}
                text = model_card(folder.name, base | dict(card), library="peft")
                (partial / "README.md").write_text(text, encoding="utf-8")
            also(partial)
    return folder


def refuse_fused(names: Sequence[str], hf_config: HfConfig | None) -> None:
    """Raise ModelError if there are projections that share a module with others."""
    if names and hf_config is not None:
        raise ModelError(
            f"peft cannot load an adapter of {', '.join(names)} alone: a {hf_config['model_type']} model keeps several "
            "projections in one module. Export the merged weights."
        )


def adapted_slots(hf_config: HfConfig | None) -> dict[str, Slot]:
    """Return {projection: its place in a layer} of the projections that are modules of their own."""
    if hf_config is None:
        return {name: Slot(module) for name, module in PROJECTIONS.items()}
    slots = projection_slots(decoder_config(hf_config), family_of(hf_config))
    return {name: slot for name, slot in slots.items() if slot.rows is None}


def layers_by_stack(hf_config: HfConfig | None, found: Mapping[TreePath, Any]) -> dict[TreePath, list[int]]:
    """Return {path of stacked layers: their indices}.

    Args:
        hf_config: config.json of the frozen model. None: all layers are in one stack.
        found: {path of a projection: its kernel, or A and B}, which tell their number.
    """
    stacks: dict[TreePath, list[int]] = {}
    if hf_config is None:
        stacked = [one["lora_a"] if isinstance(one, Mapping) else one for one in found.values()]
        return {("layers",): list(range(stacked[0].shape[0] if stacked else 0))}
    for layer, place in enumerate(decoder_config(hf_config).layer_places):
        stacks.setdefault(place.path, []).append(layer)
    return stacks


def in_peft(slot: Slot, path: TreePath, pair: Mapping[str, Any], part: str, layer: int) -> np.ndarray:
    """Return A or B of one layer in the format's layout. B's rows are in the checkpoint's order."""
    array = on_host(path, pair[part], layer).T
    return np.ascontiguousarray(slot.to_stored(array) if part == "lora_b" else array)


def adapter_config(
    paths: Iterable[TreePath],
    lora: LoraConfig,
    base_model_name: str | None,
    revision: str | None = None,
    slots: Mapping[str, Slot] | None = None,
) -> dict[str, Any]:
    """Return adapter_config.json. A whole `alpha` is an integer, as `peft` declares it."""
    slots = slots or adapted_slots(None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": target_modules({path[-1] for path in paths}, slots),
    }


def target_modules(adapted: Set[str], slots: Mapping[str, Slot]) -> list[str]:
    """Return the names by which `peft` finds the adapted modules: the last part, unless another module has it too."""
    last = {name: slot.name.rpartition(".")[2] for name, slot in slots.items()}
    others = {last[name] for name in slots.keys() - adapted}
    return sorted({slots[name].name if last[name] in others else last[name] for name in adapted})


def load_adapter(folder: str | Path, params: Params, hf_config: HfConfig | None = None) -> tuple[Adapters, LoraConfig]:
    """Read an adapter that `peft` or `save_adapter` wrote.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        params: the parameters of the adapted model, or their `jax.eval_shape`.
        hf_config: its config.json, as for `save_adapter`.

    Returns:
        The adapters in float32 on JAX's default device, and the config. Its targets are the adapted projections.

    Raises:
        ModelError: a file is missing or corrupt, a setting is not supported, or the adapter belongs to another model.
    """
    folder = Path(folder)
    settings = read_json_object(folder / CONFIG_FILE)
    check_settings(settings, folder)
    stored = list_tensors(weights_path(folder))
    found = kernels(params)
    slots, stacks = adapted_slots(hf_config), layers_by_stack(hf_config, found)
    ours: dict[str, list[TreePath]] = {}
    for path in found:
        if path[:-1] in stacks and path[-1] in slots:
            ours.setdefault(slots[path[-1]].name, []).append(path)
    tensors: dict[TreePath, dict[tuple[str, int], StoredTensor]] = {}
    for name, tensor in stored.items():
        match = NAMED.fullmatch(name)
        if match is None or match[2] not in ours:
            raise ModelError(
                f"{folder}: {name} adapts a projection that this model does not have. It has {', '.join(ours)}."
            )
        paths = ours[match[2]]
        path = next((path for path in paths if int(match[1]) in stacks[path[:-1]]), paths[0])
        tensors.setdefault(path, {})[PARTS[match[3]], int(match[1])] = tensor
    if not tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no tensors: save the adapter again.")
    adapted = [path for path in found if path in tensors]
    lora = lora_config(settings, targets_of(adapted, found), folder)
    pairs = {}
    for path in adapted:
        layers, shape = stacks[path[:-1]], found[path].shape
        pairs[path] = read_pair(slots[path[-1]], tensors[path], layers, shape, lora.rank, folder)
    return unflatten_dict(pairs), lora


def targets_of(adapted: Sequence[TreePath], found: Collection[TreePath]) -> tuple[str, ...]:
    """Return patterns that match the adapted projections and no others: names, or else whole paths."""

    def pattern(path: TreePath) -> str:
        others = {own for own in found if re.search(path[-1], "/".join(own))} - set(adapted)
        return "/".join(path) + "$" if others else path[-1]

    return tuple(dict.fromkeys(map(pattern, adapted)))


def load_own_adapter(found: ModelFolder, params: Params) -> tuple[Adapters, LoraConfig]:
    """Read the adapter of a model that `open_folder` found it with. It is not merged.

    Raises:
        ModelError: as `load_adapter`, or the adapter is not there any more.
    """
    assert found.adapter is not None
    return load_adapter(local_folder(found.adapter), params, found.hf_config)


def weights_path(folder: Path) -> Path:
    """Return the path of adapter_model.safetensors. Pickled weights are never read."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = (
            " adapter_model.bin is a pickle and reading it can run any code: let peft save it as safetensors."
            if pickled
            else ""
        )
        raise ModelError(f"No {WEIGHTS_FILE} in {folder}: expected a folder that peft's save_pretrained wrote.{hint}")
    return path


def check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError if adapter_config.json has a setting that is not supported."""
    where = folder / CONFIG_FILE
    expected = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": PLAIN_INITS}
    for name, allowed in expected.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ModelError(f"{where}: unsupported {name} {settings[name]!r}; supported: {allowed}.")
    for name, value in settings.items():
        if name not in READ | WITHOUT_EFFECT and value:
            raise ModelError(f"{where}: unsupported setting {name} = {value!r}; supported: plain LoRA, without it.")


def lora_config(settings: Mapping[str, Any], targets: tuple[str, ...], folder: Path) -> LoraConfig:
    """Return the `LoraConfig` that adapter_config.json describes, with `peft`'s defaults."""
    try:
        return LoraConfig(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            targets=targets,
            rslora=settings.get("use_rslora", False),
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE}: {error}") from error


def read_pair(
    slot: Slot,
    tensors: Mapping[tuple[str, int], StoredTensor],
    layers: Sequence[int],
    kernel_shape: tuple[int, ...],
    rank: int,
    folder: Path,
) -> dict[str, Any]:
    """Return `lora_a` and `lora_b` of one projection, stacked over these layers."""
    _, inputs, outputs = kernel_shape
    shapes, module = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}, slot.name
    expected = {(part, layer) for part in shapes for layer in layers}
    if odd := sorted(expected ^ tensors.keys()):
        part, layer = odd[0]
        what = "lacks" if odd[0] in expected else "holds"
        alike = layers == list(range(len(layers)))
        which = f"{len(layers)} layers" if alike else f"it in the layers {', '.join(map(str, layers))}"
        raise ModelError(
            f"{folder} {what} {part} of layer {layer} of {module}, but this model has {which}, "
            "and an adapter must hold all of them."
        )
    for (part, layer), tensor in tensors.items():
        if tensor.shape != shapes[part]:
            raise ModelError(
                f"{folder}: {part} of layer {layer} of {module} has the shape {list(tensor.shape)}, but this model "
                f"and rank {rank} need {list(shapes[part])}: the adapter belongs to another model."
            )
    ordered = {"lora_a": lambda array: array, "lora_b": slot.from_stored}
    return {
        part: jnp.asarray(
            np.stack([ordered[part](tensors[part, layer].read()).T.astype(np.float32) for layer in layers])
        )
        for part in shapes
    }
