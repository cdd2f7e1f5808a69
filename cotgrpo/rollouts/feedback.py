"""On-policy batches whose self-teacher reads what the verifier says of the very reply that it is asked about.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The student replies, the host judges the reply, and
the ghost's prompt then holds the reply and the verdict. So the device waits for the host between the replies and their
ghosts. Nothing of it is part of a checkpoint: the replies of a batch are a function of the parameters and its number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.rollouts.on_policy import OnPolicyBatches
from cotgrpo.rollouts.rollouts import RolloutPrompt, grade_replies, token_ids
from cotgrpo.sampling import Prompts, Replies, Sampler, pad_prompts
from cotgrpo.types import GhostBatch, Params, SftBatch

MESSAGE_TOKENS = 64
"""Room for the verifier's message in the ghost's prompt, in addition to that for the reply."""

PromptWith = Callable[[RolloutPrompt, str, str], np.ndarray]
"""`prompt_with(question, reply, feedback)`: int32 tokens of the ghost's prompt."""


def feedback_on(reply: Reply) -> str:
    """Return what the verifier says of a reply: the message of the user's own, or the verdict in words."""
    if reply.message:
        return reply.message
    if reply.answer is None:
        return "The reply has no answer." if reply.finished else "The reply was cut off before its answer."
    return f"The answer {reply.answer} is {'right' if reply.correct else 'wrong'}."


def fitted_prompt(prompt_with: PromptWith, question: RolloutPrompt, reply: str, message: str, most: int) -> np.ndarray:
    """Return the ghost's prompt. If it has more than `most` tokens, the longer of the two texts loses its end."""
    while len(tokens := prompt_with(question, reply, message)) > most and (reply or message):
        if len(reply) >= len(message):
            reply = reply[: len(reply) * 3 // 4]
        else:
            message = message[: len(message) * 3 // 4]
    return tokens


class FeedbackBatches(OnPolicyBatches):
    """Batches of replies with the ghosts of a teacher that reads the verdict on each. See `OnPolicyBatches`.

    Args:
        sample: the student's sampler, compiled by `jit_eval` for the mesh.
        ghosts: from `make_ghosts`, compiled likewise.
        prompt_with: makes the ghost's prompt.
        teacher_params, student, template, questions, settings, options: as in `OnPolicyBatches`.
    """

    def __init__(
        self,
        sample: Sampler,
        ghosts: Callable[..., Any],
        prompt_with: PromptWith,
        teacher_params: Params,
        student: Any,
        template: Any,
        questions: Sequence[RolloutPrompt],
        settings: Any,
        **options: Any,
    ) -> None:
        super().__init__(self.draw_judged, teacher_params, student, template, questions, settings, **options)
        self.sample, self.ghosts, self.prompt_with = sample, ghosts, prompt_with
        longest = max(len(prompt_with(question, "", "")) for question in questions)
        self.teacher_columns = longest + settings.max_new_tokens + MESSAGE_TOKENS
        self.graded: list[Reply] = []

    def draw_judged(
        self, models: tuple[Params, Params], rows: tuple[Prompts, Prompts | None, SftBatch | None], key: jax.Array
    ) -> tuple[GhostBatch, Replies, jax.Array]:
        """Return the next batch, in the form of the function of `make_draw`. Waits for the replies."""
        (params, teacher_params), (prompts, _, forced) = models, rows
        for_sampling, for_ghosts = jax.random.split(key)
        replies = self.sample(params, prompts, for_sampling)
        on_host, questions = jax.device_get(replies), self.prompts_for(self.taken - 1)
        self.graded = grade_replies(self.template, questions, on_host)
        texts = ["\n".join(part for part in self.template.split_reply(ids) if part) for ids in token_ids(on_host)]
        tokens = [
            fitted_prompt(self.prompt_with, question, text, feedback_on(reply), self.teacher_columns)
            for question, text, reply in zip(questions, texts, self.graded, strict=True)
        ]
        teacher_prompts = pad_prompts(tokens, length=self.teacher_columns, pad_id=self.template.pad_id)
        batch, log_probs = self.ghosts(teacher_params, (prompts, replies, teacher_prompts, forced), for_ghosts)
        return batch, replies, log_probs

    def judged(self, prompts: Sequence[RolloutPrompt], replies: Replies) -> tuple[np.ndarray, np.ndarray]:
        """Return the verdicts on the newest replies, which are known."""
        correct = np.array([reply.correct for reply in self.graded], np.uint32)
        return correct, np.array([reply.score for reply in self.graded], np.float32)
