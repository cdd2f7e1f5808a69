"""Chat completions of OpenAI-compatible servers: the reply in a body or a stream, and how it ended."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cotgrpo.data.answers import split_reply, split_thought

Ending = Literal["whole", "cut off", "refused", "broken off"]

SQUASH = re.compile(r"[^a-z]")
REFUSED = re.compile(
    "filter|safety|refus|sensitive|block|prohibit|recitation|spii|policy|moderat|guardrail|violat|unsafe|censor|harm"
)
BROKEN_OFF = re.compile("error|abort|cancel|timeout|timedout|insufficient|interrupt|disconnect|fail|ratelimit|overload")
CUT_OFF = re.compile("length|limit|max.*tokens?|token.*(?:exceed|budget|exhaust)|context|truncat|incomplete|repetition")
WHOLE = re.compile("stop|eos|end|complet|done|finish|success|tool|function")
"""Parts of finish reasons without case and punctuation, in the order of the search: `maxtokens`, `contentfilter`."""

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thinking_blocks", "reasoning_details")
"""Fields of a message that hold its thought. Servers that fill two of them repeat the text, so the first one counts."""
THOUGHT_PARTS = re.compile("think|reason|thought|summary", re.IGNORECASE)
"""Types of content parts that hold a thought."""
FINISH_FIELDS = ("finish_reason", "finishReason", "stop_reason", "done_reason")
TEXT_FIELDS = ("text", "thinking", "reasoning", "reasoning_text", "content", "parts", "summary", "reasoning_content")
"""Fields of a content part that may hold its text, in order. Signatures and encrypted data are in other fields."""
LINE_END = re.compile(r"\r\n|\n|\r")
"""Not `str.splitlines`, which also splits at U+2028 inside a JSON text."""


@dataclasses.dataclass(frozen=True)
class TeacherReply:
    """A teacher's reply.

    Attributes:
        text: the reply.
        reasoning: the thoughts of a reasoning model, if they come in a field of their own.
        finish_reason: "stop", "length" (cut off at the token limit), "content_filter", or the endpoint's own word.
        refusal: why the model refused, if that comes in a field of its own.
        prompt_tokens, completion_tokens: the teacher's counts; None if it gave none.
        model: the model's name as the endpoint reports it.
        logprobs: the likeliest tokens at each token of the reply, if they were asked for, or None. For each token: its
            piece, and pairs of a piece and its log-probability. A piece is a text, or a list of bytes if it is none.
        attempts: requests sent, failed ones included.
        seconds: from the first attempt to the reply.
    """

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    refusal: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    logprobs: list[Any] | None = None
    attempts: int = 1
    seconds: float = 0.0

    @property
    def whole_text(self) -> str:
        """The reply as one text, with the thought of a field in marks. A thought alone is the reply itself."""
        if self.reasoning and self.text and not split_thought(self.text).marked:  # some servers send it twice
            thought = self.reasoning.replace("<think>", "").replace("</think>", "").strip()
            return f"<think>\n{thought}\n</think>\n\n{self.text}"
        return self.text or self.reasoning


class AttemptFailed(Exception):
    """One attempt brought no reply.

    Args:
        reason, detail: as in `Failure`.
        retryable: whether another attempt may succeed.
        retry_after: the server's Retry-After in seconds.
        status: the HTTP status that the body of a good answer names in an error, or None.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        retryable: bool = True,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.retryable, self.retry_after = reason, detail, retryable, retry_after
        self.status = status


def ending(reply: TeacherReply, max_tokens: int | None = None) -> Ending:
    """Return how a reply ended, by the finish reason of any common server. Case and punctuation are ignored.

    An unknown word is a whole reply. A reply without a known word that is as long as allowed is cut off.

    Args:
        reply: the reply.
        max_tokens: the longest reply that was allowed; None: not known.

    Example:
        >>> [ending(TeacherReply("", finish_reason=word)) for word in ("MAX_TOKENS", "SAFETY", "abort", "eos")]
        ['cut off', 'refused', 'broken off', 'whole']
        >>> ending(TeacherReply("5 +", completion_tokens=8), max_tokens=8)
        'cut off'
    """
    word = SQUASH.sub("", reply.finish_reason.casefold()).removeprefix("finishreason")
    known: tuple[tuple[re.Pattern[str], Ending], ...] = (
        (REFUSED, "refused"),
        (BROKEN_OFF, "broken off"),
        (CUT_OFF, "cut off"),
        (WHOLE, "whole"),
    )
    for pattern, end in known:
        if pattern.search(word):
            return end
    is_full = max_tokens is not None and reply.completion_tokens is not None and reply.completion_tokens >= max_tokens
    return "cut off" if is_full else "whole"


def parse_reply(body: bytes, max_tokens: int | None = None) -> TeacherReply:
    """Return the reply in the body of a chat completion, which may be a stream of events.

    Args:
        body: what the server sent.
        max_tokens: the longest reply that was allowed; None: not known.

    Raises:
        AttemptFailed: the body holds no reply, or one that the server broke off.
    """
    text = body.decode("utf-8-sig", "replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        events = stream_events(text)
        if not events:
            raise AttemptFailed("reply is not JSON", repr(body)) from None
        answer = join_events(events)
    return parse_completion(answer, max_tokens)


def parse_completion(answer: object, max_tokens: int | None = None) -> TeacherReply:
    """Return the reply in a chat completion that was read from JSON. Arguments and errors as in `parse_reply`."""
    answer = answer if isinstance(answer, dict) else {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = next((choice[name] for name in ("message", "delta") if isinstance(choice.get(name), dict)), None)
    if message is None and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}
    if message is None or answer.get("error"):
        raise AttemptFailed("reply has no choice", json.dumps(answer, ensure_ascii=False), status=error_status(answer))
    text, thought, refusal = split_content(message.get("content"))
    usage = next((u for u in (answer.get("usage"), choice.get("usage")) if isinstance(u, dict)), {})
    reply = TeacherReply(
        text=clean(text),
        reasoning=next((clean(found) for name in THOUGHT_FIELDS if (found := deep_text(message.get(name)))), "")
        or clean(thought),
        finish_reason=clean(finish_word(choice)),
        refusal=clean(deep_text(message.get("refusal")) or refusal),
        prompt_tokens=count_in(usage.get("prompt_tokens", usage.get("input_tokens"))),
        completion_tokens=count_in(usage.get("completion_tokens", usage.get("output_tokens"))),
        model=clean(deep_text(answer.get("model"))),
        logprobs=token_log_probs(choice.get("logprobs")),
    )
    end = ending(reply, max_tokens)
    if end == "broken off":
        raise AttemptFailed(f"reply broke off ({reply.finish_reason})", json.dumps(choice, ensure_ascii=False))
    # A server that takes a whole reply for a thought puts all of it there.
    has_text = reply.text or reply.refusal or split_reply(reply.reasoning)[1] is not None
    if not has_text and end == "whole":
        raise AttemptFailed("reply is empty", json.dumps(choice, ensure_ascii=False))
    return reply


def token_log_probs(logprobs: object) -> list[Any] | None:
    """Return the `logprobs` of a chat completion as `TeacherReply.logprobs`, or None if they are not usable."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        return None
    try:
        return [
            [piece_of(entry), [[piece_of(other), log_prob_in(other)] for other in entry["top_logprobs"]]]
            for entry in content
        ]
    except (KeyError, TypeError, ValueError):
        return None


def piece_of(entry: Mapping[str, Any]) -> str | list[int]:
    """Return a token's text, or its bytes if they are no text. Raises TypeError or ValueError without either."""
    raw = entry.get("bytes")
    if raw is not None:
        return as_piece(bytes(raw))
    if not isinstance(entry["token"], str):
        raise TypeError("a token that is no text")
    return entry["token"]


def as_piece(raw: bytes) -> str | list[int]:
    """Return bytes as a piece of `TeacherReply.logprobs`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def log_prob_in(entry: Mapping[str, Any]) -> float:
    """Return a token's log-probability. Raises ValueError for NaN and for a positive one."""
    value = float(entry["logprob"])
    if not value <= 0.01:
        raise ValueError(f"a log-probability of {value}")
    return round(min(value, 0.0), 6)


def stream_events(text: str) -> list[object]:
    """Return the events of a stream of server-sent events, the last one `[DONE]` as a text; empty for other texts.

    Raises:
        AttemptFailed: the stream ends inside an event.
    """
    events: list[object] = []
    for line in LINE_END.split(text):
        if not line.startswith("data:"):  # comments that keep the connection open, names of events, blank lines
            continue
        data = line.removeprefix("data:").strip()
        try:
            events.append(data if data == "[DONE]" else json.loads(data))
        except (ValueError, RecursionError):
            raise AttemptFailed("stream broke off", f"not JSON: {data!r}") from None
    return events


def join_events(events: Sequence[object]) -> dict[str, Any]:
    """Return the chat completion that the events of a stream make together.

    Raises:
        AttemptFailed: an event is an error, or the stream ended before the reply.
    """
    whole: dict[str, Any] = {}
    pieces: dict[str, list[object]] = {}
    choice: dict[str, Any] = {}
    logprobs: list[Any] = []
    for event in events:
        if not isinstance(event, dict):
            continue
        if event.get("error") or ("choices" not in event and error_status(event)):
            raise AttemptFailed(
                "error in the stream", json.dumps(event, ensure_ascii=False), status=error_status(event)
            )
        whole |= {name: event[name] for name in ("model", "usage") if event.get(name)}
        choices = event.get("choices")
        for part in choices if isinstance(choices, list) else ():
            if not isinstance(part, dict) or part.get("index"):  # a second reply, which was not asked for
                continue
            holders: list[dict[str, object]] = [part[n] for n in ("delta", "message") if isinstance(part.get(n), dict)]
            delta = holders[0] if holders else {}
            for name, value in (delta | {"content": delta.get("content") or part.get("text")}).items():
                pieces.setdefault(name, []).extend(value if isinstance(value, list) else [value])
            choice |= {name: part[name] for name in (*FINISH_FIELDS, "usage") if part.get(name)}
            own = part.get("logprobs")
            logprobs += own["content"] if isinstance(own, dict) and isinstance(own.get("content"), list) else []
    if not finish_word(choice) and "[DONE]" not in events:
        raise AttemptFailed("stream broke off", f"{len(events)} events, and no end")
    return whole | {"choices": [choice | {"message": pieces, "logprobs": {"content": logprobs}}]}


def finish_word(choice: Mapping[str, Any]) -> str:
    """Return the finish reason of a choice, or "" without one."""
    for name in FINISH_FIELDS:
        value = choice.get(name)
        value = value.get("type") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            return value
    return ""


def split_content(content: object) -> tuple[str, str, str]:
    """Return text, thought and refusal in the content of a message: a text, a part, or a list of parts."""
    parts = content if isinstance(content, list) else [content]
    found: dict[str, list[str]] = {"text": [], "thought": [], "refusal": []}
    for part in parts:
        kind = "text"
        if isinstance(part, dict):
            name = part.get("type")
            is_thought = part.get("thought") is True or (isinstance(name, str) and THOUGHT_PARTS.search(name))
            kind = "thought" if is_thought else "refusal" if name == "refusal" else "text"
            part = part.get("refusal") if kind == "refusal" else part
        found[kind].append(deep_text(part))
    return "".join(found["text"]), "".join(found["thought"]), "".join(found["refusal"])


def deep_text(value: object) -> str:
    """Return the text in a JSON value: a text, the joined texts of a list, or the first text field of an object."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(deep_text, value))
    if isinstance(value, dict):
        return next((text for name in TEXT_FIELDS if (text := deep_text(value.get(name)))), "")
    return ""


def clean(text: str) -> str:
    """Strip a text. The halves of a surrogate pair, which a stream may part, are joined; half a pair becomes `?`."""
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return joined.encode("utf-8", "replace").decode("utf-8").strip()


def count_in(value: object) -> int | None:
    """Return a number of tokens, or None for any other JSON value."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def error_status(answer: Mapping[str, Any]) -> int | None:
    """Return the HTTP status that an error object names, as some gateways send it in a good answer."""
    error = answer.get("error")
    fields = [error, answer] if isinstance(error, dict) else [answer]
    for holder in fields:
        for name in ("code", "status", "status_code", "statusCode", "http_status"):
            value = holder.get(name)
            if isinstance(value, str) and value.isdecimal() and value.isascii():
                value = int(value)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None
