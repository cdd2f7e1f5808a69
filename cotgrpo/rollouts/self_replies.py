"""Batches of the student's own right replies, which it rewrites from time to time as it learns.

GRPO here is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cotgrpo.atomic_files import whole_file
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, or_raise
from cotgrpo.data.triples import Triple, read_triples, write_triples
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.distributed.processes import fetch, on_process_0
from cotgrpo.ghosts.self_reply import SampledReply, best_replies
from cotgrpo.sampling import Sampler, pad_prompts
from cotgrpo.types import Params, SftBatch

SELF_REPLIES = 0x73656C66
"""Folded into the run's key, so that these replies draw from a random stream of their own."""


@dataclasses.dataclass(frozen=True)
class SelfReplySettings:
    """How replies are gathered, and batched.

    Attributes:
        num_generations: replies to each question. The best right one is kept.
        questions: how many are asked in one round.
        refresh_every: updates between two rounds.
        batch_size, seq_len, packing: of the batches, as in `make_batches`.
        prompt_columns: of the samplers.
    """

    num_generations: int
    questions: int
    refresh_every: int
    batch_size: int
    seq_len: int
    packing: bool
    prompt_columns: int


class SelfReplyBatches:
    """An endless iterator of packed batches of the student's own replies.

    Every `refresh_every` batches a new round of replies is drawn with the newest parameters. A round is kept in
    `folder/<updates before it>.jsonl`, so a resumed run reads the same replies. With several processes, process 0
    grades and writes them, and all read the file.

    Args:
        samplers: draw the replies to a question in turn; compiled by `jit_eval` for the mesh.
        template: renders questions and replies, and splits replies into rationale and answer.
        triples: the training rows. Repeated questions count once.
        settings: sizes.
        folder: of the replies.
        seed: of the order of the questions, of the draws, and of the batches.
        merged: as in `cotgrpo.rollouts.rollouts.Rollouts`.

    Raises:
        DataError: no prompt leaves room for a reply; from `next`: no reply was right.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
        template: AnyTemplate,
        triples: Sequence[Triple],
        settings: SelfReplySettings,
        folder: Path,
        seed: int,
        merged: Callable[[Params], Params] = lambda trained: trained,
    ) -> None:
        import grain

        self.samplers, self.template, self.settings, self.folder = list(samplers), template, settings, folder
        unique = {(t.system, str(t.context or t.question)): t for t in reversed(triples)}.values()
        prompts = [
            (triple, or_raise(prompt)) for triple, prompt in zip(unique, template.prompts_of(list(unique)), strict=True)
        ]
        fitting = [(triple, prompt) for triple, prompt in prompts if len(prompt) <= settings.prompt_columns][::-1]
        self.questions, self.prompts = [triple for triple, _ in fitting], [prompt for _, prompt in fitting]
        if not self.questions:
            raise DataError(
                f"No question leaves room for a reply: data.seq_len {settings.seq_len} leaves "
                f"{settings.prompt_columns} positions for the prompt. Raise it, or lower grpo.ghosts.max_new_tokens."
            )
        self.order = grain.MapDataset.range(len(self.questions)).seed(seed).shuffle().repeat(None)
        self.seed, self.merged = seed, merged
        self.key = jax.random.fold_in(jax.random.key(seed), SELF_REPLIES)
        self.taken = self.crc = 0
        self.params: Params = None
        self.batches: Any = None

    def set_params(self, trained: Params) -> None:
        """Set the newest trained parameters. They are used only if a round of replies is due."""
        if self.taken % self.settings.refresh_every == 0:
            self.params = self.merged(trained)

    def __next__(self) -> SftBatch:
        if self.taken % self.settings.refresh_every == 0:
            self.write_replies()
            self.batches = self.read_replies()
            self.params = None
        self.taken += 1
        return next(self.batches)

    @property
    def path(self) -> Path:
        """The file of the replies in the current batches."""
        return self.folder / f"{self.first}.jsonl"

    @property
    def first(self) -> int:
        """The number of batches that were taken before these replies were written."""
        return self.taken // self.settings.refresh_every * self.settings.refresh_every

    def write_replies(self) -> None:
        """Ask the next questions and keep the best right reply to each. Waits for the device."""
        settings = self.settings
        count = min(settings.questions, len(self.questions))
        first = self.taken // settings.refresh_every * count
        # A question could come twice where one pass over all questions ends and the next begins.
        numbers = dict.fromkeys(int(self.order[i]) for i in range(first, first + count))
        asked = [self.questions[number] for number in numbers]
        replies = self.draw_candidates([self.prompts[number] for number in numbers])
        on_process_0(lambda: self.keep_best(asked, replies))

    def keep_best(self, asked: Sequence[Triple], replies: list[list[SampledReply]]) -> None:
        """Write the best right reply to each question."""
        settings, found = self.settings, best_replies(self.template, asked, replies)
        if not found:
            raise DataError(
                f"None of {settings.num_generations} replies to each of {len(asked)} questions was right after "
                f"{self.taken} updates: the student cannot be its own ghost yet. Train it longer by SFT, or raise "
                "grpo.ghosts.num_generations or grpo.ghosts.max_new_tokens."
            )
        with explain_disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                write_triples(temporary, found)

    def draw_candidates(self, prompts: Sequence[np.ndarray]) -> list[list[SampledReply]]:
        """Draw `settings.num_generations` replies to each prompt."""
        found: list[list[SampledReply]] = [[] for _ in prompts]
        key = jax.random.fold_in(self.key, self.taken)
        for number in range(self.settings.num_generations):
            sample = self.samplers[number % len(self.samplers)]
            replies = self.replies(sample, prompts, jax.random.fold_in(key, number))
            for own, reply in zip(found, replies, strict=True):
                own.append(reply)
        return found

    def replies(self, sample: Sampler, prompts: Sequence[np.ndarray], key: jax.Array) -> Iterator[SampledReply]:
        """Draw a reply to each prompt, in order."""
        rows = min(self.settings.questions, len(self.questions))
        padded = pad_prompts(prompts, length=self.settings.prompt_columns, rows=rows, pad_id=self.template.pad_id)
        written = fetch(sample(self.params, padded, key))
        for row in range(len(prompts)):
            length = int(written.lengths[row])
            mean = float(written.log_probs[row, :length].mean())
            yield SampledReply(written.tokens[row, :length], mean, bool(written.finished[row]))

    def read_replies(self) -> Any:
        """Return batches of the newest replies. Replies that do not fit a row are left out."""
        settings = self.settings
        self.crc = zlib.crc32(self.path.read_bytes()) if self.path.is_file() else 0
        triples, _ = read_triples(self.path)
        examples, _ = make_examples(triples, self.template, settings.seq_len, too_long="drop")
        return make_batches(
            examples,
            batch_size=settings.batch_size,
            seq_len=settings.seq_len,
            seed=self.seed,
            packing=settings.packing,
        )

    def get_state(self) -> dict[str, Any]:
        """Return the position, as JSON-able values."""
        whole = self.taken % self.settings.refresh_every == 0
        if whole:
            return {"taken": self.taken, "batches": None}
        return {"taken": self.taken, "batches": self.batches.get_state(), "crc": self.crc}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        self.taken = state["taken"]
        if state["batches"] is not None:
            self.batches = None if not self.path.is_file() else self.read_replies()
            if self.batches is None or self.crc != state.get("crc", self.crc):
                raise DataError(
                    f"{self.path} is lost or has changed: it holds the replies that the run was learning from. Put it "
                    f"back, or move the checkpoints after step {self.first} away to continue from there."
                )
            self.batches.set_state(state["batches"])
