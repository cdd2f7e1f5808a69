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
from cotgrpo.models.huggingface.dequantize.formats import QuantizationError, decode_tensors
from cotgrpo.models.huggingface.dequantize.original import name_original
from cotgrpo.models.huggingface.family import HfConfig, ModelError
from cotgrpo.models.huggingface.folder import ModelFolder, open_folder, refuse_used
from cotgrpo.models.huggingface.model_card import model_card
from cotgrpo.models.huggingface.pinned import PROCESSOR_FILES, TOKENIZER_FILES
from cotgrpo.models.huggingface.safetensors_files import DTYPES, NewTensor, StoredTensor, find_tensors, write_tensors
from cotgrpo.models.huggingface.tensor_layout import (
    OTHER_PARTS,
    WRAPPED_PREFIXES,
    Slot,
    SlotTensor,
    TreePath,
    constants,
    find_prefix,
    tensor_layout,
)
from cotgrpo.models.lora import AdaptedParams, check_adapters, flatten_adapters, refuse_quantized
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
PIECE = 2**22
"""Numbers that are checked at a time."""


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
            may follow: "owner/name@revision".
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
    return read_weights(found, dtype, mesh, compute_dtype=compute_dtype, remat=remat, quantization=quantization)


def read_weights(
    found: ModelFolder,
    dtype: Dtype | Literal["stored"] | None = None,
    mesh: Mesh | None = None,
    *,
    compute_dtype: Dtype | None = None,
    remat: RematPolicy = "dots",
    quantization: Quantization | None = None,
) -> Pretrained:
    """Read the weights of a model that is open. The other arguments are those of `load_pretrained`."""
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
    )


def names_by_path(config: DecoderConfig) -> dict[TreePath, list[str]]:
    """Return {path in the parameter tree: names of its tensors}: one per layer if layers are stacked, else one."""
    return {path: [slot.name for slot in slots] for path, slots in tensor_layout(config).items()}


def checkpoint_tensors(found: ModelFolder) -> dict[str, StoredTensor]:
    """Return the tensors of a model by the names that they have in a checkpoint that is not quantized.

    Raises:
        ModelError: files are missing or corrupt, or quantized in a way that is not read.
    """
    folder = found.weights_folder()
    try:
        return decode_tensors(find_tensors(folder), found.hf_config)
    except QuantizationError as error:
        raise QuantizationError(f"{error}{name_original(folder, found.name)}") from error


def checkpoint_layout(
    found: ModelFolder, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[TreePath, list[Slot]], dict[str, float]]:
    """Return the places of the parameters in a checkpoint, and the numbers that it holds besides."""
    prefix, head = find_prefix(tensors, is_wrapped(found.hf_config))
    layout = tensor_layout(found.config, family_of(found.hf_config), prefix, head)
    return layout, constants(found.config, prefix)


@functools.cache
def abstract_params(config: DecoderConfig) -> Params:
    """Return the shapes and dtypes of the parameter tree."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def is_transposed(path: TreePath) -> bool:
    """Return whether checkpoints store the leaf transposed: kernels and the head are `[outputs, inputs]` there."""
    return path[-1] in ("kernel", "head")


def stored_shape(path: TreePath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a checkpoint of one tensor of the leaf at `path`."""
    shape = shape[1:] if path[0] == "layers" else shape
    return shape[::-1] if is_transposed(path) else shape


def leaves_by_path(tree: PyTree) -> dict[TreePath, Any]:
    """Return the leaves of a tree of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def stored_shapes(config: DecoderConfig, layout: Mapping[TreePath, list[Slot]]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a checkpoint's tensors. A fused one has the rows of all its parts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves_by_path(abstract_params(config)).items():
        rows, *others = stored_shape(path, leaf.shape)
        for slot in layout[path]:
            shapes[slot.name] = (shapes.get(slot.name, (0,))[0] + rows, *others)
    return shapes


def check_tensors(
    config: DecoderConfig,
    layout: Mapping[TreePath, list[Slot]],
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
    layout: Mapping[TreePath, list[Slot]],
    tensors: Mapping[str, StoredTensor],
    mesh: Mesh | None,
    quantization: Quantization | None = None,
) -> Params:
    """Return the parameter tree, filled tensor by tensor on the devices.

    Large leaves come first, while there is most room for copies.

    Raises:
        ModelError: a kernel that cannot be quantized.
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
    filled: dict[str, Any] = {}
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        stored = [SlotTensor(slot, tensors[slot.name]) for slot in layout[path]]
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
        inner |= read_quantized(stored, own, quantization)
    return jax.tree.map(lambda _, leaf: leaf, tree, filled)  # in the order of `init_params`


def read_leaf(
    path: TreePath, leaf: jax.ShapeDtypeStruct, stored: Sequence[SlotTensor], sharding: NamedSharding | None
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


def read_tensor(tensor: SlotTensor, transposed: bool, dtype: np.dtype, sharding: NamedSharding | None) -> Array:
    """Return one stored tensor on the devices. Each slice that this process's devices hold is read once."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        part = tensor.read(index[::-1] if index is not None and transposed else index)
        check_finite(part, tensor.stored)
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


def check_finite(part: np.ndarray, stored: StoredTensor) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    if (value := not_finite(part)) is not None:
        raise ModelError(
            f"{stored.path}: {stored.name} holds {value}. No training recovers from it: download the model again, or "
            "use the weights of an earlier step."
        )


def not_finite(array: np.ndarray) -> str | None:
    """Return "nan", "inf" or "-inf" if an array holds one, else None. It is looked at piece by piece."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE].astype(np.float32, copy=False)
        if not np.isfinite(piece).all():
            return str(piece[~np.isfinite(piece)][0])
    return None


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
        dtype: "float32", "bfloat16" or "float16". None: as in `params`.
        max_shard_bytes: larger weights are split into several files. Process 0 holds one file in memory at a time.
        also: writes further files into the folder before it counts. Called on process 0.

    Raises:
        ModelError: the folder is not empty, the parameters or the tokenizer belong to another model, or `config`
            differs from the source's.
    """
    folder = Path(folder)
    refuse_used(folder)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ModelError(f"The tokenizer has {len(tokenizer)} tokens, but the embedding has {config.vocab_size} rows.")
    hf = dict(source.hf_config) if source else config_json(config)
    if source and (found := differences(config, hf)):
        raise ModelError(f"The config is not that of {source.folder}: {'; '.join(found)}.")
    base = {"base_model": source.hub_id} if source and source.hub_id else {}
    readme = model_card(folder.name, base | dict(card or {}))
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


def exported_config(hf: HfConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of an export: with its number type, and without the names of code that is not copied."""
    before = hf.get("dtype", hf.get("torch_dtype"))
    hf = {name: value for name, value in hf.items() if name != "auto_map"}
    hf |= dict.fromkeys({"dtype", "torch_dtype"} & set(hf) or {"dtype"}, dtype)
    if is_wrapped(hf):
        text = dict(hf["text_config"])
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
    if source is not None and is_wrapped(hf):
        stored = find_tensors(source.weights_folder())
        layout, fixed = checkpoint_layout(source, stored)
    else:
        stored, layout, fixed = {}, tensor_layout(config, family_of(hf)), constants(config)
    parts: dict[str, list[tuple[np.dtype, Callable[[], np.ndarray]]]] = {}
    for path, slots in layout.items():
        for layer, slot in enumerate(slots):
            read = (
                functools.partial(on_host, path, leaves[path], layer)
                if path[-1] != "kernel" or path[:-1] not in pairs
                else functools.partial(merged_on_host, path, leaves[path], pairs[path[:-1]], scale, layer)
            )
            own = np.dtype(leaves[path].dtype) if dtype is None else known[dtype]
            parts.setdefault(slot.name, []).append((own, functools.partial(in_slot, slot, read)))
    shapes = stored_shapes(config, layout)
    tensors = [
        NewTensor(name, own[0][0], shapes[name], functools.partial(joined, [read for _, read in own]))
        for name, own in parts.items()
    ]
    tensors += [
        NewTensor(name, tensors[0].dtype, (), functools.partial(np.array, value, np.float32))
        for name, value in fixed.items()
    ]
    others = [NewTensor(name, t.dtype, t.shape, t.read) for name, t in stored.items() if OTHER_PARTS.match(name)]
    return tensors, others


def in_slot(slot: Slot, read: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a tensor of the tree with its rows in the checkpoint's order."""
    return slot.to_stored(read())


def joined(parts: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    """Return a stored tensor from its parts, which follow each other row by row."""
    arrays = [part() for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def on_host(path: TreePath, leaf: Shaped[AnyArray, "..."], layer: int) -> np.ndarray:
    """Return one tensor in a checkpoint's layout, gathered from all devices."""
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
    elif source is not None:
        for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
    generation |= generation_config
    for name, value in (("config.json", hf), ("generation_config.json", generation)):
        if value:
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
