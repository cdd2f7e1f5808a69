"""A Hugging Face model folder without its weights: its path, config, generation config and vocabulary."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import is_special, read_json
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.config import decoder_config, family_of
from cotgrpo.models.huggingface.dequantize.formats import QuantizationError
from cotgrpo.models.huggingface.dequantize.original import name_original
from cotgrpo.models.huggingface.family import HfConfig, ModelError
from cotgrpo.models.huggingface.safetensors_files import refuse_pointer

LICENSES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""What the names of files with a license begin with. An export has to keep them."""
HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"),
    *(f"{name}*" for name in LICENSES),
)
"""Files of a hub id that are downloaded."""


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What `peft` writes of an adapter."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model from Hugging Face without its weights.

    Attributes:
        config: the decoder's shape. For another remat or compute type, `dataclasses.replace` it and call
            `make_student`.
        folder: path of the files. `cotgrpo.data.tokenizer.load_tokenizer(folder)` loads the tokenizer.
        hf_config: config.json.
        generation_config: generation_config.json, or None.
        hub_id: the hub id, or None for a local folder.
        revision: the commit of a hub id, or None.
        base: folder or hub id with the weights, if `folder` is a run's copy of the other files; else None.
        recorded: the fingerprint of the model that a run started from, or None.
        adapter: folder or hub id of an adapter (LoRA) that belongs on top of the weights, or None.
        tokenizer_from: folder of the tokenizer, if an adapter brings its own; else None.
    """

    config: DecoderConfig
    folder: Path
    hf_config: HfConfig
    generation_config: HfConfig | None = None
    hub_id: str | None = None
    revision: str | None = None
    base: str | None = None
    recorded: Mapping[str, str] | None = None
    adapter: str | None = None
    tokenizer_from: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.tokenizer_from or self.folder

    @property
    def name(self) -> str:
        """The hub id or the folder of the model."""
        return self.hub_id or self.base or str(self.folder)

    def weights_folder(self) -> Path:
        """Return the folder of the weights. Those of a hub id that are not in the cache are downloaded.

        Raises:
            ModelError: the model is not there any more.
        """
        return self.folder if self.base is None else local_folder(self.base)

    def vocab_size(self, vocabulary: Mapping[str, int], path: str | Path) -> int:
        """Return the number of ids that a tokenizer's vocabulary uses. The embedding may have more rows.

        Args:
            vocabulary: {token: id}.
            path: of the tokenizer, for the error.

        Raises:
            ModelError: an id is beyond the embedding.
        """
        without = family_of(self.hf_config).without_embedding
        ids = {token: i for token, i in vocabulary.items() if token not in without}
        last = max(ids, key=lambda token: ids[token])
        if ids[last] >= self.config.vocab_size:
            raise ModelError(
                f"{path} gives {last!r} the id {ids[last]}, but the embedding has {self.config.vocab_size} rows: "
                "use the tokenizer that belongs to the model, or a model whose embedding was enlarged for this one."
            )
        return ids[last] + 1

    def own_vocab_size(self) -> int | None:
        """Return `vocab_size` of the folder's own tokenizer.json, or None if there is no such file."""
        path = self.tokenizer_folder / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer

        try:
            vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises no narrower type
            refuse_pointer(path)
            raise ModelError(f"{path} is not a tokenizer: {error}.") from error
        return self.vocab_size(vocabulary, path)


def open_folder(folder_or_id: str | Path) -> ModelFolder:
    """Read the JSON files of a local folder or of a hub id.

    Of an adapter that `peft` has written, it is the model that the adapter belongs to, with `adapter`.

    Args:
        folder_or_id: a local folder, `owner/name`, or `owner/name@revision` with a branch, tag or commit.

    Raises:
        ModelError: the folder or its config is missing or unsupported.
    """
    folder = local_folder(folder_or_id)
    if is_adapter(folder):
        return open_adapted(folder, str(folder_or_id))
    hub_id = None if Path(folder_or_id).is_dir() else split_revision(str(folder_or_id))[0]
    refuse_gguf_alone(folder, str(folder_or_id))
    hf = read_json_object(folder / "config.json")
    try:
        config = decoder_config(hf)
    except QuantizationError as error:
        raise QuantizationError(f"{error}{name_original(folder, str(folder_or_id))}") from error
    return ModelFolder(
        config=config,
        folder=folder,
        hf_config=hf,
        generation_config=read_json_object(p) if (p := folder / "generation_config.json").is_file() else None,
        hub_id=hub_id,
        revision=None if hub_id is None else folder.name,  # the hub's cache names a snapshot by its commit
    )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter without the weights of its model."""
    weights = [path for path in folder.glob("*.safetensors*") if path.name != ADAPTER_FILES[1]]
    return (folder / ADAPTER_FILES[0]).is_file() and not weights


def open_adapted(folder: Path, name: str) -> ModelFolder:
    """Open the model that the adapter in a folder belongs to.

    A relative path of the model starts at the working folder, as for `peft`, or at the adapter's.

    Raises:
        ModelError: adapter_config.json names no model, or one that is not there or is an adapter too.
    """
    where = folder / ADAPTER_FILES[0]
    settings = read_json_object(where)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{where} has no base_model_name_or_path: write the hub id or folder of the model that was adapted there."
        )
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    if revision and not Path(base).is_dir():
        base = f"{split_revision(base)[0]}@{revision}"
    try:
        is_base = not is_adapter(local_folder(base))
        found = open_folder(base) if is_base else None
    except ModelError as error:
        raise ModelError(f"{where}: base_model_name_or_path cannot be opened. {error}") from error
    if found is None:
        raise ModelError(f"{where} names {base}, which is an adapter too: merge that one into its model first.")
    own = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    hub_id, _ = split_revision(name)
    adapter = str(folder) if Path(name).is_dir() else f"{hub_id}@{folder.name}"
    return dataclasses.replace(found, adapter=adapter, tokenizer_from=folder if own else None)


def refuse_gguf_alone(folder: Path, name: str) -> None:
    """Raise ModelError for GGUF weights without the config.json of their model."""
    if not (folder / "config.json").is_file() and (any(folder.glob("*.gguf")) or re.search("gguf", name, re.I)):
        raise ModelError(
            f"{name} has no config.json next to its GGUF weights. Put config.json and the tokenizer's files of the "
            f"model that it was made from into a folder with the .gguf file.{name_original(folder, name)}"
        )


def local_folder(folder_or_id: str | Path) -> Path:
    """Return the folder itself, or the snapshot of a hub id. Its name is the commit.

    A snapshot that is not in the cache is downloaded: safetensors, JSON files and templates only.

    Raises:
        ModelError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if Path(folder_or_id).is_dir():
        if special := [path.name for path in Path(folder_or_id).iterdir() if is_special(path)]:
            raise ModelError(f"{folder_or_id}: {special[0]} is a device, pipe or socket, not a file. Remove it.")
        return Path(folder_or_id)
    if str(folder_or_id).endswith(".gguf") and Path(folder_or_id).is_file():
        raise ModelError(
            f"{folder_or_id} is a file, and a student is a folder: give its folder, with config.json and the "
            "tokenizer's files of the model that it was made from."
        )
    name, _ = split_revision(str(folder_or_id))
    if not is_hub_id(name):
        raise ModelError(
            f"No folder {folder_or_id}: expected a model folder, or a hub id such as owner/name or owner/name@revision."
        )
    # Subfolders hold other formats, and consolidated* a second copy of Mistral's weights.
    return hub_snapshot(str(folder_or_id), HUB_FILES, ("*/*", "consolidated*"))


def is_hub_id(name: str) -> bool:
    """Return whether a name is `owner/name`, and not a folder of this machine."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def hub_snapshot(folder_or_id: str, files: Sequence[str], ignored: Sequence[str] = ("*/*",)) -> Path:
    """Return the folder with these files of `owner/name` or `owner/name@revision`, from the cache or the hub.

    Raises:
        ModelError: the hub has no such model or revision, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, revision = split_revision(folder_or_id)
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(ignored))
    except (OSError, ValueError) as error:
        what = "model of this id" if revision is None else f"model {name} with the revision {revision}"
        raise ModelError(
            f"No folder {folder_or_id}, and the hub has no {what} or cannot be reached "
            f"({type(error).__name__}: {error})."
        ) from error
    return Path(found)


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the hub id and the revision of `owner/name@revision`. Without a revision, or for a path: None."""
    hub_id, at, revision = name.partition("@")
    return (name, None) if not (at and revision) or Path(name).exists() else (hub_id, revision)


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object from a model folder.

    Raises:
        ModelError: the file is missing or is not a JSON object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise ModelError(f"No {path.name} in {path.parent}: expected a Hugging Face model folder.") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ModelError(f"{path} is not JSON: {error}.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}; expected a JSON object.")
    return value


def refuse_used(folder: Path) -> None:
    """Raise ModelError if `folder` is neither new nor empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is not empty: give the export a folder of its own.")
