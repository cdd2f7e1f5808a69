"""The student's own right replies as ghosts: the one that is kept, when they are refreshed, and resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.data.own.verifier import Verifier
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import read_triples
from cotgrpo.ghosts.self_reply import SampledReply, best_reply
from cotgrpo.rollouts.self_replies import SelfReplyBatches, SelfReplySettings
from cotgrpo.sampling import Prompts, Replies
from cotgrpo.teachers.procedural import ProceduralTeacher

TRIPLES = ProceduralTeacher(seed=1).draw(12)
TOKENIZER = train_tokenizer((f"{t.question}\n{t.rationale}\n{t.answer}" for t in TRIPLES), vocab_size=280)
TEMPLATE = Template(TOKENIZER, loss_on="completion")
NEW, COLUMNS = 120, 80


def sampled(text: str, log_prob: float = -1.0, finished: bool = True) -> SampledReply:
    return SampledReply(np.array([*TEMPLATE.ids(text), TEMPLATE.eos_id], np.int32), log_prob, finished)


def test_the_likeliest_right_reply_is_kept() -> None:
    row = TRIPLES[0]
    right, other = f"so it is<sep>{row.answer}", f"I think<sep>{row.answer}.0"
    replies = [
        sampled(f"wrong<sep>{row.answer}1", -0.1),
        sampled(f"no answer {row.answer}", -0.1),
        sampled(f"cut off<sep>{row.answer}", -0.1, finished=False),
        sampled(f"twice<sep>{row.answer}<sep>{row.answer}", -0.1),
        sampled(right, -0.9),
        sampled(other, -0.5),
    ]
    kept = best_reply(TEMPLATE, row, replies)
    assert kept is not None and (kept.question, kept.rationale) == (row.question, "I think")
    assert best_reply(TEMPLATE, row, replies[:4]) is None


def sampler(only: int | None = None) -> Any:
    """Answer as the row does, the parameters' word first; all but the first `only` questions wrongly."""
    by_prompt = {tuple(TEMPLATE.prompt(t.question).tolist()): n for n, t in enumerate(TRIPLES)}

    def sample(params: Any, prompts: Prompts, key: Any) -> Replies:
        tokens = np.full((len(prompts.tokens), NEW), TEMPLATE.pad_id, np.int32)
        lengths = np.zeros(len(tokens), np.int32)
        for row, (prompt, length) in enumerate(zip(prompts.tokens, prompts.lengths, strict=True)):
            if not length:  # a row without a prompt
                continue
            number = by_prompt[tuple(prompt[-length:].tolist())]
            answer = TRIPLES[number].answer if only is None or number < only else "none"
            ids = sampled(f"{params} {TRIPLES[number].rationale}<sep>{answer}").ids
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return jax.tree.map(
            jax.numpy.asarray, Replies(tokens, np.zeros(tokens.shape, np.float32), lengths, lengths < NEW)
        )

    return sample


def batches(folder: Path, only: int | None = None) -> SelfReplyBatches:
    settings = SelfReplySettings(
        num_generations=2,
        questions=5,
        refresh_every=3,
        batch_size=2,
        seq_len=COLUMNS + NEW,
        packing=True,
        prompt_columns=COLUMNS,
    )
    return SelfReplyBatches([sampler(only)], TEMPLATE, TRIPLES, settings, folder, seed=3)


def taken(source: SelfReplyBatches, first: int, last: int) -> list[np.ndarray]:
    found = []
    for number in range(first, last):
        source.set_params(f"word{number}")
        found.append(next(source).tokens)
    return found


def test_replies_are_written_anew_with_the_newest_parameters(tmp_path: Path) -> None:
    taken(batches(tmp_path), 0, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "3.jsonl", "6.jsonl"]
    for step in (0, 3, 6):
        triples, _ = read_triples(tmp_path / f"{step}.jsonl")
        assert len({t.question for t in triples}) == len(triples) and (len(triples) == 5 or step == 6)
        assert all(t.rationale.startswith(f"word{step} ") for t in triples)
    asked = [t.question for step in (0, 3) for t in read_triples(tmp_path / f"{step}.jsonl")[0]]
    assert len(set(asked)) == 10  # other questions each time, until all were asked


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_has_the_same_batches(tmp_path: Path, stop: int) -> None:
    whole = taken(batches(tmp_path / "whole"), 0, 8)
    source = batches(tmp_path / "cut")
    taken(source, 0, stop)
    again = batches(tmp_path / "cut")
    again.set_state(source.get_state())
    np.testing.assert_array_equal(taken(again, stop, 8), whole[stop:])


def test_wrong_replies_are_left_out_and_none_right_is_an_error(tmp_path: Path) -> None:
    taken(batches(tmp_path / "some", only=9), 0, 1)
    kept, _ = read_triples(tmp_path / "some" / "0.jsonl")
    assert 0 < len(kept) < 5
    with pytest.raises(DataError, match="None of 2 replies to each of 5 questions was right after 0 updates"):
        taken(batches(tmp_path / "none", only=0), 0, 1)


def test_a_verifier_of_the_users_own_decides() -> None:
    """It sees the whole reply and the row; of its right replies the one with the highest reward is kept."""
    seen = []

    def verify(reply: str, gold: str, row: dict[str, Any]) -> tuple[bool, str]:
        seen.append((reply, gold, row["mark"]))
        return reply.startswith("good"), "not good"

    row = dataclasses.replace(TRIPLES[0], row={"mark": 3})
    replies = [sampled(f"bad<sep>{row.answer}"), sampled("good<sep>5", -2.0), sampled("good and long<sep>5", -1.0)]
    kept = lambda **own: best_reply(dataclasses.replace(TEMPLATE, verifier=Verifier(verify, **own)), row, replies)
    assert getattr(kept(), "rationale", None) == "good and long"
    assert seen == [(reply, row.answer, 3) for reply in (f"bad<sep>{row.answer}", "good<sep>5", "good and long<sep>5")]
    assert getattr(kept(reward=lambda reply, gold, row: -len(reply)), "rationale", None) == "good"
    verifier = Verifier(lambda reply, gold, row: row["nothing"])
    with pytest.raises(OwnCodeError, match=r"verify.function .*failed \(KeyError: 'nothing'\) at .*test_self_reply.py"):
        best_reply(dataclasses.replace(TEMPLATE, verifier=verifier), row, replies)
