"""Which model a run started from: hashes of its files, the commit of a hub id, and copies of its small files.

A folder can change, and a hub id's `main` can move, after a run read its student there. So each stage keeps all but the
weights in its folder, with a record of the whole model:

    RUN_DIR/STAGE/student/      config.json, generation_config.json, the tokenizer's files, base.json
    RUN_DIR/STAGE/tokenizer/    the same of `tokenizer.path`
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import find_json_object, whole_folder, write_json
from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.huggingface.folder import (
    ADAPTER_FILES,
    LICENSES,
    ModelFolder,
    hub_snapshot,
    open_folder,
    read_json_object,
    split_revision,
)
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
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model with images that an export copies too."""
MORE_FILES = ("vocab.txt", "tekken.json", "*.model", "*.tiktoken")
"""Patterns of further files that older tokenizers have."""
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
STUDENT, TOKENIZER, RECORD = "student", "tokenizer", "base.json"
"""Folders of a stage's copies, and the file that names the original."""
READERS = 8
"""Files that are hashed at a time."""


def fingerprint(folder: ModelFolder) -> dict[str, str]:
    """Return what identifies a model as it is now. A part that does not exist is left out.

    Reads all weights once a process, at about 1 GB/s a file, and never holds more than a few pages. Call it on process
    0 only.

    Args:
        folder: from `open_folder` or `reopen`. Weights of a hub id that are not in the cache are not downloaded.

    Returns:
        `revision`: the commit of a hub id. `weights`, `config`, `generation_config`, `tokenizer`: hashes of contents.
        `adapter`: that of an adapter's files. White space and the order of fields do not count in the two configs.

    Raises:
        ModelError: the index of the weights is corrupt or names a file that does not exist.
    """
    path = folder.folder if folder.base is None else find_folder(folder.base)
    parts: dict[str, str | None] = {"revision": folder.revision}
    if path is not None:
        parts |= {
            "weights": hash_of_files(weight_files(path)),
            "config": hash_of_fields(find_json_object(path / CONFIG)),
            "generation_config": hash_of_fields(find_json_object(path / GENERATION_CONFIG)),
            "tokenizer": hash_of_files(
                [p for name in TOKENIZER_FILES if (p := (folder.tokenizer_from or path) / name).is_file()]
            ),
        }
    adapter = None if folder.adapter is None else find_folder(folder.adapter)
    if adapter is not None:
        parts["adapter"] = hash_of_files([p for name in ADAPTER_FILES if (p := adapter / name).is_file()])
    return {name: value for name, value in parts.items() if value is not None}


def changed_parts(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts that two fingerprints both have and that differ."""
    return [name for name in recorded if name in now and recorded[name] != now[name]]


def hash_of_fields(fields: Mapping[str, Any] | None) -> str | None:
    """Return the hash of a JSON object, or None."""
    return None if fields is None else blake2b(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def hash_of_files(paths: Sequence[Path]) -> str | None:
    """Return one hash of the names and contents of files; None without files."""
    if not paths:
        return None
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(hash_of_file, paths))
    return hash_of_fields({path.name: digest for path, digest in zip(paths, digests, strict=True)})


def hash_of_file(path: Path) -> str:
    """Return the hash of a file's content. A file that has not changed is read once a process."""
    found = path.stat()
    # A program can set a file's time of modification, but not that of its last change.
    return hash_of_version(path, found.st_ino, found.st_size, found.st_ctime_ns)


@functools.cache
def hash_of_version(path: Path, inode: int, size: int, changed: int) -> str:
    """Return the hash of a file's content. The other arguments tell versions of the file apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake2b).hexdigest()


blake2b = functools.partial(hashlib.blake2b, digest_size=32)


def find_folder(name: str) -> Path | None:
    """Return a local folder, or the cached snapshot of a hub id; None if it is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hub_id, revision = split_revision(name)
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def keep_student(stage: Path, name: str, source: ModelFolder) -> None:
    """Copy what a stage needs of its student besides the weights, and record the student. Call it on process 0 only.

    Args:
        stage: the stage's folder.
        name: `student.path`.
        source: what `open_folder` or `reopen` returned.
    """
    base = source.base or (str(source.folder) if source.hub_id is None else f"{source.hub_id}@{source.revision}")
    record: dict[str, Any] = {
        "name": name,
        "base": base,
        "hub_id": source.hub_id,
        "revision": source.revision,
        "fingerprint": {**(source.recorded or {}), **fingerprint(source)},
    }
    if source.adapter is not None:
        record["adapter"] = source.adapter
    keep_files(stage / STUDENT, source.folder, record, source.tokenizer_folder)


def keep_tokenizer(stage: Path, name: str) -> None:
    """Copy the files of the tokenizer at `tokenizer.path` into a stage's folder. Call it on process 0 only."""
    if Path(name).is_dir():
        folder, base = Path(name), name
    else:
        folder = hub_snapshot(name, (*TOKENIZER_FILES, CONFIG, GENERATION_CONFIG))
        base = f"{split_revision(name)[0]}@{folder.name}"
    keep_files(stage / TOKENIZER, folder, {"name": name, "base": base})


def keep_files(copy: Path, original: Path, record: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Copy the small files of a model folder with a record, atomically, unless this is what `copy` holds.

    `tokenizer` is the folder of the tokenizer's files; None: `original`.
    """
    if find_json_object(copy / RECORD) == record or original.resolve() == copy.resolve():
        return
    files = [original / CONFIG, original / GENERATION_CONFIG, *other_files(original)]
    files += tokenizer_files(tokenizer or original)
    # Read first: the tokenizer may be the copy's.
    contents = {path.name: path.read_bytes() for path in files if path.is_file()}
    shutil.rmtree(copy, ignore_errors=True)
    with whole_folder(copy) as partial:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        write_json(partial / RECORD, record)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder's tokenizer and its chat template."""
    patterns = (*TOKENIZER_FILES, *MORE_FILES)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def other_files(folder: Path) -> list[Path]:
    """Return the further small files of a model that an export keeps: image processors and licenses."""
    patterns = (*PROCESSOR_FILES, *(f"{name}*" for name in LICENSES))
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def find_record(stage: Path, part: str = STUDENT) -> dict[str, Any] | None:
    """Return the record of a stage's student or tokenizer. None: an older version ran it, or it has not begun."""
    return find_json_object(stage / part / RECORD) if (stage / "config.yaml").is_file() else None


def reopen(name: str, stages: Sequence[Path], *, copy: bool = False) -> ModelFolder:
    """Open the student that a run calls `name`, in the revision that the run has pinned.

    The original comes first. If it is not there any more, the copy of its small files is returned.

    Args:
        name: `student.path`.
        stages: folders of stages, the most important first. The first that has a record of `name` counts.
        copy: return the copy, and do not look at the original.

    Returns:
        The model. `recorded` is the fingerprint in the record, or None if there is none.

    Raises:
        ModelError: as `open_folder` does.
    """
    for stage in stages:
        record = find_record(stage)
        if record is None or record["name"] != name:
            continue
        original = None if copy else find_folder(record["base"])
        if original is not None and (original / CONFIG).is_file():
            found = dataclasses.replace(open_folder(record["base"]), recorded=record["fingerprint"])
            own = None if "adapter" not in record else stage / STUDENT
            return dataclasses.replace(found, adapter=record.get("adapter"), tokenizer_from=own)
        return open_copy(stage / STUDENT, record)
    return open_folder(name)


def open_copy(folder: Path, record: Mapping[str, Any]) -> ModelFolder:
    """Open a run's copy of its student's small files."""
    hf = read_json_object(folder / CONFIG)
    generation = folder / GENERATION_CONFIG
    return ModelFolder(
        config=decoder_config(hf),
        folder=folder,
        hf_config=hf,
        generation_config=read_json_object(generation) if generation.is_file() else None,
        hub_id=record["hub_id"],
        revision=record["revision"],
        base=record["base"],
        recorded=record["fingerprint"],
        adapter=record.get("adapter"),
    )


def reopen_tokenizer(name: str, stages: Sequence[Path], *, copy: bool = False) -> str:
    """Return where to load the tokenizer at `tokenizer.path` from. Arguments are those of `reopen`."""
    for stage in stages:
        record = find_record(stage, TOKENIZER)
        if record is None or record.get("name") != name or not (stage / TOKENIZER / TOKENIZER_FILES[0]).is_file():
            continue
        original = None if copy else find_folder(record["base"])
        there = original is not None and (original / TOKENIZER_FILES[0]).is_file()
        return str(original if there else stage / TOKENIZER)
    return name
