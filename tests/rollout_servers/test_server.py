"""An engine on a server, in each dialect: it writes what the sampler of this process writes, or it is one line."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.rollout_server import COLUMNS, DIALECTS, RolloutServer, log_probs_by

from cotgrpo.data.tokenizer import load_tokenizer, train_tokenizer
from cotgrpo.models import load_pretrained, save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params
from cotgrpo.rollout_servers.dialects import ServedReply
from cotgrpo.rollout_servers.server import RolloutServer as Client
from cotgrpo.rollout_servers.server import Version
from cotgrpo.rollout_servers.settings import RolloutServerSettings
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teacher_servers.server import Text
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.teachers.procedural import ProceduralTeacher
from cotgrpo.teachers.server_errors import TeacherError

pytest.importorskip("openai")

ROWS = ProceduralTeacher(seed=3).draw(30)
TEXTS = [f"{row.question}\n{row.rationale}" for row in ROWS]
SHAPE = DecoderConfig(
    vocab_size=300, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.3
)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models with one tokenizer."""
    folder = tmp_path_factory.mktemp("engine")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    shape = dataclasses.replace(SHAPE, vocab_size=len(tokenizer))
    first, second = (
        save_pretrained(folder / str(i), shape, init_params(shape, jax.random.key(i)), tokenizer=tokenizer)
        for i in (1, 2)
    )
    return first, second


@pytest.fixture(scope="module")
def running(folders: tuple[Path, Path]) -> Iterator[RolloutServer]:
    with RolloutServer(folders[0]) as server:
        yield server


@pytest.fixture
def server(running: RolloutServer) -> RolloutServer:
    """One server for all tests, as it was started: its programs are compiled once."""
    running.restart()
    running.dialects, running.loaded, running.asked = DIALECTS, [], []
    running.fault, running.change = (lambda path, body: None), (lambda path, answer: answer)
    return running


@contextmanager
def connected(
    url: str, folder: Path, temperature: float = 0.0, eos_ids: tuple[int, ...] = (), **more: Any
) -> Iterator[Client]:
    """A client that has not connected yet. `said` is what it has printed."""
    tokenizer = load_tokenizer(folder)
    values: dict[str, Any] = {"retry_delay": 0.01, "longest_delay": 0.05, "retries": 2, "timeout": 20.0} | more
    settings = RolloutServerSettings(base_url=url, **values)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    samples = [Text(ids[:1], ids[1:40]) for ids in map(vocabulary.encode, TEXTS[:2])]
    said: list[str] = []
    sampling = SamplingSettings(NEW_TOKENS, eos_ids, temperature=temperature)
    client = Client(settings, vocabulary, sampling, samples, said.append)
    client.said = said  # type: ignore[attr-defined]
    try:
        yield client
    finally:
        client.close()


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(text, add_special_tokens=False)[: 9 + i] for i, text in enumerate(TEXTS[:3])]


def written(client: Client, prompts: list[list[int]]) -> list[ServedReply]:
    return client.write_later(prompts, range(len(prompts))).result()


def own_replies(folder: Path, prompts: list[list[int]], eos_ids: tuple[int, ...] = ()) -> list[list[int]]:
    """Greedy replies of a model in this process."""
    model, size = load_pretrained(folder, "float32"), len(load_tokenizer(folder))
    sample = jax.jit(make_sampler(model.config, SamplingSettings(NEW_TOKENS, eos_ids), size))
    rows = pad_prompts([np.array(prompt, np.int32) for prompt in prompts], length=COLUMNS)
    replies = sample(model.params, rows, jax.random.key(0))
    return [row[:n].tolist() for row, n in zip(np.asarray(replies.tokens), np.asarray(replies.lengths), strict=True)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_after_a_refresh_the_replies_are_those_of_the_new_weights(
    server: RolloutServer, folders: tuple[Path, Path], dialect: str
) -> None:
    """Greedy replies are those of the sampler in this process, token for token, and log-probabilities to 1e-3. A stop
    token is part of its reply.
    """
    first, second = folders
    prompts, model, size = prompts_of(first), load_pretrained(second, "float32"), len(load_tokenizer(first))
    eos_ids = (own_replies(second, prompts)[0][4],)
    server.dialects = (dialect,)
    with connected(server.url, first, eos_ids=eos_ids) as client:
        client.connect()
        assert client.dialect is not None and client.dialect.name == dialect
        assert [reply.ids for reply in written(client, prompts)] == own_replies(first, prompts, eos_ids)
        client.load_later(Version(second, 7, False)).result()
        replies = written(client, prompts)
        probed = client.probe_later().result()
    assert server.loaded == [str(second)]
    assert [reply.ids for reply in replies] == own_replies(second, prompts, eos_ids)
    assert own_replies(first, prompts, eos_ids) != own_replies(second, prompts, eos_ids)
    assert replies[0].ids[-1] == eos_ids[0] and len(replies[0].ids) == 5
    for prompt, reply in zip(prompts, replies, strict=True):
        np.testing.assert_allclose(reply.log_probs, log_probs_by(model, size, prompt, reply.ids), atol=1e-3)
    assert probed is not None
    for sample, row in zip(client.samples, probed, strict=True):
        np.testing.assert_allclose(row, log_probs_by(model, size, sample.context, sample.scored), atol=1e-3)


def test_every_field_of_sampling_is_sent(server: RolloutServer, folders: tuple[Path, Path]) -> None:
    """A server's own defaults, from the model's generation_config.json, never count. A seed draws the same again."""
    prompts = prompts_of(folders[0])
    with connected(server.url, folders[0], temperature=0.7, send_seed=True) as client:
        client.connect()
        assert written(client, prompts) == written(client, prompts)
    bodies = [body for path, body in server.asked if path == "/v1/completions"][-3:]
    body = bodies[0]
    sampling = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "ignore_eos")}
    expected = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": NEW_TOKENS}
    assert sampling == expected | {"ignore_eos": True} and {body["seed"] for body in bodies} == {0, 1, 2}


def first_choice(change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """Change the first choice of each completion."""

    def changed(path: str, answer: Any) -> Any:
        if path == "/v1/completions" and "token_ids" in answer["choices"][0]:
            change(answer["choices"][0])
        return answer

    return changed


def meta(change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """Change what SGLang says of a reply."""

    def changed(path: str, answer: Any) -> Any:
        if path == "/generate" and "output_ids" in answer:
            change(answer)
        return answer

    return changed


BAD_ANSWERS = [
    ("vllm", first_choice(lambda c: c.pop("token_ids")), "does not return the token ids of its replies"),
    ("vllm", first_choice(lambda c: c.update(token_ids=None)), "vLLM 0.10.2 or newer gives them for return_token_ids"),
    ("vllm", first_choice(lambda c: c.pop("logprobs")), "it has no choices[0].logprobs"),
    ("vllm", first_choice(lambda c: c["token_ids"].pop()), "the list of log-probabilities has 12 places"),
    ("vllm", first_choice(lambda c: c.update(token_ids=[], logprobs={"token_logprobs": []})), "the reply has 0 tokens"),
    ("vllm", first_choice(lambda c: c["token_ids"].__setitem__(3, 999)), "it drew token 999"),
    ("vllm", first_choice(lambda c: c["token_ids"].__setitem__(3, "x")), "token 4 of the reply is 'x', not an id"),
    ("vllm", first_choice(lambda c: c["token_ids"].__setitem__(3, True)), "token 4 of the reply is True, not an id"),
    ("vllm", first_choice(lambda c: c["token_ids"].__setitem__(3, 5)), "the reply goes on after the stop token 5"),
    (
        "vllm",
        first_choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(2, None)),
        "log-probability at place 3",
    ),
    (
        "vllm",
        first_choice(lambda c: c.update(token_ids=c["token_ids"][:4], logprobs={"token_logprobs": [-1.0] * 4})),
        "which is not one of the stop tokens [5]",
    ),
    ("vllm", first_choice(lambda c: c["prompt_token_ids"].append(1)), "that are not the 9 it was sent"),
    ("sglang", meta(lambda a: a["meta_info"].pop("output_token_logprobs")), "SGLang gives them at /generate"),
    ("sglang", meta(lambda a: a["output_ids"].__setitem__(0, 0)), "its output_ids are other tokens"),
    ("sglang", meta(lambda a: a["meta_info"].update(output_token_logprobs=[1, 2])), "is no list of log-probabilities"),
    ("sglang", meta(lambda a: a["meta_info"].update(weight_version="3")), "it comes from version '3' of the weights"),
]


@pytest.mark.parametrize(("dialect", "change", "message"), BAD_ANSWERS, ids=lambda value: str(value)[:30])
def test_an_answer_that_no_sampler_would_give_is_never_used(
    server: RolloutServer, folders: tuple[Path, Path], dialect: str, change: Callable[[str, Any], Any], message: str
) -> None:
    server.dialects = (dialect,)
    with connected(server.url, folders[0], eos_ids=(5,)) as client, pytest.raises(TeacherError) as error:
        server.change = change if message.startswith(("does not", "vLLM", "it has no", "SGLang")) else server.change
        client.connect()
        client.load_later(Version(folders[0], 4, False)).result()
        server.change = change
        written(client, prompts_of(folders[0])[:1])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"The rollout server at {server.url}")


FAILED_LOADS = [
    ("vllm", "/collective_rpc", (404, {"detail": "Not Found"}), "Start vLLM with VLLM_SERVER_DEV_MODE=1"),
    ("vllm", "/collective_rpc", (500, {"error": {"message": "unexpected weights_path"}}), "unexpected weights_path"),
    ("vllm", "/reset_prefix_cache", (200, {"success": False}), "success is false"),
    ("vllm", "/collective_rpc", (401, {"error": {"message": "no"}}), "rejected the key"),
    ("sglang", "/update_weights_from_disk", (400, {"success": False, "message": "shape mismatch"}), "shape mismatch"),
    ("sglang", "/update_weights_from_disk", (200, {"success": False, "message": "no such file"}), "no such file"),
    ("sglang", "/update_weights_from_disk", (200, b'{"success": tr'), "it is not JSON"),
]


@pytest.mark.parametrize(("dialect", "path", "answer", "message"), FAILED_LOADS, ids=lambda value: str(value)[:30])
def test_weights_that_are_not_loaded_are_one_line(
    server: RolloutServer, folders: tuple[Path, Path], dialect: str, path: str, answer: tuple[int, Any], message: str
) -> None:
    server.dialects, server.fault = (dialect,), lambda asked, body: answer if asked == path else None
    with connected(server.url, folders[0]) as client:
        client.connect()
        with pytest.raises(TeacherError) as error:
            client.load_later(Version(folders[1], 1, False)).result()
        assert client.loaded is None
    assert message in str(error.value) and "\n" not in str(error.value)
    if "key" not in message:
        assert f"did not load the weights in {folders[1]}, so no reply of it is trained on" in str(error.value)


def test_another_tokenizer_and_a_refused_request_are_one_line(
    server: RolloutServer, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "This model's maximum context length is 16 tokens"
    fault = lambda path, body: (400, {"error": {"message": words}}) if "return_token_ids" in body else None
    with connected(server.url, folders[0]) as client:
        client.connect()
        server.fault = fault
        with pytest.raises(TeacherError, match=r"vLLM: --max-model-len 21.*grpo.ghosts.max_new_tokens"):
            written(client, prompts_of(folders[0])[:1])
        server.fault = lambda path, body: None
        monkeypatch.setattr(server, "tokenizer", train_tokenizer(["nothing of the kind"] * 3, vocab_size=262))
        with pytest.raises(TeacherError, match=r"another tokenizer than the student: in '.*Serve the student itself"):
            client.connect()


def test_a_server_that_was_away_gets_its_weights_again(
    server: RolloutServer, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started anew in the middle of a rollout, with the first weights: no reply of them is returned."""
    monkeypatch.setattr("cotgrpo.rollout_servers.server.SAID_AFTER", 0.05)
    monkeypatch.setattr("cotgrpo.teacher_servers.patient_server.SAID_AFTER", 0.05)
    prompts, count = prompts_of(folders[0]), 0

    def fault(path: str, body: Any) -> None:
        nonlocal count
        count += path == "/v1/completions" and "return_token_ids" in body
        if count == 2:
            server.closed = True  # it answers nothing any more
            count += 1

    with connected(server.url, folders[0], concurrency=1) as client:
        client.connect()
        client.load_later(Version(folders[1], 1, False)).result()
        server.fault = fault
        waiting = client.write_later(prompts, range(3))
        while not (client.said or waiting.done()):  # type: ignore[attr-defined]
            time.sleep(0.01)
        server.restart()
        server.closed = False
        assert [reply.ids for reply in waiting.result()] == own_replies(folders[1], prompts)
        assert server.loaded == [str(folders[1])] * 2
        said = client.said  # type: ignore[attr-defined]
    assert "does not answer" in said[0] and "answers again" in said[1] and len(said) == 2


def test_a_busy_server_and_one_that_cuts_its_answers_are_asked_again(
    server: RolloutServer, folders: tuple[Path, Path]
) -> None:
    faults = [(503, {"error": {"message": "loading"}}), (500, {"error": {"message": "once"}}), (200, b'{"choices": [{')]

    def fault(path: str, body: Any) -> tuple[int, Any] | None:
        return faults.pop() if faults and "return_token_ids" in body else None

    prompts = prompts_of(folders[0])
    with connected(server.url, folders[0]) as client:
        client.connect()
        server.fault = fault
        assert [reply.ids for reply in written(client, prompts)] == own_replies(folders[0], prompts)
        assert not faults and json.dumps(client.said) == "[]"  # type: ignore[attr-defined]


def test_a_server_that_times_out_is_waited_for_and_named_once(
    server: RolloutServer, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotgrpo.teacher_servers.patient_server.SAID_AFTER", 0.05)
    slow, prompts = 2, prompts_of(folders[0])

    def fault(path: str, body: Any) -> None:
        nonlocal slow
        slow -= 1
        if slow >= 0:
            time.sleep(1.5)

    with connected(server.url, folders[0], concurrency=1) as client:
        client.connect()
        expected = written(client, prompts)  # its programs are compiled
        server.fault = fault
        monkeypatch.setattr(client, "settings", dataclasses.replace(client.settings, timeout=1.0))
        assert written(client, prompts) == expected
        said = client.said  # type: ignore[attr-defined]
    assert "does not answer (timeout: no answer in 1 s)" in said[0] and "answers again" in said[1]
    assert server.loaded == []


def test_a_model_that_the_server_does_not_have_is_one_line(server: RolloutServer, folders: tuple[Path, Path]) -> None:
    words = "The model `tutor` does not exist."
    server.fault = lambda path, body: (404, {"error": {"message": words}}) if body.get("model") == "tutor" else None
    with connected(server.url, folders[0], model="tutor") as client, pytest.raises(TeacherError) as error:
        client.connect()
    assert "does not know this address or model (HTTP 404; model 'tutor'). Check grpo.rollouts.base_url" in str(
        error.value
    )
