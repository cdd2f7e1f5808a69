"""Hugging Face models in and out: `load_pretrained` reads a folder or a hub id, `save_pretrained` writes a folder.

Weights are safetensors, never pickles, and no remote code is run. A process reads only the slices of its own shards,
one tensor at a time, and writes one file at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cotgrpo.atomic_files import whole_folder
from cotgrpo.models.config import Dtype, RematPolicy
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.models.huggingface.config import config_json, differences, family_of, is_wrapped
from cotgrpo.models.huggingface.dequantize.formats import (
    QUANTIZATIONS,
    QuantizationError,
    decode_tensors,
    named_dtype,
    original_dtype,
    quantization_of,
)
from cotgrpo.models.huggingface.dequantize.gguf_file import gguf_files, gguf_tensors
from cotgrpo.models.huggingface.dequantize.original import card_fields, name_original
from cotgrpo.models.huggingface.expert_layout import ExpertSlot, ExpertTensors, joined_experts, tensors_of_layers
from cotgrpo.models.huggingface.family import HfConfig, ModelError
from cotgrpo.models.huggingface.folder import ModelFolder, open_folder, refuse_used
from cotgrpo.models.huggingface.model_card import model_card
from cotgrpo.models.huggingface.pinned import other_files, tokenizer_files
from cotgrpo.models.huggingface.safetensors_files import (
    DTYPES,
    NewTensor,
    StoredTensor,
    find_tensors,
    has_safetensors,
    not_finite,
    write_tensors,
)
from cotgrpo.models.huggingface.tensor_layout import (
    EMBEDDING,
    OTHER_PARTS,
    WRAPPED_PREFIXES,
    Slot,
    SlotTensor,
    TreePath,
    constants,
    find_prefix,
    is_unread,
    tensor_layout,
)
from cotgrpo.models.lora import AdaptedParams, check_adapters, flatten_adapters, merge, refuse_quantized
from cotgrpo.models.memory import missing_memory
from cotgrpo.models.quantized.kernel import CODES, QUANTIZED_PARTS, Quantization
from cotgrpo.models.quantized.quantize import abstract_base, quantize_kernel, require_qwix
from cotgrpo.sharding import state_sharding
from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Shaped
    from transformers import PreTrainedTokenizerBase

    from cotgrpo.types import AnyArray, PyTree

DERIVED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors of older checkpoints that follow from the config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(ModelFolder):
    """A model from Hugging Face with its weights.

    Attributes:
        student: the functions that train steps take. Ids without a token are never drawn.
        params: the weights.
    """

    student: Student
    params: Params


def load_pretrained(
    folder_or_id: str | Path,
    dtype: Dtype | Literal["stored"] | None = None,
    mesh: Mesh | None = None,
    *,
    compute_dtype: Dtype | None = None,
    remat: RematPolicy = "dots",
    quantization: Quantization | None = None,
) -> Pretrained:
    """Read a model: config.json, safetensors (one file or shards), and the size of its vocabulary.

    Args:
        folder_or_id: a local folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct". A branch, tag or commit
            may follow: "owner/name@revision". The adapter in a folder that `peft` has written is merged into its model.
        dtype: storage type of the weights on the devices, "float32", "bfloat16" or "stored". None: float32, since
            weights that are trained in bfloat16 lose small updates (`cotgrpo.optimizers.with_rounding` mends that).
            That is twice the memory of a bfloat16 checkpoint. "stored": as in the checkpoint, float16 as float32.
        mesh: from `make_mesh`. Weights are sharded by `cotgrpo.sharding.PARAM_RULES`, and each process reads its own
            shards. None: on JAX's default device.
        compute_dtype: "float32" or "bfloat16". None: `dtype` if it is given, else as in the checkpoint.
        remat: as in `DecoderConfig`.
        quantization: how the kernels of all projections are stored, for QLoRA: `LoraConfig.quantization`. They are
            quantized layer by layer as they are read. Such parameters are the base of `AdaptedParams`. None: `dtype`.

    Raises:
        ModelError: the folder, its config, its weights or its tokenizer is missing, corrupt or unsupported.
    """
    found = open_folder(folder_or_id)
    if found.adapter is not None and quantization is not None:
        raise ModelError(
            f"{folder_or_id} is an adapter, which is not merged into quantized weights: load {found.name} and the "
            "adapter (load_adapter) apart, as AdaptedParams."
        )
    model = read_weights(found, dtype, mesh, compute_dtype=compute_dtype, remat=remat, quantization=quantization)
    return model if found.adapter is None else merge_own_adapter(model)


def merge_own_adapter(model: Pretrained) -> Pretrained:
    """Return a model with the adapter that it was found with merged into its weights."""
    from cotgrpo.models.huggingface.adapters import load_own_adapter  # which imports this file

    return dataclasses.replace(model, params=merge(model.params, *load_own_adapter(model, model.params)), adapter=None)


def read_weights(
    found: ModelFolder,
    dtype: Dtype | Literal["stored"] | None = None,
    mesh: Mesh | None = None,
    *,
    compute_dtype: Dtype | None = None,
    remat: RematPolicy = "dots",
    quantization: Quantization | None = None,
) -> Pretrained:
    """Read the weights of a model that is open, without an adapter's. The others are those of `load_pretrained`."""
    folder = found.weights_folder()
    tensors = checkpoint_tensors(found)
    layout, fixed = checkpoint_layout(found, tensors)
    check_tensors(found.config, layout, fixed, tensors, folder, is_wrapped(found.hf_config))
    stored = tensors[layout["embedding",][0].name].dtype
    own: Dtype = "bfloat16" if stored == jnp.bfloat16 else "float32"
    param_dtype: Dtype = "float32" if dtype is None else own if dtype == "stored" else dtype
    computed = compute_dtype or (own if dtype is None else param_dtype)
    config = dataclasses.replace(found.config, param_dtype=param_dtype, dtype=computed, remat=remat)
    return Pretrained(
        config=config,
        student=make_student(config, found.own_vocab_size()),
        params=read_params(config, layout, tensors, mesh, quantization),
        folder=found.folder,
        hf_config=found.hf_config,
        generation_config=found.generation_config,
        hub_id=found.hub_id,
        revision=found.revision,
        base=found.base,
        adapter=found.adapter,
        tokenizer_from=found.tokenizer_from,
    )


def names_by_path(config: DecoderConfig) -> dict[TreePath, list[str]]:
    """Return {path in the parameter tree: names of its tensors}: one per layer if layers are stacked, else one."""
    named = tensor_layout(config).items()
    return {path: list(dict.fromkeys(slot.name for slot in slots)) for path, slots in named}


def checkpoint_tensors(found: ModelFolder) -> dict[str, StoredTensor]:
    """Return the tensors of a model by the names that they have in a checkpoint that is not quantized.

    Raises:
        ModelError: files are missing or corrupt, or quantized in a way that is not read.
    """
    folder = found.weights_folder()
    if not has_safetensors(folder) and (paths := gguf_files(folder)):
        names = stored_shapes(found.config, tensor_layout(found.config, family_of(found.hf_config)))
        return dict(gguf_tensors(paths, found.config, names, original_dtype(found.hf_config)))
    try:
        return decode_tensors(find_tensors(folder), found.hf_config)
    except QuantizationError as error:
        raise QuantizationError(f"{error}{name_original(folder, found.name)}") from error


def checkpoint_layout(
    found: ModelFolder, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[TreePath, list[Slot | ExpertSlot]], dict[str, float]]:
    """Return the places of the parameters in a checkpoint, and the numbers that it holds besides."""
    prefix, head = find_prefix(tensors, is_wrapped(found.hf_config))
    layout = tensor_layout(found.config, family_of(found.hf_config), prefix, head, tensors)
    return layout, constants(found.config, prefix)


@functools.cache
def abstract_params(config: DecoderConfig) -> Params:
    """Return the shapes and dtypes of the parameter tree."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def is_transposed(path: TreePath) -> bool:
    """Return whether checkpoints store the leaf transposed: kernels and the head are `[outputs, inputs]` there."""
    return path[-1] in ("kernel", "head", "router")


def stored_shape(path: TreePath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a checkpoint of one tensor of the leaf at `path`."""
    shape = shape[1:] if path[0] == "layers" else shape
    return shape[::-1] if is_transposed(path) else shape


def leaves_by_path(tree: PyTree) -> dict[TreePath, Any]:
    """Return the leaves of a tree of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def stored_shapes(
    config: DecoderConfig, layout: Mapping[TreePath, list[Slot | ExpertSlot]]
) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a checkpoint's tensors. A fused one has the rows of all its parts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves_by_path(abstract_params(config)).items():
        rows, *others = stored_shape(path, leaf.shape)
        for slot in layout[path]:
            if isinstance(slot, ExpertSlot):
                shapes[slot.name] = slot.shape
                continue
            shapes[slot.name] = (shapes.get(slot.name, (0,))[0] + rows, *others)
    return shapes


def check_tensors(
    config: DecoderConfig,
    layout: Mapping[TreePath, list[Slot | ExpertSlot]],
    fixed: Mapping[str, float],
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    wrapped: bool = False,
) -> None:
    """Check that the checkpoint holds the tensors of the config, in its shapes, and no others.

    Args:
        config: the decoder.
        layout: places of its parameters.
        fixed: numbers that the checkpoint holds and the decoder does not read.
        tensors: the checkpoint.
        folder: of the checkpoint, for errors.
        wrapped: whether the checkpoint may hold the other parts of a model with images.

    Raises:
        ModelError: names the tensors that are missing, unexpected or of another shape.
    """
    expected = stored_shapes(config, layout)
    embedding = layout["embedding",][0].name
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and name not in fixed and not DERIVED.search(name)]
    wrapped = wrapped or embedding.startswith(WRAPPED_PREFIXES)
    extra = [name for name in extra if not (wrapped and OTHER_PARTS.match(name)) and not is_zero_bias(tensors[name])]
    extra = [name for name in extra if not is_unread(config, name)]
    for head in {"lm_head.weight", find_prefix(tensors, wrapped)[1]}:
        if config.tied_head and head in extra and embedding in tensors:
            check_tied_head(tensors[head], tensors[embedding], folder)
            extra.remove(head)
    for found, what in ((missing, "lacks"), (extra, "holds unexpected")):
        if found:
            listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise ModelError(f"The checkpoint in {folder} {what} {listed}: it does not belong to its config.json.")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"{folder}: {name} has the shape {list(tensors[name].shape)}, but config.json needs {list(shape)}."
            )
        if tensors[name].dtype not in DTYPES.values():
            raise QuantizationError(
                f"{folder}: {name} is stored as {tensors[name].dtype}; supported: {', '.join(DTYPES)}. If it is "
                "quantized, config.json and the parts next to it do not tell how. Use the model in bfloat16."
                f"{name_original(folder, folder.name)}"
            )
    for name, value in fixed.items():
        if name in tensors and not np.allclose(tensors[name].read().astype(np.float32), value, rtol=1e-2, atol=0):
            raise ModelError(f"{folder}: {name} is {tensors[name].read()}; supported: {value}.")


def is_zero_bias(tensor: StoredTensor) -> bool:
    """Return whether a tensor is a bias that adds nothing. GPTQ writes one for each layer without a bias."""
    return tensor.name.endswith(".bias") and len(tensor.shape) == 1 and not tensor.read().any()


def check_tied_head(head: StoredTensor, embedding: StoredTensor, folder: Path) -> None:
    """Raise ModelError if a head that is stored next to the embedding it is tied to differs from it."""
    if head.shape != embedding.shape or head.read().tobytes() != embedding.read().tobytes():
        raise ModelError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but {head.name} differs "
            f"from {embedding.name}. Set tie_word_embeddings to false to keep both, or remove {head.name}."
        )


def read_params(
    config: DecoderConfig,
    layout: Mapping[TreePath, list[Slot | ExpertSlot]],
    tensors: Mapping[str, StoredTensor],
    mesh: Mesh | None,
    quantization: Quantization | None = None,
) -> Params:
    """Return the parameter tree, filled tensor by tensor on the devices.

    Large leaves come first, while there is most room for copies.

    Raises:
        ModelError: a kernel that cannot be quantized, or less free memory than the weights take.
    """
    tree = abstract_params(config)
    leaves = leaves_by_path(tree)
    if quantization is not None:
        try:
            require_qwix()
            tree = abstract_base(tree, *quantization)
        except ValueError as error:
            raise ModelError(str(error)) from error
    parts = leaves_by_path(tree)
    shardings = leaves_by_path(state_sharding(tree, mesh)) if mesh is not None else dict.fromkeys(parts)
    if missing := missing_memory(parts, shardings):
        raise ModelError(
            f"The weights take {missing}. Store them in bfloat16 (student.param_dtype), shard them over more devices "
            "(mesh.fsdp, mesh.tensor), quantize a frozen base (lora.quantize_base), or take a smaller model."
        )
    filled: dict[str, Any] = {}
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        stored = slot_tensors(leaves[path], layout[path], tensors)
        inner = filled
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        if path in parts:
            inner[path[-1]] = read_leaf(path, leaves[path], stored, shardings[path])
            continue
        assert quantization is not None
        own = {
            name: (part, shardings[*path[:-1], name])
            for name in QUANTIZED_PARTS
            if (part := parts.get((*path[:-1], name)))
        }
        inner |= read_quantized([one for one in stored if isinstance(one, SlotTensor)], own, quantization)
    return jax.tree.map(lambda _, leaf: leaf, tree, filled)  # in the order of `init_params`


def slot_tensors(
    leaf: jax.ShapeDtypeStruct, slots: Sequence[Slot | ExpertSlot], tensors: Mapping[str, StoredTensor]
) -> Sequence[SlotTensor | ExpertTensors]:
    """Return what each layer of a leaf holds."""
    experts = [slot for slot in slots if isinstance(slot, ExpertSlot)]
    if experts:
        return tensors_of_layers(leaf.shape, experts, tensors)
    return [SlotTensor(slot, tensors[slot.name]) for slot in slots if isinstance(slot, Slot)]


def read_leaf(
    path: TreePath,
    leaf: jax.ShapeDtypeStruct,
    stored: Sequence[SlotTensor | ExpertTensors],
    sharding: NamedSharding | None,
) -> Array:
    """Return one leaf of the tree, read whole or layer by layer."""
    if path[0] != "layers":
        return read_tensor(stored[0], is_transposed(path), leaf.dtype, sharding)
    per_layer = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stacked = zeros(leaf.shape, leaf.dtype, sharding)
    for layer, tensor in enumerate(stored):
        one = read_tensor(tensor, is_transposed(path), leaf.dtype, per_layer)
        stacked = set_layer(stacked, one, layer, sharding)
        stacked.block_until_ready()  # so that no second tensor waits in host memory
    return stacked


def read_quantized(
    stored: Sequence[SlotTensor],
    parts: Mapping[str, tuple[jax.ShapeDtypeStruct, NamedSharding | None]],
    quantization: Quantization,
) -> dict[str, Array]:
    """Return what stands in place of a stacked kernel. Each layer is read in float32 and quantized on the devices.

    `parts` has the shape and the sharding of each array.
    """
    whole = {name: zeros(part.shape, part.dtype, sharding) for name, (part, sharding) in parts.items()}
    sharding = next(sharding for name, (_, sharding) in parts.items() if name in CODES)
    per_layer = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for layer, tensor in enumerate(stored):
        one = quantize_kernel(read_tensor(tensor, True, np.dtype(np.float32), per_layer), *quantization)
        whole = {name: set_layer(array, one[name], layer, parts[name][1]) for name, array in whole.items()}
        jax.block_until_ready(whole)  # so that no second tensor waits in host memory
    return whole


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> Array:
    """Return sharded zeros, made on the devices."""
    return lay_out(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def set_layer(
    stacked: Shaped[Array, "L ..."],
    one: Shaped[Array, "..."],
    layer: int | Int[Array, ""],
    sharding: NamedSharding | None,
) -> Shaped[Array, "L ..."]:
    """Return `stacked` with `one` at `layer`, in the same memory."""
    return lay_out(jax.lax.dynamic_update_index_in_dim(stacked, one, layer, 0), sharding)


def lay_out(x: Shaped[Array, "..."], sharding: NamedSharding | None) -> Shaped[Array, "..."]:
    """Constrain x to a sharding, if there is one."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def read_tensor(
    tensor: SlotTensor | ExpertTensors, transposed: bool, dtype: np.dtype, sharding: NamedSharding | None
) -> Array:
    """Return one stored tensor on the devices. Each slice that this process's devices hold is read once."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        part = tensor.read(index[::-1] if index is not None and transposed else index)
        check_finite(part, tensor)
        part = part.astype(dtype, copy=False)
        return part.T if transposed else part

    if sharding is None:
        return jax.device_put(read(None))
    parts: dict[str, np.ndarray] = {}

    def read_once(index: tuple[slice, ...] | None) -> np.ndarray:
        key = str(index)  # slices are not hashable in Python 3.11
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(tensor.shape[:: -1 if transposed else 1], sharding, read_once)


def check_finite(part: np.ndarray, tensor: SlotTensor | ExpertTensors) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    if (value := not_finite(part)) is None:
        return
    stored = [tensor.stored] if isinstance(tensor, SlotTensor) else list(tensor.stored)
    ruined = next((one for one in stored if not_finite(one.read()) is not None), stored[0])
    raise ModelError(
        f"{ruined.path}: {ruined.name} holds {value}. No training recovers from it: download the model again, or use "
        "the weights of an earlier step."
    )


def save_pretrained(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    source: ModelFolder | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    also: Callable[[Path], None] = lambda partial: None,
) -> Path:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, atomically.

    With several processes all of them must call it, and process 0 writes.

    Args:
        folder: new or empty.
        config: the decoder's shape.
        params: its weights. `AdaptedParams` of `cotgrpo.models.lora` are merged in float32, one tensor at a time, and
            rounded once to the stored type.
        source: the model that training started from. Its config.json, generation_config.json, tokenizer and chat
            template are copied. None: config.json is that of the first family that can express `config`.
        tokenizer: a `transformers` tokenizer, saved instead of the source's files.
        generation_config: fields of generation_config.json. They override those of the source and the tokenizer.
        card: facts for the model card (`cotgrpo.models.huggingface.model_card.model_card`).
        dtype: "float32", "bfloat16" or "float16". None: that of the source, or without one as in `params`.
        max_shard_bytes: larger weights are split into several files. Process 0 holds one file in memory at a time.
        also: writes further files into the folder before it counts. Called on process 0.

    Raises:
        ModelError: the folder is not empty, the parameters or the tokenizer belong to another model, `config` differs
            from the source's, or a number is NaN, infinite or too large for `dtype`.
    """
    folder = Path(folder)
    refuse_used(folder)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ModelError(f"The tokenizer has {len(tokenizer)} tokens, but the embedding has {config.vocab_size} rows.")
    hf = dict(source.hf_config) if source else config_json(config)
    if source and (found := differences(config, hf)):
        raise ModelError(f"The config is not that of {source.folder}: {'; '.join(found)}.")
    base = {} if source is None else {"base_model": source.hub_id, "license": license_of(source)}
    readme = model_card(folder.name, base | dict(card or {}))
    dtype = dtype or (stored_dtype(source) if source is not None else None)
    tensors, others = new_tensors(config, params, dtype, hf, source)
    hf = exported_config(hf, str(tensors[0].dtype))
    if jax.process_index() == 0:
        with whole_folder(folder) as partial:
            write_tensors(partial, [*tensors, *others], max_shard_bytes)
            write_configs(partial, hf, source, tokenizer, generation_config or {})
            (partial / "README.md").write_text(readme, encoding="utf-8")
            also(partial)
    else:
        for tensor in tensors:
            tensor.array()  # takes part in gathering the tensor
    return folder


def license_of(source: ModelFolder) -> str | None:
    """Return the license that the model card of a source names, or None."""
    name = card_fields(source.folder).get("license")
    return name if isinstance(name, str) else None


def stored_dtype(source: ModelFolder) -> str | None:
    """Return the number type of a model's weights, as config.json or else its embedding has it; None if unknown."""
    if (named := named_dtype(source.hf_config)) is not None:
        return str(named)
    if quantization_of(source.hf_config) is not None:
        return "bfloat16"
    try:
        tensors = checkpoint_tensors(source)
    except ModelError:  # the weights are gone, and only the copies of the small files are left
        return None
    prefix, _ = find_prefix(tensors, is_wrapped(source.hf_config))
    embedding = tensors.get(f"{prefix}{EMBEDDING}")
    return None if embedding is None or embedding.dtype not in DTYPES.values() else str(embedding.dtype)


def exported_config(hf: HfConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of an export: with its number type, without a quantization and names of code."""
    before = hf.get("dtype", hf.get("torch_dtype"))
    left_out = {"auto_map", *QUANTIZATIONS}
    hf = {name: value for name, value in hf.items() if name not in left_out}
    hf |= dict.fromkeys({"dtype", "torch_dtype"} & set(hf) or {"dtype"}, dtype)
    if is_wrapped(hf):
        text = {name: value for name, value in hf["text_config"].items() if name not in QUANTIZATIONS}
        hf["text_config"] = text | {
            name: dtype for name in ("dtype", "torch_dtype") if name in text and text[name] == before
        }
    return hf


def new_tensors(
    config: DecoderConfig, params: Params, dtype: str | None, hf: HfConfig, source: ModelFolder | None
) -> tuple[list[NewTensor], list[NewTensor]]:
    """Return the tensors of a checkpoint. Each is fetched from the devices when it is written.

    The second list holds the other parts of a model with images, as they are in the source.
    """
    pairs: dict[TreePath, dict[str, Array]] = {}
    scale = 1.0
    if isinstance(params, AdaptedParams):
        check_adapters(params.base, params.adapters, params.lora)
        refuse_quantized(params.base)
        params, pairs, scale = params.base, flatten_adapters(params.adapters), params.lora.scale
    leaves, abstract = leaves_by_path(params), leaves_by_path(abstract_params(config))
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: leaf.shape for path, leaf in abstract.items()}:
        wrong = sorted({(p, x.shape) for p, x in leaves.items()} ^ {(p, x.shape) for p, x in abstract.items()})[0]
        raise ModelError(
            f"The parameters do not belong to the config: only one of them has {'/'.join(wrong[0])} {list(wrong[1])}."
        )
    known = {str(kind): kind for kind in DTYPES.values()}
    if dtype is not None and dtype not in known:
        raise ModelError(f"dtype must be one of {', '.join(known)} or None, got {dtype!r}.")
    if source is not None and (is_wrapped(hf) or config.delta_net is not None):
        stored = checkpoint_tensors(source)
        layout, fixed = checkpoint_layout(source, stored)
    else:
        stored, layout, fixed = {}, tensor_layout(config, family_of(hf)), constants(config)
    parts: dict[str, list[tuple[np.dtype, Callable[[], np.ndarray]]]] = {}
    of_experts: dict[str, list[tuple[ExpertSlot, Callable[[], np.ndarray]]]] = {}
    for path, slots in layout.items():
        for layer, slot in enumerate(slots):
            if isinstance(slot, ExpertSlot):
                gathered = functools.partial(on_host, path, leaves[path], index_of(layer, leaves[path].shape))
                of_experts.setdefault(slot.name, []).append((slot, gathered))
                continue
            read = (
                functools.partial(on_host, path, leaves[path], layer)
                if path[-1] != "kernel" or path[:-1] not in pairs
                else functools.partial(merged_on_host, path, leaves[path], pairs[path[:-1]], scale, layer)
            )
            own = np.dtype(leaves[path].dtype) if dtype is None else known[dtype]
            own = np.dtype(np.float32) if is_kept_wide(stored, slot.name, layout) else own
            parts.setdefault(slot.name, []).append((own, functools.partial(in_slot, slot, read)))
    shapes = stored_shapes(config, layout)
    tensors = [
        NewTensor(name, own[0][0], shapes[name], functools.partial(joined, [read for _, read in own]))
        for name, own in parts.items()
    ]
    tensors += [
        NewTensor(name, tensors[0].dtype, own[0][0].shape, functools.partial(joined_experts, own))
        for name, own in of_experts.items()
    ]
    tensors += [
        NewTensor(name, tensors[0].dtype, (), functools.partial(np.array, value, np.float32))
        for name, value in fixed.items()
    ]
    kept = [name for name in stored if OTHER_PARTS.match(name) or is_unread(config, name)]
    others = [NewTensor(name, stored[name].dtype, stored[name].shape, stored[name].read, copied=True) for name in kept]
    return tensors, others


def is_kept_wide(
    stored: Mapping[str, StoredTensor], name: str, layout: Mapping[TreePath, Sequence[Slot | ExpertSlot]]
) -> bool:
    """Return whether a checkpoint of a narrower type holds a tensor in float32, as the decays of Qwen3.5."""
    embedding = stored.get(layout["embedding",][0].name)
    return embedding is not None and name in stored and stored[name].dtype == np.float32 != embedding.dtype


def index_of(slot: int, shape: tuple[int, ...]) -> int | tuple[int, int]:
    """Return the index of an expert's part in a stacked leaf of this shape: (layer, expert), or the layer alone."""
    return slot if len(shape) == 2 else divmod(slot, shape[1])


def in_slot(slot: Slot, read: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a tensor of the tree with its rows in the checkpoint's order."""
    return slot.to_stored(read())


def joined(parts: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    """Return a stored tensor from its parts, which follow each other row by row."""
    arrays = [part() for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def on_host(path: TreePath, leaf: Shaped[AnyArray, "..."], layer: int | tuple[int, int]) -> np.ndarray:
    """Return one tensor in a checkpoint's layout, gathered from all devices. `layer` may be (layer, expert)."""
    leaf = leaf[layer] if path[0] == "layers" else leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    return array.T if is_transposed(path) else array


def merged_on_host(
    path: TreePath, kernel: Shaped[AnyArray, "..."], pair: Mapping[str, AnyArray], scale: float, layer: int
) -> np.ndarray:
    """Return `W + scale A B` of one layer in float32, in a checkpoint's layout."""
    a, b = (on_host((*path[:-1], part), pair[part], layer).astype(np.float32) for part in ("lora_a", "lora_b"))
    w = on_host(path, kernel, layer).astype(np.float32)
    return w + scale * (a @ b).T


def write_configs(
    folder: Path,
    hf: HfConfig,
    source: ModelFolder | None,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any],
) -> None:
    """Write config.json, generation_config.json, and the files of the tokenizer and its chat template."""
    generation = dict((source and source.generation_config) or {})
    if tokenizer is not None:
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        ids = {name: i for name, i in ids.items() if i is not None}
        generation, hf = ids | generation, ids | {name: x for name, x in hf.items() if x is not None or name not in ids}
        tokenizer.save_pretrained(folder)
    if source is not None:
        files = other_files(source.folder) + (tokenizer_files(source.tokenizer_folder) if tokenizer is None else [])
        for path in files:
            shutil.copyfile(path, folder / path.name)
    generation |= generation_config
    for name, value in (("config.json", hf), ("generation_config.json", generation)):
        if value:
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
