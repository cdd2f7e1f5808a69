"""The section `grpo.rollouts`: who writes the student's replies, this process or an engine on a server."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from cotgrpo.teachers.endpoint import ConnectionSettings


@dataclasses.dataclass(frozen=True)
class InProcess:
    """Replies of this process, with the sampler that evaluations use too."""


@dataclasses.dataclass(frozen=True)
class RolloutServerSettings(ConnectionSettings):
    """Replies of an engine on a server, with weights that the run refreshes. See docs/rollouts.md.

    Attributes:
        base_url: the server's address, such as http://localhost:8000/v1.
        model: the model's name at the server; null: not sent, for a server with one model.
        retries: retries of an answer that cannot be used. A server that is down is tried without end.
        dialect: how the server is asked. vllm: completions with return_token_ids. sglang: /generate. auto: the first
            that the server answers with token ids.
        refresh: what the server is given. weights: the whole student, with LoRA's adapters merged. adapter: LoRA's
            adapters alone (vLLM). auto: adapter for a LoRA student on vLLM, else weights.
        refresh_every: rollouts between two refreshes. Replies of older weights count by how much likelier the student
            now makes their contexts, as in a later update on the same replies.
        folder: folder of the refreshed weights, which the server must see under the same name; null: rollout_weights in
            the stage's folder. The last two versions are kept.
        dtype: number type of the refreshed weights; null: student.dtype.
        send_seed: send a seed with each request, so that a server that honours it writes the same replies again. vLLM
            on a TPU refuses seeds.
        largest_gap: nats, the largest mean difference between the server's log-probabilities and the student's own,
            right after a refresh. More is an error: the server has other weights.
    """

    dialect: Literal["auto", "vllm", "sglang"] = "auto"
    refresh: Literal["auto", "weights", "adapter"] = "auto"
    refresh_every: int = 1
    folder: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    send_seed: bool = False
    largest_gap: float = 0.2

    section: ClassVar[str] = "grpo.rollouts"
    who: ClassVar[str] = "rollout server"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {self.refresh_every}.")
        if self.folder is not None and not self.folder.strip():
            raise ValueError("folder must be the name of a folder or null, got an empty text.")
        if not self.largest_gap > 0:
            raise ValueError(f"largest_gap must be above 0, got {self.largest_gap}.")
        if not self.base_url:
            raise ValueError("base_url must be the server's address, such as http://localhost:8000/v1, got none.")


ENGINES: dict[str, type[InProcess] | type[RolloutServerSettings]] = {
    "in_process": InProcess,
    "server": RolloutServerSettings,
}
"""Who writes the replies, by its name in the settings."""
