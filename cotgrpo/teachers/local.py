"""A model folder as a teacher, run by this library's sampler."""

from __future__ import annotations

import functools
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.sources import DataError
from cotgrpo.data.tokenizer import load_tokenizer, token_bytes
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.models.config import Dtype
from cotgrpo.models.decoder import unstack_layers
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.sampling import QUEUE, Prompts, Replies, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teachers.completions import as_piece
from cotgrpo.teachers.endpoint import Outcome, Request, TeacherReply

PROMPT_COLUMNS = 64
"""Prompts are padded to multiples of this, so the sampler compiles for a few shapes instead of every length."""


class LocalTeacher:
    """A pretrained model that answers through its own chat template, with continuous batching.

    Args:
        path: a folder or hub id, as in `load_pretrained`.
        max_tokens: longest reply in tokens.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1].
        batch_size: replies decoded at a time. Several times as many prompts wait, and each takes the place of a reply
            that ends.
        dtype: "float32" or "bfloat16"; None: as in the checkpoint.
        seed: seed of the draws, which also depend on the first request of a batch.
        top_logprobs: how many of the likeliest tokens come with each token of a reply; 0: none.

    Raises:
        ModelError, DataError: not a model folder, or a tokenizer without a chat template.
    """

    def __init__(
        self,
        path: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        dtype: Dtype | None = None,
        seed: int = 0,
        top_logprobs: int = 0,
    ) -> None:
        self.tokenizer = load_tokenizer(path)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{path}: the tokenizer has no chat template, which a teacher needs. Choose an instruction-tuned "
                "model, or put its chat_template.jinja next to tokenizer.json."
            )
        # Only for its rendering with a fixed date, and its stop tokens.
        self.template = ChatTemplate(self.tokenizer, more_stop_ids=generation_stop_ids(path))
        self.seed = seed
        model = load_pretrained(path, dtype or "stored")
        self.params = unstack_layers(model.config, model.params)
        settings = SamplingSettings(
            max_tokens,
            eos_ids=self.template.stop_ids,
            temperature=temperature,
            top_p=top_p,
            pad_id=self.template.pad_id,
        )
        self.rows = QUEUE * batch_size
        self.top_logprobs = min(top_logprobs, model.student.vocab_size or model.config.vocab_size)
        self.scorer = jax.jit(functools.partial(live_ghosts, model.student, top_k=self.top_logprobs))
        self.whole_params = model.params if top_logprobs else None  # the sampler's are unstacked
        self.sampler = jax.jit(make_sampler(model.config, settings, model.student.vocab_size, batch_size))

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Hand every request to `done` with its reply, batch by batch."""
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, self.rows)):
            for request, reply in zip(batch, self.replies(batch), strict=True):
                done(request, reply)

    def replies(self, batch: Sequence[Request]) -> list[TeacherReply]:
        """Return the replies to at most `self.rows` requests."""
        started = time.monotonic()
        prompts = [np.asarray(self.template.ids(self.template.renderer.render(r.messages, prompt=True))) for r in batch]
        columns = -(-max(map(len, prompts)) // PROMPT_COLUMNS) * PROMPT_COLUMNS
        padded = pad_prompts(prompts, length=columns, rows=self.rows, pad_id=self.template.pad_id)
        written = self.sample(padded, batch[0].key)
        logprobs = self.log_probs(padded, written, len(batch)) if self.top_logprobs else [None] * len(batch)
        seconds = round(time.monotonic() - started, 3)
        return [
            TeacherReply(
                logprobs=logprobs[row],
                text=self.template.decode(np.asarray(written.tokens[row, : written.lengths[row]])).strip(),
                finish_reason="stop" if written.finished[row] else "length",
                prompt_tokens=len(prompts[row]),
                completion_tokens=int(written.lengths[row]),
                seconds=seconds,
            )
            for row in range(len(batch))
        ]

    def log_probs(self, prompts: Prompts, written: Replies, count: int) -> list[list[Any] | None]:
        """Return the likeliest tokens at each token of the first replies, as `TeacherReply.logprobs`."""
        extra = jax.device_get(self.scorer(self.whole_params, prompts, written).extra)
        first = prompts.tokens.shape[1] - 1
        piece = functools.cache(lambda token: as_piece(token_bytes(self.tokenizer, token, self.before)))
        found: list[list[Any] | None] = []
        for row in range(count):
            length, rows = int(written.lengths[row]), slice(first, first + int(written.lengths[row]))
            tops = zip(extra["top_ids"][row, rows], extra["top_log_probs"][row, rows], strict=True)
            pairs = [[[piece(int(i)), round(float(p), 6)] for i, p in zip(*top, strict=True)] for top in tops]
            tokens = [piece(int(token)) for token in written.tokens[row, :length]]
            found.append([[token, top] for token, top in zip(tokens, pairs, strict=True)])
        return found

    @functools.cached_property
    def before(self) -> int:
        """A token before which another one is written as in the middle of a text."""
        return int(self.tokenizer.encode("a", add_special_tokens=False)[-1])

    def sample(self, prompts: Prompts, key: tuple[str, int]) -> Replies:
        """Sample replies, with a random key that depends on the seed and the first request alone."""
        drawn = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(repr(key).encode()))
        replies: Replies = jax.device_get(self.sampler(self.params, prompts, drawn))
        return replies
