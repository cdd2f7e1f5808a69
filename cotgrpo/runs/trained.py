"""A student that a run has trained, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from cotgrpo.data.own.verifier import EXACT_MATCH
from cotgrpo.data.questions import Question
from cotgrpo.data.template import AnyTemplate
from cotgrpo.evaluation.replies import Draws, ReplyWriter
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.types import Params, Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            seed: seed of the draws, which also depend on each question's text alone.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        if not asked:
            return []
        template: Any = self.template
        write = ReplyWriter(
            self.config,
            dataclasses.replace(template, verifier=EXACT_MATCH),  # there is nothing to compare with
            [Question(text, "") for text in asked],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            draws=Draws(1, temperature, top_p, seed) if temperature else None,
            vocab_size=self.vocab_size,
            mesh=self.mesh,
        )
        return [reply.text for (reply,) in write(self.params)]
