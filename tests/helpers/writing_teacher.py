"""A teacher on loopback that writes the solution of each question, with log-probabilities of a real model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cotgrpo.data.tokenizer import token_bytes
from cotgrpo.data.triples import Triple
from helpers.loopback_server import Answer, Asked
from helpers.scoring_server import own_model


class WritingTeacher:
    """Answers chat completions. Give it to `LoopbackServer`, or ask `chat` for an answer.

    Args:
        folder: of the model.
        rows: what it knows.

    Attributes:
        sends_logprobs: whether it sends them if it is asked for them.
        left: how many more questions it answers.
    """

    def __init__(self, folder: Path, rows: Iterable[Triple]) -> None:
        self.model, self.tokenizer = own_model(str(folder))
        self.solutions = {row.question: f"{row.rationale}\n#### {row.answer}" for row in rows}
        self.sends_logprobs, self.left = True, 10**6

    def __call__(self, asked: Asked) -> Answer:
        self.left -= 1
        if self.left < 0:
            return Answer({"error": {"message": "no more"}}, 402)
        return Answer(self.chat(asked.json()))

    def chat(self, body: Any) -> dict[str, Any]:
        """The answer of chat completions."""
        text = self.solutions[body["messages"][-1]["content"].splitlines()[-1]]
        choice: dict[str, Any] = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.sends_logprobs:
            choice["logprobs"] = {"content": self.logprobs(text, body["top_logprobs"])}
        return {"model": "m", "choices": [choice]}

    def logprobs(self, text: str, count: int) -> list[dict[str, Any]]:
        ids = self.tokenizer.encode(text)
        rows = self.model([3, *ids])[:-1]
        entry = lambda i, row: {"logprob": float(row[i]), **self.token(i)}
        best = lambda row: [int(i) for i in np.argsort(-row, kind="stable")[:count]]
        return [
            entry(i, row) | {"top_logprobs": [entry(j, row) for j in best(row)]}
            for i, row in zip(ids, rows, strict=True)
        ]

    def token(self, i: int) -> dict[str, Any]:
        raw = token_bytes(self.tokenizer, i, 3)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw)}
