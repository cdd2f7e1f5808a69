"""What every builder of batches is given: the settings, the inputs, the weights, and where a stage writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from cotgrpo.config import Config
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.rollouts.engine_replies import EngineReplies
from cotgrpo.sampling import Sampler, SamplingSettings, make_sampler
from cotgrpo.sampling.decoding_layout import DecodingLayout
from cotgrpo.sharding import jit_eval
from cotgrpo.terminal import say
from cotgrpo.training.inputs import QUIET, Model, StageInputs
from cotgrpo.training.weights import StageWeights

COMPLETIONS_SHOWN = 4
"""Replies that are logged at a time."""


@dataclasses.dataclass(frozen=True)
class BatchContext:
    """What the batches of a stage are made from.

    Attributes:
        config: the settings.
        inputs: rows and student.
        weights: the student's before the first step.
        folder: of the stage, for completions and replies.
        console: where the progress goes.
        engine: writes the student's replies, in place of the sampler of this process; None: it does.
    """

    config: Config
    inputs: StageInputs
    weights: StageWeights
    folder: Path
    console: Console = QUIET
    engine: EngineReplies | None = None

    @property
    def model(self) -> Model:
        """The student."""
        return self.inputs.model

    def sampling(self, max_new_tokens: int, temperature: float) -> SamplingSettings:
        """Return how the student's replies are drawn."""
        template = self.inputs.template
        return SamplingSettings(max_new_tokens, template.stop_ids, temperature=temperature, pad_id=template.pad_id)

    def student_sampler(self, max_new_tokens: int, temperature: float, decode_batch_size: int | None) -> Sampler:
        """Return the sampler of the student's replies, without jit."""
        settings = self.sampling(max_new_tokens, temperature)
        told = set[str]()  # the program of a sampler is traced once for each shape

        def on_layout(layout: DecodingLayout) -> None:
            if str(layout) not in told:
                told.add(str(layout))
                say(self.console, str(layout))

        return make_sampler(self.model.decoder, settings, self.model.vocab_size, decode_batch_size, on_layout)

    def compiled_sampler(self, max_new_tokens: int, temperature: float, decode_batch_size: int | None) -> Sampler:
        """Return the sampler, compiled for the mesh, or the engine."""
        if self.engine is not None:
            return self.engine
        sampler = self.student_sampler(max_new_tokens, temperature, decode_batch_size)
        compiled: Sampler = jit_eval(sampler, self.model.mesh)
        return compiled

    def completions_log(self) -> CompletionsLog:
        """Return the log of the student's replies."""
        return CompletionsLog(self.folder, self.config.grpo.log_every, COMPLETIONS_SHOWN)
