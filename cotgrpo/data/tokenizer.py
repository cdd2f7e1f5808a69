"""Tokenizers: one trained on the data at hand for from-scratch students, or a pretrained model's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cotgrpo.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<sep>")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits numbers into single digits.

    Every text survives encoding and decoding unchanged: the vocabulary holds all 256 bytes.

    Args:
        texts: the training text.
        vocab_size: most tokens, at least 256 and the special ones. A text with few pairs to merge gives fewer.
        special_tokens: must hold "<pad>" and "<eos>".

    Raises:
        ValueError: `vocab_size` too small, or a special token missing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not {"<pad>", "<eos>"} <= set(special_tokens):
        raise ValueError(f'special_tokens must hold "<pad>" and "<eos>", got {list(special_tokens)}.')
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least} (256 bytes and the special tokens), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or hub id through `transformers`, without remote code.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        return transformers().AutoTokenizer.from_pretrained(str(path_or_id), trust_remote_code=False)
    except Exception as error:  # a broken file raises many kinds, the Rust library's bare Exception among them
        raise DataError(
            f"No tokenizer in {path_or_id}: expected a folder with tokenizer.json, or a hub id "
            f"({type(error).__name__}: {error})."
        ) from error


def transformers() -> ModuleType:
    """Import `transformers` without its notice that PyTorch is missing: only its tokenizers are used here."""
    missing = lambda record: "PyTorch was not found" not in record.getMessage()
    logger = logging.getLogger("transformers")
    logger.addFilter(missing)
    try:
        import transformers
    finally:
        logger.removeFilter(missing)
    return transformers
