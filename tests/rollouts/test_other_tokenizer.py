"""A teacher with another tokenizer in this process: its choices, and their way into the student's tokens."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.commands import SETTINGS
from helpers.scoring_server import ScoringServer, own_model
from helpers.small_tokenizers import TEXT, byte_level, metaspace
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cotgrpo.config import ConfigError
from cotgrpo.data.sources import DataError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import init_params, make_student
from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.rollouts.other_tokenizer import LocalScorer, OtherTokenizer, Tokens, check_tokenizers, plain_prompt
from cotgrpo.runs import Run
from cotgrpo.teacher_servers.server import Scores, Text
from cotgrpo.teachers.endpoint import TeacherError
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.training.hooks import TrainingStopped
from cotgrpo.training.loop import TIME_KEYS

SHAPE = DecoderConfig(
    vocab_size=300, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=48, init_scale=0.3
)


def tokens_of(tokenizer: Any) -> Tokens:
    return Tokens(tokenizer, [tokenizer.eos_token_id])


def make_scorer(seed: int = 0) -> tuple[LocalScorer, Any, Any]:
    teacher, params = make_student(SHAPE), init_params(SHAPE, jax.random.key(seed))
    return LocalScorer(teacher, params), teacher, params


def test_the_choices_are_those_of_the_whole_logits() -> None:
    scorer, teacher, params = make_scorer()
    texts = [Text([5, 6, 7], [8, 9, 1]), Text([4], [10, 11, 12, 13]), Text([3, 2], [])]
    found = scorer.score_later(lambda: texts, 6).result()
    assert found.ids.shape == (3, 6, 1) and found.known.sum(axis=1).tolist() == [3, 4, 0]
    for row, text in enumerate(texts):
        ids = jnp.asarray([[*text.context, *text.scored]], jnp.int32)
        columns = jnp.arange(ids.shape[1], dtype=jnp.int32)[None], jnp.ones_like(ids)
        logits = teacher.logits(params, ids, *columns)[0]
        wanted = np.argmax(logits, axis=-1)[len(text.context) - 1 : ids.shape[1] - 1]
        assert found.ids[row, : len(text.scored), 0].tolist() == wanted.tolist()


def test_one_tokenizer_of_single_bytes_gives_the_teachers_own_choices() -> None:
    """Each token is one byte, so the two ways meet at every place, and y* is the teacher's choice itself."""
    tokenizer = byte_level(258)  # no merges
    scorer, *_ = make_scorer(1)
    tokens = tokens_of(tokenizer)
    reply = tokens.encode("12 + 7 = 19.")
    asked = Text([*tokens.encode("What is 12 + 7?")], [*reply, tokenizer.eos_token_id])
    plain = scorer.score([asked], len(asked.scored))
    found = OtherTokenizer(tokens, tokens, scorer).score_later(lambda: [asked], 40).result()
    assert found.ids.shape == (1, 40, 1)
    for place in range(len(asked.scored)):
        choice = int(plain.ids[0, place, 0])
        if choice < SHAPE.vocab_size and choice < len(tokenizer):
            half_a_character = choice != tokenizer.eos_token_id and not tokens.bytes_of(choice).isascii()
            assert bool(found.known[0, place]) != half_a_character
            assert half_a_character or found.ids[0, place, 0] == choice
    assert not found.known[0, len(asked.scored) :].any()


@dataclasses.dataclass
class Agreeing:
    """A teacher that chooses what stands there, and ends where the reply does."""

    end_id: int
    asked: list[Text] = dataclasses.field(default_factory=list)

    def score_later(self, make_texts: Any, columns: int) -> Future[Scores]:
        self.asked = list(make_texts())
        ids = np.zeros((len(self.asked), columns, 1), np.int32)
        log_probs = np.full(ids.shape, MASKED_LOGIT, np.float32)
        for row, text in enumerate(self.asked):
            ids[row, : len(text.scored), 0], log_probs[row, : len(text.scored)] = text.scored, 0.0
        found: Future[Scores] = Future()
        found.set_result(Scores(ids, log_probs))
        return found

    def check_same_model(self, before: Sequence[float], now: Sequence[float], when: str) -> None: ...


@pytest.mark.parametrize("pair", ["byte_level/metaspace", "metaspace/byte_level", "byte_level/coarse"])
def test_a_teacher_that_agrees_gives_back_the_reply(pair: str) -> None:
    kinds = {"byte_level": byte_level(320), "metaspace": metaspace(500), "coarse": byte_level(600)}
    student, teacher = (tokens_of(kinds[name]) for name in pair.split("/"))
    agreeing = Agreeing(teacher.end_ids[0])
    replies = [Text([1, 2], [*student.encode(text), *student.end_ids]) for text in TEXT]
    cut_off = Text([1, 2], student.encode(TEXT[0])[:7])
    found = OtherTokenizer(student, teacher, agreeing).score_later(lambda: [*replies, cut_off], 200).result()
    assert all(text.context == [1, 2] for text in agreeing.asked), "contexts are the teacher's already"
    assert [text.scored[-1] == teacher.end_ids[0] for text in agreeing.asked] == [True] * len(TEXT) + [False]
    for row, text in enumerate(replies):
        known = np.flatnonzero(found.known[row])
        assert known[-1] == len(text.scored) - 1 and found.ids[row, known[-1], 0] == student.end_ids[0]
        assert np.mean([found.ids[row, n, 0] == text.scored[n] for n in known if n]) > 0.9
    assert found.known.sum() > 0.3 * sum(len(text.scored) for text in replies)
    assert not found.known[len(TEXT), 7:].any()


def test_a_reply_of_very_many_teacher_tokens_is_supervised_at_its_start() -> None:
    """A token of the student may be more tokens of the teacher than there are places for."""
    student, teacher = tokens_of(byte_level(700)), tokens_of(byte_level(258))
    ids = student.encode("She has twelve apples, gives away five")
    found = OtherTokenizer(student, teacher, Agreeing(1)).score_later(lambda: [Text([1], ids)], len(ids)).result()
    known = found.known[0, : len(ids)]
    assert 0 < known.sum() < len(ids) and known[0] and not known[-1]


def test_the_share_of_contexts_with_a_ghost() -> None:
    fine, coarse = tokens_of(byte_level(300)), tokens_of(byte_level(700))
    assert check_tokenizers(fine, fine, TEXT) == 1.0
    assert check_tokenizers(coarse, fine, TEXT) > check_tokenizers(fine, coarse, TEXT) > 0.2


def test_tokenizers_that_change_the_text_are_refused() -> None:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "@"), normalizers.Replace("W", "@")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken("<eos>", special=True)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    changing = tokens_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    with pytest.raises(DataError, match="changes the text"):
        check_tokenizers(tokens_of(byte_level(300)), changing, ["What a day", "What now"])


def test_a_plain_prompt_begins_as_the_teachers_texts_do() -> None:
    tokenizer = byte_level(300)
    tokens = tokens_of(tokenizer)
    assert plain_prompt(tokens, "What?") == tokens.encode("What?")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of another kind, and no chat template."""
    tokenizer = metaspace(500)
    shape = dataclasses.replace(SHAPE, vocab_size=len(tokenizer))
    folder = tmp_path_factory.mktemp("teachers") / "other"
    return save_pretrained(folder, shape, init_params(shape, jax.random.key(3)), tokenizer=tokenizer)


def small_run(folder: Path) -> Run:
    own = yaml.safe_load(SETTINGS)
    return Run(folder, console=Console(file=io.StringIO()), train=ProceduralTeacher(seed=1).draw(120), **own)


@pytest.mark.slow
def test_a_run_with_a_teacher_of_another_tokenizer(teacher: Path, tmp_path: Path) -> None:
    """It says which share has ghosts, and a run that was stopped goes on as one that was not."""
    whole = small_run(tmp_path / "whole")
    whole.sft(steps=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    ghosts = {"source": "teacher_model", "teacher": str(teacher), "other_tokenizer": True, "max_new_tokens": 16}
    whole.grpo(ghosts=ghosts, log_every=1)
    output = whole.console.file
    assert isinstance(output, io.StringIO) and "gives a ghost at about 9" in output.getvalue()

    class Stopped:
        def on_step(self, step: int) -> None:
            if step == 3:
                raise TrainingStopped("enough")

    init = {"init_from": str(tmp_path / "parts" / "sft")}
    parts = Run.open(tmp_path / "parts", console=Console(file=io.StringIO()), callbacks=[Stopped()])
    with pytest.raises(TrainingStopped, match="enough"):
        parts.grpo(ghosts=ghosts, log_every=1, **init)
    again = Run.open(tmp_path / "parts", console=Console(file=io.StringIO()), callbacks=[])
    again.grpo(ghosts=ghosts, log_every=1, **init)
    rows = [read_metrics(tmp_path / name / "grpo") for name in ("whole", "parts")]
    kept = [[{k: v for k, v in row.items() if k not in TIME_KEYS} for row in found] for found in rows]
    assert kept[0] == kept[1] and any("train/without_ghost" in row for row in kept[0])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a distribution": ({"objective": {"name": "forward_kl"}}, "objective.name"),
    "an exact divergence": ({"objective": {"name": "reverse_kl", "top_k": None}}, "another tokenizer"),
    "drawn ghosts": ({"ghosts": {"choice": "drawn"}}, "ghosts.choice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_another_tokenizer_cannot_give(name: str, tmp_path: Path) -> None:
    given, text = WRONG[name]
    own = {"source": "teacher_model", "teacher": "org/name", "other_tokenizer": True, **given.get("ghosts", {})}
    with pytest.raises(ConfigError, match=text):
        Run(tmp_path / "run", grpo={**given, "ghosts": own})


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_server_gives_what_the_model_in_this_process_gives(dialect: str, teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    small_run(tmp_path / "base").sft(steps=2)
    settings: dict[str, Any] = {"init_from": str(tmp_path / "base" / "sft"), "log_every": 1, "steps": 3}
    shutil.copytree(tmp_path / "base", tmp_path / "served")
    here = Run.open(tmp_path / "base", console=Console(file=io.StringIO()))
    ghosts = {"source": "teacher_model", "teacher": str(teacher), "other_tokenizer": True, "max_new_tokens": 16}
    here.grpo(ghosts=ghosts, **settings)
    served = Run.open(tmp_path / "served", console=Console(file=io.StringIO()))
    with ScoringServer(*own_model(str(teacher)), (dialect,)) as server:
        own = {"source": "teacher_server", "base_url": server.url, "tokenizer": str(teacher), "max_new_tokens": 16}
        served.grpo(ghosts=own, **settings)
    logs = [read_metrics(tmp_path / name / "grpo") for name in ("base", "served")]
    kept = [[{k: v for k, v in row.items() if k not in TIME_KEYS} for row in log] for log in logs]
    assert kept[1] == [pytest.approx(row, abs=1e-3) for row in kept[0]]
    assert all(row["train/without_ghost"] < 1 for row in kept[1] if "train/loss" in row)


def test_a_server_with_another_tokenizer_than_it_was_said_to_have(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    run = small_run(tmp_path / "run")
    run.sft(steps=1)
    coarse = tmp_path / "coarse"
    byte_level(700).save_pretrained(coarse)
    ghosts = {"source": "teacher_server", "tokenizer": str(coarse), "max_new_tokens": 8}
    other = pytest.raises(TeacherError, match="tokenizer")
    with ScoringServer(*own_model(str(teacher)), ("vllm",)) as server, other:
        run.grpo(ghosts={**ghosts, "base_url": server.url}, steps=1)
