"""A teacher on a server, in the dialect of each kind: it gives what the model in this process gives, or one line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pytest
from helpers.scoring_server import DIALECTS, ScoringServer, own_model

from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.rollouts.served_ghosts import choose_ghosts, scored_batch
from cotgrpo.sampling import Replies, pad_prompts
from cotgrpo.teacher_servers.server import Scores, ServerSettings, Text
from cotgrpo.teacher_servers.server import ScoringServer as Client
from cotgrpo.teacher_servers.vocabulary import Vocabulary, first_difference
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.teachers.server_errors import TeacherError

pytest.importorskip("openai")

ROWS = ProceduralTeacher(seed=3).draw(30)
TEXTS = [f"{row.question}\n{row.rationale}" for row in ROWS]
TOP_K = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher with a padded embedding."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    shape = DecoderConfig(
        vocab_size=320, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.3
    )
    return save_pretrained(folder / "model", shape, init_params(shape, jax.random.key(5)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Callable[[list[int]], np.ndarray], Any]:
    return own_model(str(folder))


@contextmanager
def connected(
    server: ScoringServer, folder: Path, dialect: str = "auto", top_k: int = TOP_K, **more: Any
) -> Iterator[Client]:
    """A client that has not connected yet."""
    tokenizer = load_tokenizer(folder)
    values: dict[str, Any] = {"retry_delay": 0.01, "retries": 2, "timeout": 5.0, "dialect": dialect} | more
    settings = ServerSettings(base_url=server.url, **values)
    samples = [Text(ids[:1], ids[1:40]) for ids in map(Vocabulary(tokenizer, len(tokenizer)).encode, TEXTS[:2])]
    said: list[str] = []
    client = Client(settings, Vocabulary(tokenizer, len(tokenizer)), top_k, samples, said.append)
    client.said = said  # type: ignore[attr-defined]
    try:
        yield client
    finally:
        client.close()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Replies to prompts of several lengths, as tokens of every kind."""

    prompts: Any
    replies: Replies
    texts: list[Text]


def rollout(tokenizer: Any) -> Rollout:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[5:8]]
    prompts = [np.array(row[:n], np.int32) for row, n in zip(ids, (14, 19, 16), strict=True)]
    lengths = np.array([27, 13, 25], np.int32)
    tokens = np.zeros((3, 27), np.int32)
    for row, own, prompt, n in zip(tokens, ids, prompts, lengths, strict=True):
        row[:n] = own[len(prompt) : len(prompt) + n]
    replies = Replies(tokens, np.zeros((3, 27), np.float32), lengths, np.ones(3, bool))  # type: ignore[arg-type]
    texts = [Text(p.tolist(), row[:n].tolist()) for p, row, n in zip(prompts, tokens, lengths.tolist(), strict=True)]
    return Rollout(pad_prompts(prompts), replies, texts)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_ghosts_of_the_model_in_this_process(folder: Path, model: Any, dialect: str) -> None:
    """`echo` names tokens by their texts: a part of a character has none, and its context then has no ghost."""
    teacher, size = load_pretrained(folder, "float32"), len(model[1])
    rolled = rollout(model[1])
    expected = live_ghosts(
        make_student(teacher.config, size), teacher.params, rolled.prompts, rolled.replies, top_k=TOP_K
    )
    with ScoringServer(model[0], model[1], (dialect,)) as server, connected(server, folder) as client:
        client.connect()
        assert client.dialect is not None and client.dialect.name == dialect
        scores = client.score_later(lambda: rolled.texts, 27).result()
    ghosts, known = choose_ghosts(scores, None)
    batch, _ = scored_batch(rolled.prompts, rolled.replies, ghosts, known, (scores.ids, scores.log_probs))
    mask = np.asarray(batch.loss_mask) != 0
    if dialect.startswith("echo"):
        assert 0.1 < mask.sum() / np.asarray(expected.loss_mask).sum() < 1
    else:
        np.testing.assert_array_equal(mask, np.asarray(expected.loss_mask) != 0)
        np.testing.assert_array_equal(batch.extra["top_ids"], expected.extra["top_ids"])
    np.testing.assert_array_equal(np.asarray(batch.ghost_tokens)[mask], np.asarray(expected.ghost_tokens)[mask])
    np.testing.assert_array_equal(np.asarray(batch.tokens), np.asarray(expected.tokens))
    np.testing.assert_array_equal(np.asarray(batch.drawn_tokens), np.asarray(expected.drawn_tokens))
    for name, log_probs in (("top_ids", "top_log_probs"),):
        there = {(i, k) for i, k in np.ndindex(int(mask.sum()), TOP_K)}
        ids, values = np.asarray(batch.extra[name])[mask], np.asarray(batch.extra[log_probs])[mask]
        own_ids = np.asarray(expected.extra[name])[mask]
        own = np.asarray(expected.extra[log_probs])[mask]
        for i, k in sorted(there):
            if values[i, k] > -1e29:  # a filler otherwise
                (place,) = np.nonzero(own_ids[i] == ids[i, k])[0]
                assert values[i, k] == pytest.approx(own[i, place], abs=1e-3)


def test_auto_takes_the_first_dialect_that_works(folder: Path, model: Any) -> None:
    for offered, taken in ((DIALECTS, "vllm"), (DIALECTS[1:], "sglang"), (("llama_cpp",), "llama_cpp")):
        with ScoringServer(model[0], model[1], offered) as server, connected(server, folder) as client:
            client.connect()
            assert client.dialect is not None and client.dialect.name == taken


def first_choice(answer: Any) -> Any:
    return answer["choices"][0]


def drop_last(answer: Any) -> Any:
    first_choice(answer)["prompt_logprobs"].pop()
    return answer


def replaced(value: object) -> Callable[[Any], Any]:
    """The likeliest log-probability of the last place is another value."""

    def change(answer: Any) -> Any:
        place = first_choice(answer)["prompt_logprobs"][-1]
        next(iter(place.values()))["logprob"] = value
        return answer

    return change


def other_ids(number: int) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        place = first_choice(answer)["prompt_logprobs"][-1]
        place[str(number)] = {"logprob": -0.5}
        return answer

    return change


def only(place: object) -> Callable[[Any], Any]:
    def change(answer: Any) -> Any:
        first_choice(answer)["prompt_logprobs"][-1] = place
        return answer

    return change


MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a place too few": (drop_last, "places, and the text has"),
    "NaN": (replaced(float("nan")), "is nan"),
    "a positive log-probability": (replaced(0.7), "is 0.7"),
    "a text for a number": (replaced("-1.5"), "is '-1.5'"),
    "a bool": (replaced(True), "is True"),
    "null": (replaced(None), "is None"),
    "an id that is too high": (other_ids(310), "names token 310"),
    "an empty place": (only({}), "lack the token"),
    "a place that is null": (only(None), "has no log-probabilities"),
    "a place of another token": (only({"7": {"logprob": -1.0}}), "lack the token"),
    "probabilities above 1": (lambda a: only({k: {"logprob": -0.1} for k in "3456789"})(a), "lack the token"),
    "no choices": (lambda answer: {"choices": []}, "no prompt_logprobs"),
    "a list": (lambda answer: [1, 2], "no "),
    "a text": (lambda answer: "hello", "no "),
    "half of the JSON": (lambda answer: json.dumps(answer).encode()[:-9], "not JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_cannot_be_used_is_asked_for_again_and_then_an_error(
    folder: Path, model: Any, name: str
) -> None:
    """Never a score: the fault passes after two answers, and then it stays."""
    change, words = MALFORMED[name]
    faulty = 0

    def spoil(path: str, answer: Any) -> Any:
        nonlocal faulty
        faulty -= 1
        return change(answer) if faulty >= 0 else answer

    text = Text([5, 6, 7], [8, 9, 40])
    with ScoringServer(model[0], model[1], ("vllm",), change=spoil) as server, connected(server, folder) as client:
        client.connect()
        good = client.score_later(lambda: [text], 3).result()
        faulty = 2
        again = client.score_later(lambda: [text], 3).result()
        np.testing.assert_array_equal(again.log_probs, good.log_probs)
        faulty = 10**6
        with pytest.raises(TeacherError) as raised:
            client.score_later(lambda: [text], 3).result()
    message = str(raised.value)
    assert "sent 3 answers in a row that cannot be used" in message and "\n" not in message
    assert words in message, message


SGLANG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another token": (lambda meta: meta["input_token_logprobs"][-1].__setitem__(1, 4), "scored the token 4"),
    "a place too few": (lambda meta: meta["input_top_logprobs"].pop(), "input_top_logprobs has 3 places"),
    "an empty place": (lambda meta: meta["input_top_logprobs"].__setitem__(-1, None), "has no log-probabilities"),
    "a list too short": (lambda meta: meta["input_top_logprobs"][-1].pop(), "5 log-probabilities at place 6, where 6"),
    "a total above 1": (lambda meta: [e.__setitem__(0, -0.4) for e in meta["input_top_logprobs"][-1]], "add up to 4"),
}


@pytest.mark.parametrize("name", SGLANG)
def test_an_answer_of_sglang_is_checked_too(folder: Path, model: Any, name: str) -> None:
    edit, words = SGLANG[name]
    spoiled = False

    def spoil(path: str, answer: Any) -> Any:
        if spoiled:
            edit(answer["meta_info"])
        return answer

    with ScoringServer(model[0], model[1], ("sglang",), change=spoil) as server, connected(server, folder) as client:
        client.connect()
        spoiled = True
        with pytest.raises(TeacherError, match="cannot be used") as raised:
            client.score_later(lambda: [Text([5, 6, 7], [8, 9, 40])], 3).result()
    assert words in str(raised.value)


def refuses(status: int, message: str) -> Callable[[str, Any], tuple[int, Any] | None]:
    return lambda path, body: (status, {"error": {"message": message}})


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no log-probabilities": ({"dialects": ()}, {}, "vllm serve MODEL --max-logprobs 6"),
    "none in this dialect": ({"dialects": ("sglang",)}, {"dialect": "vllm"}, "does not return the 6 likeliest"),
    "too few": ({"dialects": ("vllm",), "max_top": 3}, {}, "greater than max allowed: 3"),
    "another key": ({"key": "sk-0123456789"}, {}, "rejected the key"),
    "no quota": ({"fault": refuses(402, "pay")}, {}, "asks for payment"),
    "an unknown model": (
        {"fault": refuses(404, "The model `nobody` does not exist.")},
        {"model": "nobody"},
        "does not know this address or model",
    ),
    "a wrong address": ({"fault": refuses(404, "not found")}, {}, "HTTP 404"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_cannot_be_used_is_an_error_before_the_first_step(folder: Path, model: Any, name: str) -> None:
    how, settings, words = REFUSALS[name]
    how = dict(how)
    dialects = how.pop("dialects", DIALECTS)
    with (
        ScoringServer(model[0], model[1], dialects, **how) as server,
        connected(server, folder, **settings) as client,
        pytest.raises(TeacherError) as raised,
    ):
        client.connect()
    message = str(raised.value)
    assert words in message and server.url in message and "\n" not in message, message
    assert "sk-0123456789" not in message


def test_a_context_that_is_too_long_names_what_to_set(folder: Path, model: Any) -> None:
    def fault(path: str, body: Any) -> tuple[int, Any] | None:
        if isinstance(body["prompt"], list) and len(body["prompt"]) > 45:
            return 400, {"error": {"message": "This model's maximum context length is 45 tokens."}}
        return None

    with ScoringServer(model[0], model[1], ("vllm",), fault=fault) as server, connected(server, folder) as client:
        client.connect()
        with pytest.raises(TeacherError, match=re.escape("--max-model-len 61), or lower data.seq_len")):
            client.score_later(lambda: [Text([5] * 30, [6] * 30)], 30).result()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_another_tokenizer_is_an_error_that_shows_the_first_difference(
    folder: Path, model: Any, dialect: Literal["vllm", "sglang", "echo", "echo_text", "llama_cpp"]
) -> None:
    other = train_tokenizer([text[::-1] for text in TEXTS], vocab_size=300)
    with (
        ScoringServer(model[0], other, (dialect,)) as server,
        connected(server, folder, dialect) as client,
        pytest.raises(TeacherError, match=r"another tokenizer|cannot be used|does not return") as raised,
    ):
        client.connect()
    assert "\n" not in str(raised.value)
    if dialect in ("vllm", "sglang", "llama_cpp"):
        assert re.search(
            r"its token \d+ is \d+ '.*' in the student's, and token \d+ '.*' in the server's", str(raised.value)
        )


def test_the_first_difference_in_words(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    own = vocabulary.encode("one two")
    assert first_difference(vocabulary, own, own) is None
    assert first_difference(vocabulary, own, [vocabulary.text([i]) for i in own]) is None
    assert "more: the student's" in str(first_difference(vocabulary, own, own[:-1]))
    assert "in the server's" in str(first_difference(vocabulary, own, [*own[:-1], 9]))


def test_a_server_that_is_down_is_waited_for_and_the_user_is_told_once(folder: Path, model: Any) -> None:
    with ScoringServer(model[0], model[1], ("vllm",)) as server, connected(server, folder, longest_delay=0.1) as client:
        client.connect()
        text = Text([5, 6, 7], [8, 9, 40])
        good = client.score_later(lambda: [text, text], 3).result()
        server.__exit__()
        waiting = client.score_later(lambda: [text, text], 3)
        while not client.said:  # type: ignore[attr-defined]
            assert not waiting.done()
        with ScoringServer(model[0], model[1], ("vllm",), port=server.port):
            np.testing.assert_array_equal(waiting.result().log_probs, good.log_probs)
    down, up = client.said  # type: ignore[attr-defined]
    assert "does not answer (no connection" in down and "The run waits and tries again" in down
    assert "answers again" in up


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_error_that_may_pass_is_waited_for(folder: Path, model: Any, status: int) -> None:
    left = 4

    def fault(path: str, body: Any) -> tuple[int, Any] | None:
        nonlocal left
        left -= 1
        return (status, {"error": {"message": "later"}}) if left >= 0 else None

    with ScoringServer(model[0], model[1], ("vllm",), fault=fault) as server, connected(server, folder) as client:
        assert client.connect()


def test_another_model_after_an_outage_is_an_error(folder: Path, model: Any) -> None:
    broken = False
    scale = 1.0

    def score(ids: list[int]) -> np.ndarray:
        logits = model[0](ids) * scale
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def fault(path: str, body: Any) -> tuple[int, Any] | None:
        nonlocal broken, scale
        if not broken:
            return None
        broken, scale = False, 3.0
        return 503, {"error": {"message": "restarting"}}

    with ScoringServer(score, model[1], ("vllm",), fault=fault) as server, connected(server, folder) as client:
        client.connect()
        broken = True
        with pytest.raises(TeacherError, match="other log-probabilities of the same text than before it went down"):
            client.score_later(lambda: [Text([5, 6, 7], [8, 9, 40])], 3).result()


def test_drawn_ghosts_are_of_the_list_with_the_rest_as_none() -> None:
    """Frequencies of a list with 0.5, 0.2 and 0.1: 0.2 of the contexts have no ghost. A key repeats the draw."""
    ids = np.broadcast_to(np.array([7, 3, 9], np.int32), (200, 100, 3))
    log_probs = np.broadcast_to(np.log(np.array([0.5, 0.2, 0.1], np.float32)), (200, 100, 3))
    scores = Scores(ids, log_probs)
    ghosts, known = choose_ghosts(scores, jax.random.key(1))
    shares = [((ghosts == token) & (known == 1)).mean() for token in (7, 3, 9)]
    assert shares == pytest.approx([0.5, 0.2, 0.1], abs=0.01) and known.mean() == pytest.approx(0.8, abs=0.01)
    again = choose_ghosts(scores, jax.random.key(1))
    np.testing.assert_array_equal(again[0], ghosts)
    np.testing.assert_array_equal(again[1], known)


def test_a_place_without_scores_has_no_ghost() -> None:
    scores = Scores.of([[[(4, -0.1)], None]], 3, 2)
    for key in (None, jax.random.key(0)):
        _, known = choose_ghosts(scores, key)
        assert known[0, 1:].tolist() == [0, 0]
    assert scores.known.tolist() == [[True, False, False]]
