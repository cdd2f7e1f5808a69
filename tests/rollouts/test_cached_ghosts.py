"""Cached ghosts: a teacher's likeliest tokens at its own text, kept by `generate`, and a training that reads them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import error_of
from helpers.loopback_server import LoopbackServer
from helpers.writing_teacher import WritingTeacher

from cotgrpo.cli import main
from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.rollouts.cached_ghosts import (
    Cache,
    CachedBatches,
    CachedReply,
    check_tokenizer,
    read_cache,
    with_cached_ghosts,
    write_cache,
)
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.training.loop import TIME_KEYS

pytest.importorskip("openai")

K = 4
ROWS = ProceduralTeacher(seed=1).draw(24)
SETTINGS = """
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 32, init_scale: 0.2}
data: {seq_len: 192, test_rows: 4, loss_on: completion}
sft: {steps: 2, batch_size: 2, log_every: 2}
grpo:
  steps: 6
  batch_size: 2
  log_every: 3
  objective: {name: forward_kl, top_k: 3}
  ghosts: {source: cached}
eval: {rows: 4, batch_size: 4, max_new_tokens: 4}
checkpoint: {every: 2}
"""
SHAPE = DecoderConfig(
    vocab_size=300, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, a model with a tokenizer, and the settings of a run with that tokenizer."""
    folder = tmp_path_factory.mktemp("cached")
    tokenizer = train_tokenizer((f"{t.question}\n{t.rationale}\n{t.answer}" for t in ROWS), vocab_size=280)
    save_pretrained(folder / "teacher", SHAPE, init_params(SHAPE, jax.random.key(5)), tokenizer=tokenizer)
    rows = [json.dumps({"question": row.question, "gold": row.answer}) for row in ROWS]
    (folder / "questions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "c.yaml").write_text(f"tokenizer: {{path: {folder / 'teacher'}}}\n{SETTINGS}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> WritingTeacher:
    return WritingTeacher(folder / "teacher", ROWS)


def generate(folder: Path, teacher: WritingTeacher, out: Path, *more: str, top: int = K) -> int:
    with LoopbackServer(teacher) as server:
        where = ["--teacher.base_url", server.url, "--teacher.model", "m", "--prompt.question", "Solve.\n{question}"]
        questions = ["--questions", str(folder / "questions.jsonl"), "--out", str(out)]
        return main(["generate", *questions, *where, "--top_logprobs", str(top), *more])


@pytest.fixture(scope="module")
def made(folder: Path, teacher: WritingTeacher) -> Path:
    """What `generate` writes."""
    assert generate(folder, teacher, folder / "made") == 0
    return folder / "made"


def options(folder: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    own = ["--config", str(folder / "c.yaml"), "--data.train", str(data / "triples.jsonl"), "--run_dir", str(run_dir)]
    return [*own, *more]


def template_of(folder: Path, kind: str) -> AnyTemplate:
    from cotgrpo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "teacher")
    if kind == "plain":
        return Template(tokenizer, loss_on="completion")
    tokenizer.chat_template = (
        "{% for m in messages %}<sep>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<sep>assistant\n{% endif %}"
    )
    return ChatTemplate(tokenizer, loss_on="completion")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_each_context_has_what_the_teacher_said_at_that_place_of_the_text(
    folder: Path, teacher: WritingTeacher, made: Path, kind: str, packing: bool
) -> None:
    """Through template, truncation and packing: every token of rationale and answer, and none of the template."""
    template, cache = template_of(folder, kind), read_cache(made / "ghosts.parquet")
    triples, _ = read_triples(made / "triples.jsonl")
    examples, _ = make_examples(triples, template, 192, too_long="drop")
    vocabulary = Vocabulary(template.tokenizer, len(template.tokenizer))
    found, report = with_cached_ghosts(examples, triples, cache, vocabulary, top_k=3, choice="argmax", missing="error")
    assert report.with_entry == report.rows == len(examples) and report.known > 0.7 * report.targets
    packed = make_batches(found, batch_size=3, seq_len=192, packing=packing, shuffle=False, num_epochs=1)
    batches = CachedBatches(packed, cache)
    state = batches.get_state()
    with pytest.raises(DataError, match="has changed since the run was stopped"):
        CachedBatches(packed, dataclasses.replace(cache, crc=1)).set_state(state)
    seen = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            break
        for b, row in enumerate(np.asarray(batch.segment_ids)):
            for segment in range(1, row.max() + 1):
                seen += check_segment(teacher, triples, template, batch, b, np.nonzero(row == segment)[0])
    assert seen == report.known


def check_segment(
    teacher: WritingTeacher, triples: list[Triple], template: AnyTemplate, batch: Any, b: int, columns: np.ndarray
) -> int:
    """Compare one document with the model itself. Returns how many contexts had the teacher's distribution."""
    tokens = [int(t) for t in np.asarray(batch.tokens)[b, columns]]
    text = template.tokenizer.decode(tokens)
    (triple,) = [t for t in triples if t.question in text and t.rationale in text]
    solution = f"{triple.rationale}\n#### {triple.answer}"
    ids = teacher.tokenizer.encode(solution)
    rows = teacher.model([3, *ids])[:-1]
    known = 0
    for column in columns:
        if not batch.loss_mask[b, column]:
            continue
        top, values = batch.extra["top_ids"][b, column], batch.extra["top_log_probs"][b, column]
        if values[0] == 0:
            continue  # of the text alone
        matches = [row for row in rows if [int(i) for i in np.argsort(-row, kind="stable")[:1]] == [int(top[0])]]
        assert any(np.allclose(row[top[values > -1e29]], values[values > -1e29], atol=1e-3) for row in matches)
        assert batch.ghost_tokens[b, column] == top[0]
        known += 1
    return known


@pytest.mark.slow
def test_a_run_reads_them_without_a_teacher_and_resumes(folder: Path, made: Path, tmp_path: Path) -> None:
    """The loss of step 1 is that of the text where nothing is known, and no server is there."""
    cached = ("--grpo.ghosts.path", str(made / "ghosts.parquet"))
    run = folder / "run"
    assert main(["sft", *options(folder, made, run, *cached)]) == 0
    assert main(["grpo", *options(folder, made, run, *cached)]) == 0
    rows = [row for row in read_metrics(run / "grpo") if "train/loss" in row]
    assert all(0 < row["train/top_mass"] <= 1 for row in rows)
    shutil.copytree(run, tmp_path / "cut")
    cut = tmp_path / "cut" / "grpo"
    for name in ("checkpoints/6", "report.json", "after.json"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["grpo", *options(folder, made, cut.parent, *cached)]) == 0
    lasting = lambda stage: [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(stage)]
    assert lasting(cut) == lasting(run / "grpo")


def test_generate_goes_on_after_a_stop_and_writes_the_same_file(
    folder: Path, teacher: WritingTeacher, made: Path, tmp_path: Path
) -> None:
    """Stopped after 9 replies: the journal has their log-probabilities, and nothing is asked twice."""
    teacher.left = 9
    try:
        assert generate(folder, teacher, tmp_path / "out", "--teacher.concurrency", "1") == 2
    finally:
        teacher.left = 10**6
    lines = (tmp_path / "out" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 9 and all(json.loads(line)["reply"]["logprobs"] for line in lines)
    assert generate(folder, teacher, tmp_path / "out", "--teacher.concurrency", "1") == 0
    tables = [pq.read_table(path / "ghosts.parquet").to_pylist() for path in (made, tmp_path / "out")]
    assert tables[0] == tables[1] and len(tables[0]) == len(ROWS)


def test_a_server_without_logprobs_and_another_count_are_errors(
    folder: Path, teacher: WritingTeacher, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.sends_logprobs = False
    try:
        assert generate(folder, teacher, tmp_path / "out") == 2
    finally:
        teacher.sends_logprobs = True
    assert "reply has no logprobs" in error_of(capsys)
    assert generate(folder, teacher, made, top=K + 1) == 2
    assert "top_logprobs (4 there, 5 now)" in error_of(capsys)


def other_tokenizer(path: Path, cache: Cache) -> None:
    """Tokens of two bytes each, where the student's tokenizer has single digits."""
    paired = []
    for reply in cache.replies.values():
        text = b"".join(reply.pieces)
        pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
        paired.append(CachedReply(reply.key, [[-0.1]] * len(pieces), pieces, [[b"x"]] * len(pieces)))
    write_cache(path, paired, K)


def few(path: Path, cache: Cache) -> None:
    write_cache(path, list(cache.replies.values()), 2)


def half(path: Path, cache: Cache) -> None:
    path.write_bytes(cache.path.read_bytes()[:-500])


def text_file(path: Path, cache: Cache) -> None:
    path.write_text("question,answer\n1,2\n", encoding="utf-8")


def triples_only(path: Path, cache: Cache) -> None:
    table = pq.read_table(cache.path).select(["question", "rationale", "answer"])
    pq.write_table(table.replace_schema_metadata(None), path)


def without_logprobs(path: Path, cache: Cache) -> None:
    first, *rest = cache.replies.values()
    write_cache(path, [CachedReply(first.key, []), *rest], K)


def with_nan(path: Path, cache: Cache) -> None:
    first, *rest = cache.replies.values()
    values = [[float("nan")] * len(top) for top in first.top_log_probs]
    write_cache(path, [CachedReply(first.key, values, first.pieces, first.top_pieces), *rest], K)


def other_rows(path: Path, cache: Cache) -> None:
    moved = [
        CachedReply(("other", *r.key[1:]), r.top_log_probs, r.pieces, r.top_pieces) for r in cache.replies.values()
    ]
    write_cache(path, moved, K)


def of_a_student(path: Path, cache: Cache) -> None:
    write_cache(path, list(cache.replies.values()), K, {"tokenizer": "another"})


def missing(path: Path, cache: Cache) -> None:
    pass


BAD = {
    other_tokenizer: "is of a teacher with another tokenizer than the student: 24 of 24 replies have other tokens",
    few: "has 2 log-probabilities at each token, and the objective reads 3. Lower grpo.objective.top_k",
    half: "it is not Parquet, or not whole",
    text_file: "it is not Parquet, or not whole",
    triples_only: "holds no cached ghosts: expected a ghosts.parquet",
    without_logprobs: "row 1 has no log-probabilities",
    with_nan: "row 1 has a list with a wrong length or log-probability",
    other_rows: "the row has no entry in",
    of_a_student: "was made for a student with another tokenizer",
    missing: "no such file of cached ghosts",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_cache_is_one_line(folder: Path, made: Path, tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "ghosts.parquet"
    spoil(path, read_cache(made / "ghosts.parquet"))
    template = template_of(folder, "plain")
    triples, _ = read_triples(made / "triples.jsonl")
    examples, _ = make_examples(triples, template, 192)
    vocabulary = Vocabulary(template.tokenizer, len(template.tokenizer))
    with pytest.raises(DataError) as raised:
        cache = read_cache(path)
        check_tokenizer(cache, vocabulary, {"tokenizer": "this one"})
        with_cached_ghosts(examples, triples, cache, vocabulary, top_k=3, choice="argmax", missing="error")
    assert BAD[spoil] in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_says_what_is_wrong_with_a_cache(
    folder: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = options(folder, made, tmp_path / "run", "--student.path", str(folder / "teacher"))
    own = [*own, "--grpo.init_from", "student.path"]
    assert main(["grpo", *own]) == 2
    assert "grpo.ghosts.path must be the file of cached ghosts" in error_of(capsys)


def test_rows_without_an_entry_may_learn_from_the_text(folder: Path, made: Path) -> None:
    template, cache = template_of(folder, "plain"), read_cache(made / "ghosts.parquet")
    triples, _ = read_triples(made / "triples.jsonl")
    examples, _ = make_examples(triples, template, 192)
    first = next(iter(cache.replies))
    one = Cache(cache.path, K, {}, {first: cache.replies[first]})
    vocabulary = Vocabulary(template.tokenizer, len(template.tokenizer))
    found, report = with_cached_ghosts(examples, triples, one, vocabulary, top_k=0, choice="argmax", missing="text")
    assert report.with_entry == 1 and [*found[0].extra] == ["ghost_tokens"]
    for example, own in zip(found[1:], examples[1:], strict=True):
        np.testing.assert_array_equal(example.extra["ghost_tokens"], own.tokens[1:])


def test_a_model_folder_keeps_its_likeliest_tokens_too(folder: Path) -> None:
    """The log-probabilities of the model's own reply, by the model itself."""
    from cotgrpo.teachers.endpoint import Request, TeacherReply
    from cotgrpo.teachers.local import LocalTeacher

    local = folder / "local"
    shutil.copytree(folder / "teacher", local, dirs_exist_ok=True)
    template = (
        "{% for m in messages %}<sep>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<sep>{% endif %}"
    )
    (local / "chat_template.jinja").write_text(template, encoding="utf-8")
    found: list[TeacherReply] = []
    teacher = LocalTeacher(str(local), max_tokens=6, batch_size=1, top_logprobs=3)
    teacher.ask([Request(("a", 0), [{"role": "user", "content": "1 + 1"}])], lambda _, reply: found.append(reply))  # type: ignore[arg-type]
    (reply,) = found
    assert reply.logprobs is not None and len(reply.logprobs) == reply.completion_tokens
    for piece, top in reply.logprobs:
        assert len(top) == 3 and top[0][0] == piece  # greedy
        assert 0 >= top[0][1] >= top[1][1] >= top[2][1]
