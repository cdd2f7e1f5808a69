"""What a Hugging Face model folder says of its model, the weights aside: where it lies, its shape, its stop tokens, the ids of its tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.huggingface.config import decoder_config, family_of
from cotgrpo.models.huggingface.families import HfConfig, ModelError
from cotgrpo.models.huggingface.safetensors_files import read_json

HUB_FILES = ("*.safetensors", "*.json", "*.jinja")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model from Hugging Face without its weights.

    Attributes:
        config: the decoder's shape; `dataclasses.replace` it and call `make_student` for another remat or compute type.
        folder: where the files lie; `cotgrpo.data.tokenizer.load_tokenizer(folder)` is its tokenizer.
        hf_config: config.json.
        generation_config: generation_config.json, or None.
        hub_id: the hub id it was asked for by, or None.
    """

    config: DecoderConfig
    folder: Path
    hf_config: HfConfig
    generation_config: HfConfig | None = None
    hub_id: str | None = None

    def vocab_size(self, vocabulary: Mapping[str, int], path: str | Path) -> int:
        """The number of ids that a tokenizer's vocabulary uses; the embedding may have more rows. `path` is named in the error.

        Raises:
            ModelError: it has ids beyond the embedding.
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
        """`vocab_size` of the folder's own tokenizer.json, or None where there is no such file."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer

        try:
            vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # what the library raises has no narrower type
            raise ModelError(f"{path} is no tokenizer: {error}.") from error
        return self.vocab_size(vocabulary, path)


def open_folder(folder_or_id: str | Path) -> ModelFolder:
    """Reads the JSON files of a local folder or of a hub id.

    Raises:
        ModelError: what is wrong with the folder or its config.
    """
    folder = local_folder(folder_or_id)
    hf = read_json(folder / "config.json")
    return ModelFolder(
        config=decoder_config(hf),
        folder=folder,
        hf_config=hf,
        generation_config=read_json(p) if (p := folder / "generation_config.json").is_file() else None,
        hub_id=None if Path(folder_or_id).is_dir() else str(folder_or_id),
    )


def local_folder(folder_or_id: str | Path) -> Path:
    """The folder itself, or that of a hub id's snapshot, downloaded if need be (safetensors, JSON and templates alone)."""
    if Path(folder_or_id).is_dir():
        return Path(folder_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder_or_id)):
        raise ModelError(f"No folder {folder_or_id}: expected a model folder, or a hub id such as owner/name.")
    from huggingface_hub import snapshot_download

    try:
        # No subfolders (other formats), and no second copy of the weights under Mistral's own names.
        found = snapshot_download(
            str(folder_or_id), allow_patterns=list(HUB_FILES), ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No folder {folder_or_id}, and no model of this id could be had from the hub ({type(error).__name__}: {error})."
        ) from error
    return Path(found)
