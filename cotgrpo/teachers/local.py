"""A model folder as a teacher, run by this library's own sampler."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.chat import ChatTemplate, generation_stop_ids
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.data.triples import DataError
from cotgrpo.models.decoder import unstack_layers
from cotgrpo.models.huggingface.weights import load_pretrained
from cotgrpo.sampling import QUEUE, Prompts, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teachers.endpoint import Outcome, Request, TeacherReply

PROMPT_COLUMNS = 64
"""Prompts are padded to multiples of this, so that the sampler compiles for a few shapes and not for every length."""


class LocalTeacher:
    """A pretrained model that is asked with its own chat template, and writes `batch_size` replies at a time.

    Args:
        path: a folder or hub id, as `load_pretrained` takes.
        max_tokens: longest reply.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1].
        batch_size: replies at a time; a few times as many prompts are read, and a reply that ends makes room for the next.
        dtype: "float32" or "bfloat16"; None: as in the checkpoint.
        seed: what is drawn follows from it and the prompts of a batch.

    Raises:
        ModelError, DataError: a folder that is none, or a tokenizer without a chat template.
    """

    def __init__(
        self,
        path: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer = load_tokenizer(path)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{path}: the tokenizer has no chat template, so it cannot be asked. Choose an instruction-tuned model, or put its "
                "chat_template.jinja beside tokenizer.json."
            )
        # It knows the tokens that end a turn, and how a template's clock is stopped.
        self.template = ChatTemplate(self.tokenizer, more_stop_ids=generation_stop_ids(path))
        self.seed = seed
        model = load_pretrained(path, dtype)
        self.params = unstack_layers(model.config, model.params)
        settings = SamplingSettings(
            max_tokens,
            eos_ids=self.template.stop_ids,
            temperature=temperature,
            top_p=top_p,
            pad_id=self.template.pad_id,
        )
        self.rows = QUEUE * batch_size
        self.sampler = jax.jit(make_sampler(model.config, settings, model.student.vocab_size, batch_size))

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Hands every request to `done` with its reply, some at a time."""
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, self.rows)):
            for request, reply in zip(batch, self.replies(batch), strict=True):
                done(request, reply)

    def replies(self, batch: Sequence[Request]) -> list[TeacherReply]:
        """The replies to at most `self.rows` requests."""
        started = time.monotonic()
        prompts = [np.asarray(self.template.ids(self.template.render(r.messages, prompt=True))) for r in batch]
        columns = -(-max(map(len, prompts)) // PROMPT_COLUMNS) * PROMPT_COLUMNS
        padded = pad_prompts(prompts, length=columns, rows=self.rows, pad_id=self.template.pad_id)
        written = self.sample(padded, batch[0].key)
        seconds = round(time.monotonic() - started, 3)
        return [
            TeacherReply(
                text=self.template.decode(written.tokens[row, : written.lengths[row]]).strip(),
                finish_reason="stop" if written.finished[row] else "length",
                prompt_tokens=len(prompts[row]),
                completion_tokens=int(written.lengths[row]),
                seconds=seconds,
            )
            for row in range(len(batch))
        ]

    def sample(self, prompts: Prompts, key: tuple[str, int]) -> Any:
        """Draws with numbers that depend on the seed and on the first request, and on nothing that came before."""
        drawn = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(repr(key).encode()))
        return jax.device_get(self.sampler(self.params, prompts, drawn))
