"""Small tokenizers of several kinds, trained on a few lines."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "What is 17 + 25? 17 + 25 = 42. The answer is 42.",
    "A train goes 280 km from Zürich to Genève in 3 hours, that is 93 km an hour.",
    "答案是42。一共有三个苹果，两个梨。",
    "def f(x):\n    return x ** 2\n",
    "She has twelve apples, gives away five, and then buys three more of them.",
)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@functools.cache
def byte_level(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with so many tokens, as GPT-2's kin."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken("<pad>", special=True), AddedToken("<eos>", special=True)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrapped(tokenizer)


@functools.cache
def metaspace(size: int) -> PreTrainedTokenizerFast:
    """A BPE that writes spaces as U+2581, one in front of a text, with byte fallback, as Llama 2's kin."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    names = ("<pad>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))
    special = [AddedToken(name, special=not name.startswith("<0x")) for name in names]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    return wrapped(tokenizer)
