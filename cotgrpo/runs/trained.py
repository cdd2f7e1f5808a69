"""A student that a run has trained, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from cotgrpo.data.questions import Question
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.tokenizer import decode_text
from cotgrpo.distributed.processes import fetch
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import jit_eval
from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = 64
"""Prompts are padded to multiples of this, so that the sampler compiles for a few shapes instead of every length."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained student, ready for train steps, and for replies.

    Attributes:
        config: the decoder's shape.
        student: the functions that train steps take.
        params: the parameters. Of LoRA, the adapters next to the base, as `student` computes with them.
        tokenizer: the tokenizer.
        template: renders questions as the student read them in training.
        vocab_size: the ids that the tokenizer uses.
        stage: the stage that trained it last, "sft" or "grpo".
        step: the step of its checkpoint.
        mesh: of the parameters; None: JAX's default device.
    """

    config: DecoderConfig
    student: Student
    params: Params
    tokenizer: PreTrainedTokenizerBase
    template: AnyTemplate
    vocab_size: int
    stage: str
    step: int
    mesh: jax.sharding.Mesh | None = None

    def reply(
        self,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> list[str]:
        """Return the student's reply to each question, as text.

        Args:
            questions: one or several questions.
            max_new_tokens: longest reply in tokens.
            temperature: >= 0; 0 takes the likeliest token each time.
            top_p: in (0, 1], as in `SamplingSettings`.
            batch_size: replies decoded at a time.
            seed: seed of the draws.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        if not asked:
            return []
        prompts = [self.template.prompt_of(Question(text, "")) for text in asked]
        settings = SamplingSettings(
            max_new_tokens,
            eos_ids=self.template.stop_ids,
            temperature=temperature,
            top_p=top_p,
            pad_id=self.template.pad_id,
        )
        over = 1 if self.mesh is None else self.mesh.size
        slots = -(-min(batch_size, len(asked)) // over) * over
        rows = -(-len(asked) // slots) * slots
        columns = -(-max(map(len, prompts)) // PROMPT_COLUMNS) * PROMPT_COLUMNS
        padded = pad_prompts(prompts, length=columns, rows=rows, pad_id=self.template.pad_id)
        sampler = jit_eval(make_sampler(self.config, settings, self.vocab_size, slots), self.mesh)
        written = fetch(sampler(self.params, padded, jax.random.key(seed)))
        return [decode_text(self.tokenizer, written.tokens[i, : written.lengths[i]]) for i in range(len(asked))]
