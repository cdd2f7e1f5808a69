"""Hashes of what a stage reads: rows, tokenizer, student, and the versions of the packages."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cotgrpo.checkpoints.integrity import CHECKSUMS
from cotgrpo.checkpoints.location import CheckpointLocation
from cotgrpo.checkpoints.manager import steps_in
from cotgrpo.config import Config
from cotgrpo.data.questions import Question, question_text
from cotgrpo.data.rows import Row
from cotgrpo.identity.split import HASH_BYTES
from cotgrpo.models.config import DecoderConfig, DecoderShape
from cotgrpo.models.huggingface.folder import ModelFolder
from cotgrpo.models.huggingface.pinned import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("cotgrpo", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def row_hash(row: Row) -> int:
    """Return a hash of 64 bits of everything in a row that training or measuring uses."""
    return values_hash(
        row.question,
        row.rationale,
        row.answer,
        row.gold,
        row.system,
        row.marked_correct,
        row.verbatim,
        row.context,
        row.tools,
    )


def question_hash(question: Question) -> int:
    """Return a hash of 64 bits of a held-out question, its right answer and its reference reply."""
    reply = question.reference
    told = None if reply is None else (reply.rationale, reply.answer, reply.verbatim)
    return values_hash(question.question, question.gold, question.system, question.context, question.tools, told)


def asked_hash(question: Question) -> int:
    """Return a hash of 64 bits of what a held-out question asks, and its right answer."""
    return values_hash(question_text(question), question.gold, question.system)


def values_hash(*values: object) -> int:
    """Return a hash of 64 bits of JSON-able values."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest(), "little"
    )


def array_hash(array: np.ndarray) -> str:
    """Return the hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=HASH_BYTES).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a hash of each part of a tokenizer: its tokens and their ids, its rules, special tokens, chat template.

    A tokenizer and its saved copy have the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for name in ("version", "truncation", "padding", "added_tokens"):  # of the last call, or in the vocabulary
        rules.pop(name, None)
    model = rules.pop("model", {})
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or ()]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "rules": [rules, merges],
        "special tokens": special,
        "chat template": tokenizer.chat_template,
    }
    return {name: f"{values_hash(value):016x}" for name, value in parts.items()}


def student_fingerprint(config: Config, decoder: DecoderConfig, source: ModelFolder | None) -> dict[str, str]:
    """Return what identifies the student before any training: a pretrained model's files, or a shape and a seed.

    Reads all weights of a pretrained student. Call it on process 0 only.
    """
    if source is not None:
        return {name: value for name, value in fingerprint(source).items() if name != "tokenizer"}
    shape = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(DecoderShape)}
    return {"seed": str(config.seed), "shape": f"{values_hash(shape):016x}"}


def start_fingerprint(origin: Path | None, config: Config) -> dict[str, str]:
    """Return which checkpoint of another stage a stage starts from; empty if it has none."""
    if origin is None:
        return {}
    folder = CheckpointLocation.resolve(origin, config).folder
    steps: Sequence[int] = steps_in(folder)
    if not steps:
        return {}
    checksums = folder / str(steps[0]) / CHECKSUMS
    found = {"step": str(steps[0])}
    if checksums.exists():
        found["checksums"] = hashlib.blake2b(checksums.read_bytes(), digest_size=HASH_BYTES).hexdigest()
    return found
