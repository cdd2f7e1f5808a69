"""Which model a run started from: hashes of its files, and the commit of a hub id.

A folder can change, and a hub id's `main` can move, after a run read its student there. The run therefore keeps these
values, and compares them before it reads the model again.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.models.huggingface.folder import ModelFolder
from cotgrpo.models.huggingface.safetensors_files import weight_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
READERS = 8
"""Files that are hashed at a time."""


def fingerprint(folder: ModelFolder) -> dict[str, str]:
    """Return what identifies a model. A part that does not exist is left out.

    Reads all weights once, at about 1 GB/s a file, and never holds more than a few pages. Call it on process 0 only.

    Args:
        folder: from `open_folder`.

    Returns:
        `revision`: the commit of a hub id. `weights`, `config`, `generation_config`, `tokenizer`: hashes of contents.
        White space and the order of fields do not count in the two configs.

    Raises:
        ModelError: the index of the weights is corrupt or names a file that does not exist.
    """
    parts: dict[str, str | None] = {
        "revision": folder.revision,
        "weights": hash_of_files(weight_files(folder.folder)),
        "config": hash_of_fields(folder.hf_config),
        "generation_config": None if folder.generation_config is None else hash_of_fields(folder.generation_config),
        "tokenizer": hash_of_files([p for name in TOKENIZER_FILES if (p := folder.folder / name).is_file()]),
    }
    return {name: value for name, value in parts.items() if value is not None}


def hash_of_fields(fields: Mapping[str, Any]) -> str:
    """Return the hash of a JSON object."""
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=32).hexdigest()


def hash_of_files(paths: Sequence[Path]) -> str | None:
    """Return one hash of the names and contents of files; None without files."""
    if not paths:
        return None
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(hash_of_file, paths))
    return hash_of_fields({path.name: digest for path, digest in zip(paths, digests, strict=True)})


def hash_of_file(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
