"""What each kind of server is sent, and where the log-probabilities stand in its answer.

The tokens of a context and of a reply go out. For each token of the reply the likeliest tokens at its place come back,
as the server's model sees them after everything before that place. An answer is checked as it is read. One that cannot
be used raises `Malformed`, and is never trained on.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from cotgrpo.teacher_servers.vocabulary import Token, Vocabulary

DialectName = Literal["vllm", "sglang", "echo", "echo_text", "llama_cpp"]

Top = list[tuple[int, float]]
"""The likeliest tokens at one place with their log-probabilities, the likeliest first, and of equals the lowest id."""

HIGHEST_LOG_PROB = 1e-2
"""Servers round, so the log-probability of a certain token, or of all tokens together, may be a little above 0."""
LOWEST_LOG_PROB = -9998.0
"""Servers write minus infinity as -9999: such a token is impossible, and is left out."""


class Malformed(Exception):
    """An answer that holds no usable log-probabilities. The message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: `POST` of a JSON body to an address."""

    url: str
    body: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialect(abc.ABC):
    """How one kind of server is asked.

    Attributes:
        base_url: the address in the settings, such as http://localhost:8000/v1.
        model: the model's name at the server, or None.
        vocabulary: the student's.
    """

    base_url: str
    model: str | None
    vocabulary: Vocabulary

    name: ClassVar[DialectName]
    fix: ClassVar[str]
    """What to set on the server, with {top_k} in it."""

    @property
    def root(self) -> str:
        """The address without /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def completions(self) -> str:
        """The address of OpenAI's completions."""
        base = self.base_url.rstrip("/")
        return f"{base if '/' in base.partition('://')[2] else f'{base}/v1'}/completions"

    def named(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a body with the name of the model, if there is one."""
        return body if self.model is None else {"model": self.model} | body

    @abc.abstractmethod
    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        """Return the requests for the `top_k` likeliest tokens at the places `start` and later of a text of tokens."""

    @abc.abstractmethod
    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        """Return the likeliest tokens at each place from `start` on. None: the server has no boundary of tokens there.

        Raises:
            Malformed: an answer that cannot be used.
        """

    @abc.abstractmethod
    def token_call(self, text: str) -> Call:
        """Return the request that shows how the server cuts a text into tokens."""

    @abc.abstractmethod
    def read_tokens(self, answer: object) -> list[Token | None]:
        """Return the server's tokens of that text. None: not known, as of the first token. Raises Malformed."""

    def top(self, entries: Sequence[tuple[object, object]], place: int, top_k: int, least: int = 0) -> Top:
        """Return checked entries of (token, log-probability), the likeliest first.

        Args:
            entries: as the server gives them.
            place: in the text, for messages.
            top_k: how many are kept.
            least: how many must be there.
        """
        found: dict[int, float] = {}
        for token, value in entries:
            log_prob = log_prob_of(value, place)
            number = self.vocabulary.id_of(token_of(token, place))
            if number is None or log_prob < LOWEST_LOG_PROB:
                continue
            if not 0 <= number < self.vocabulary.size:
                raise Malformed(
                    f"it names token {number} at place {place + 1}, and the student's tokenizer has "
                    f"{self.vocabulary.size} tokens"
                )
            found[number] = max(log_prob, found.get(number, -math.inf))
        top = sorted(((i, min(p, 0.0)) for i, p in found.items()), key=lambda pair: (-pair[1], pair[0]))[:top_k]
        if (total := sum(math.exp(p) for _, p in top)) > math.exp(HIGHEST_LOG_PROB):
            raise Malformed(f"the probabilities at place {place + 1} add up to {total:.3f}")
        if len(entries) < least:
            raise Malformed(
                f"it has {len(entries)} log-probabilities at place {place + 1}, where {least} were asked for"
            )
        return top


def log_prob_of(value: object, place: int) -> float:
    """Return a log-probability. Raises Malformed for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > HIGHEST_LOG_PROB:
        raise Malformed(f"the log-probability at place {place + 1} is {value!r:.40}")
    return float(value)


def token_of(value: object, place: int) -> Token:
    """Return a token. Raises Malformed for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Malformed(f"the token at place {place + 1} is {value!r:.40}")
    return value


def field(value: object, *names: str | int) -> Any:
    """Return the value at a path of names and places in JSON. Raises Malformed if it is not there."""
    path = ""
    for name in names:
        path += f"[{name}]" if isinstance(name, int) else f".{name}"
        if isinstance(name, int):
            value = value[name] if isinstance(value, list) and name < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            raise Malformed(f"it has no {path.lstrip('.')}")
    return value


def rows_of(value: object, name: str, count: int) -> list[Any]:
    """Return a list of one entry for each place. Raises Malformed unless it has `count` of them."""
    if not isinstance(value, list) or len(value) != count:
        size = len(value) if isinstance(value, list) else "no list"
        raise Malformed(f"{name} has {size} places, and the text has {count} tokens")
    return value


@dataclasses.dataclass(frozen=True)
class Vllm(Dialect):
    """vLLM: completions with `prompt_logprobs`."""

    name = "vllm"
    fix = "vLLM gives them with `vllm serve MODEL --max-logprobs {top_k}`"

    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        return [Call(self.completions, self.named(body))]

    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        places = rows_of(self.prompt_log_probs(answers[0]), "prompt_logprobs", len(ids))
        found: list[Top | None] = []
        for place in range(start, len(ids)):
            entries = self.entries(places[place], place)
            if all(token != ids[place] for token, _ in entries):  # vLLM always gives the text's own token too
                raise Malformed(f"its prompt_logprobs at place {place + 1} lack the token {ids[place]} of the text")
            found.append(self.top(entries, place, top_k, least=min(top_k, self.vocabulary.size)))
        return found

    def prompt_log_probs(self, answer: object) -> object:
        """Return `prompt_logprobs`, which some versions write next to the choices."""
        try:
            return field(answer, "choices", 0, "prompt_logprobs")
        except Malformed:
            return field(answer, "prompt_logprobs")

    def entries(self, place: object, number: int) -> list[tuple[int, object]]:
        """Return the (id, log-probability) pairs of one place."""
        if not isinstance(place, Mapping) or not all(str(token).isdecimal() for token in place):
            raise Malformed(f"place {number + 1} has no log-probabilities")
        value = lambda entry: entry.get("logprob") if isinstance(entry, Mapping) else entry
        return [(int(token), value(entry)) for token, entry in place.items()]

    def token_call(self, text: str) -> Call:
        body = {"prompt": text, "add_special_tokens": False, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return Call(self.completions, self.named(body))

    def read_tokens(self, answer: object) -> list[Token | None]:
        places = self.prompt_log_probs(answer)
        if not isinstance(places, list):
            raise Malformed("its prompt_logprobs are no list")
        return [None, *(self.entries(place, number)[0][0] for number, place in enumerate(places[1:], 1))]


@dataclasses.dataclass(frozen=True)
class Sglang(Dialect):
    """SGLang: `/generate` with `return_logprob`."""

    name = "sglang"
    fix = "SGLang gives them at /generate: `python -m sglang.launch_server --model-path MODEL`"

    def body(self, prompt: dict[str, Any], start: int, top_k: int) -> dict[str, Any]:
        """Return the body of a request."""
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        scores = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": top_k}
        return prompt | {"sampling_params": sampling} | scores

    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        # The first place of the answer is empty, since nothing before it was scored.
        return [Call(f"{self.root}/generate", self.body({"input_ids": ids}, start - 1, top_k))]

    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        count = len(ids) - start + 1
        tokens = rows_of(field(answers[0], "meta_info", "input_token_logprobs"), "input_token_logprobs", count)
        places = rows_of(field(answers[0], "meta_info", "input_top_logprobs"), "input_top_logprobs", count)
        found: list[Top | None] = []
        for place, token, entries in zip(range(start, len(ids)), tokens[1:], places[1:], strict=True):
            if field(token, 1) != ids[place]:
                raise Malformed(f"it scored the token {token[1]!r:.20} at place {place + 1}, not {ids[place]}")
            if not isinstance(entries, list) or not all(isinstance(e, list) and len(e) >= 2 for e in entries):
                raise Malformed(f"place {place + 1} has no log-probabilities")
            pairs = [(entry[1], entry[0]) for entry in entries]
            found.append(self.top(pairs, place, top_k, least=min(top_k, self.vocabulary.size)))
        return found

    def token_call(self, text: str) -> Call:
        return Call(f"{self.root}/generate", self.body({"text": text}, 0, 1))

    def read_tokens(self, answer: object) -> list[Token | None]:
        tokens = field(answer, "meta_info", "input_token_logprobs")
        return [token_of(field(token, 1), place) for place, token in enumerate(tokens)]


@dataclasses.dataclass(frozen=True)
class Echo(Dialect):
    """Completions with `echo` and `logprobs`, which take token ids and name tokens by their texts."""

    name: ClassVar[DialectName] = "echo"
    fix = "other servers give them for completions with echo and logprobs (llama-cpp-python: --logits_all true)"

    def body(self, prompt: object, top_k: int) -> dict[str, Any]:
        """Return the body of a request."""
        return self.named({"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": top_k})

    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        return [Call(self.completions, self.body(ids, top_k))]

    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        tokens, places = self.places(answers[0])
        if len(tokens) not in (len(ids), len(ids) + 1):  # with the one token that it wrote
            raise Malformed(f"logprobs has {len(tokens)} places, and the text has {len(ids)} tokens")
        return [self.place(places[place], place, top_k) for place in range(start, len(ids))]

    def places(self, answer: object) -> tuple[list[str], list[object]]:
        """Return the texts of all tokens, and the entries of each place."""
        logprobs = field(answer, "choices", 0, "logprobs")
        tokens = field(logprobs, "tokens")
        return tokens, rows_of(field(logprobs, "top_logprobs"), "top_logprobs", len(tokens))

    def place(self, entries: object, place: int, top_k: int) -> Top | None:
        """Return the likeliest tokens of one place. Texts that are no token of the student are left out."""
        if not isinstance(entries, Mapping) or not entries:
            raise Malformed(f"place {place + 1} has no log-probabilities")
        unknown = [text for text in entries if self.vocabulary.id_of(str(text)) is None]
        if unknown and len(entries) < min(top_k, self.vocabulary.size):
            return None  # several tokens with one text, such as parts of a character: only one of them is given
        top = self.top(list(entries.items()), place, top_k)
        likeliest = max(log_prob_of(value, place) for value in entries.values())
        return top if top and top[0][1] >= min(likeliest, 0.0) else None  # without its first, the list is of no use

    def token_call(self, text: str) -> Call:
        return Call(self.completions, self.body(text, 1))

    def read_tokens(self, answer: object) -> list[Token | None]:
        tokens, _ = self.places(answer)
        return [token_of(token, place) for place, token in enumerate(tokens[:-1])]


@dataclasses.dataclass(frozen=True)
class EchoText(Echo):
    """Completions with `echo` and `logprobs` that take text only.

    A student may write a text in other tokens than the tokenizer would. Where the server has no boundary, there is no
    ghost.
    """

    name = "echo_text"

    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        return [Call(self.completions, self.body(self.vocabulary.text(ids), top_k))]

    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        tokens, places = self.places(answers[0])
        text = self.vocabulary.text(ids).encode()
        there, end = {0: 0}, 0  # place of the token that begins after so many bytes
        for number, token in enumerate(tokens):
            piece = str(token).encode("utf-8", "replace")
            if text[end : end + len(piece)] != piece:
                if "\ufffd" in str(token):  # a part of a character: no boundary until the text is found again
                    break
                if number < len(tokens) - 1 and end < len(text):
                    raise Malformed(f"it reads {token!r:.30} at place {number + 1}, which the text does not hold there")
                break
            end += len(piece)
            there[end] = number + 1
        found: list[Top | None] = []
        pieces = self.vocabulary.pieces(ids)
        offset = sum(map(len, pieces[:start]))
        for place in range(start, len(ids)):
            number = there.get(offset, len(places))
            found.append(self.place(places[number], place, top_k) if number < len(places) else None)
            offset += len(pieces[place])
        return found


@dataclasses.dataclass(frozen=True)
class LlamaCpp(Dialect):
    """llama.cpp's server, which gives the log-probabilities of the next token alone: one request for each place.

    It keeps what it has read of a text, so a request costs it one token.
    """

    name = "llama_cpp"
    fix = "llama.cpp gives them at /completion with n_probs: `llama-server -m MODEL.gguf`"

    def score_calls(self, ids: list[int], start: int, top_k: int) -> list[Call]:
        options = {"n_predict": 1, "n_probs": top_k, "temperature": 0.0, "cache_prompt": True}
        url = f"{self.root}/completion"
        return [Call(url, {"prompt": ids[:place]} | options) for place in range(start, len(ids))]

    def read_scores(self, answers: Sequence[object], ids: list[int], start: int, top_k: int) -> list[Top | None]:
        found: list[Top | None] = []
        for place, answer in enumerate(answers, start):
            entries = field(answer, "completion_probabilities", 0, "top_logprobs")
            pairs = [(field(entry, "id"), field(entry, "logprob")) for entry in entries]
            found.append(self.top(pairs, place, top_k, least=min(top_k, self.vocabulary.size)))
        return found

    def token_call(self, text: str) -> Call:
        return Call(f"{self.root}/tokenize", {"content": text, "add_special": False, "parse_special": True})

    def read_tokens(self, answer: object) -> list[Token | None]:
        return [token_of(token, place) for place, token in enumerate(field(answer, "tokens"))]


DIALECTS: tuple[type[Dialect], ...] = (Vllm, Sglang, Echo, EchoText, LlamaCpp)
"""In the order in which they are tried: ids before texts, one request a reply before many."""
