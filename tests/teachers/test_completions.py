"""Bodies and streams of servers of many kinds: the reply in them, and how it ended."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cotgrpo.teachers.completions import AttemptFailed, TeacherReply, ending, parse_reply


def body(message: object, finish_reason: str | None = "stop", **more: object) -> bytes:
    """A chat completion."""
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}], **more}).encode()


def stream(*events: object, end: bytes = b"data: [DONE]\n\n") -> bytes:
    """A stream of server-sent events."""
    lines = [b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in events]
    return b": keep open\n\n" + b"".join(lines) + end


def piece(finish_reason: str | None = None, **delta: object) -> dict[str, Any]:
    """An event of a stream."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    ("word", "end"),
    [
        *((word, "whole") for word in ("", "stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "weird")),
        *((word, "cut off") for word in ("length", "LENGTH", "max_tokens", "MAX_TOKENS", "FinishReason.MAX_TOKENS")),
        *((word, "cut off") for word in ("max_output_tokens", "model_length", "model_context_window_exceeded")),
        *((word, "cut off") for word in ("token_limit", "incomplete", "maxTokens", "truncated", "max_new_tokens")),
        *((word, "broken off") for word in ("abort", "aborted", "error", "cancelled", "timeout", "network_error")),
        *((word, "broken off") for word in ("insufficient_system_resource", "ABORT", "internal_error", "canceled")),
        *((word, "refused") for word in ("content_filter", "SAFETY", "RECITATION", "refusal", "sensitive", "blocked")),
        *((word, "refused") for word in ("PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "content-filter", "IMAGE_SAFETY")),
    ],
)
def test_finish_reasons(word: str, end: str) -> None:
    assert ending(TeacherReply("5", finish_reason=word)) == end


@pytest.mark.parametrize(
    ("word", "tokens", "end"),
    [
        ("", 8, "cut off"),
        ("", 9, "cut off"),
        ("", 7, "whole"),
        ("", None, "whole"),
        ("OTHER", 8, "cut off"),
        ("FINISH_REASON_UNSPECIFIED", 8, "cut off"),
        ("stop", 8, "whole"),
        ("eos_token", 8, "whole"),
    ],
)
def test_a_reply_as_long_as_allowed_without_a_known_end_is_cut_off(word: str, tokens: int | None, end: str) -> None:
    assert ending(TeacherReply("5", finish_reason=word, completion_tokens=tokens), 8) == end


THOUGHT, TEXT = "3 and 4 make 7.", "#### 7"
SUMMARY = [{"type": "summary_text", "text": THOUGHT}]


@pytest.mark.parametrize(
    "message",
    [
        {"content": TEXT, "reasoning_content": THOUGHT},
        {"content": TEXT, "reasoning": THOUGHT},
        {"content": TEXT, "thinking": THOUGHT},
        {"content": TEXT, "reasoning": {"content": THOUGHT, "signature": "x"}},
        {"content": TEXT, "reasoning": {"summary": SUMMARY}},
        {"content": TEXT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT, "signature": "x"}]},
        {"content": TEXT, "reasoning_details": [{"type": "reasoning.summary", "summary": THOUGHT}]},
        {"content": TEXT, "reasoning": THOUGHT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
        {"content": TEXT, "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]},
        {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": TEXT}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"text": TEXT}]},
        {"content": [{"type": "reasoning", "text": THOUGHT}, {"type": "output_text", "text": TEXT}]},
        {"content": [{"type": "reasoning", "summary": SUMMARY}, {"type": "text", "text": TEXT}]},
        {"content": [{"text": THOUGHT, "thought": True}, {"text": TEXT}]},
        {"content": {"type": "text", "text": TEXT}, "reasoning_content": [THOUGHT]},
        {"content": {"parts": [TEXT]}, "reasoning_content": THOUGHT},
    ],
)
def test_a_thought_in_any_field(message: dict[str, Any]) -> None:
    reply = parse_reply(body(message))
    assert (reply.text, reply.reasoning) == (TEXT, THOUGHT)
    events = [piece(role="assistant", content=""), piece(**message), piece("stop")]
    assert parse_reply(stream(*events)) == reply


@pytest.mark.parametrize(
    ("message", "whole"),
    [
        ({"content": None, "reasoning_content": f"{THOUGHT}\n{TEXT}"}, f"{THOUGHT}\n{TEXT}"),
        ({"content": "", "reasoning": f"{THOUGHT}</think>{TEXT}"}, f"{THOUGHT}</think>{TEXT}"),
        ({"reasoning_content": f"<think>{THOUGHT}</think>{TEXT}"}, f"<think>{THOUGHT}</think>{TEXT}"),
        ({"content": TEXT, "reasoning_content": THOUGHT}, f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}"),
        ({"content": f"<think>{THOUGHT}</think>{TEXT}", "reasoning": THOUGHT}, f"<think>{THOUGHT}</think>{TEXT}"),
        ({"content": TEXT}, TEXT),
    ],
)
def test_a_reply_that_is_all_thought_is_a_reply(message: dict[str, Any], whole: str) -> None:
    assert parse_reply(body(message)).whole_text == whole


def test_deltas_make_a_reply() -> None:
    """Blanks at the edges of pieces stay; the usage may come last, and without a choice."""
    events = [
        {"model": "m", **piece(role="assistant", content=None, reasoning_content="3 and")},
        piece(reasoning_content=" 4 \u2028"),
        piece(content="The answer "),
        piece(content=" is\n"),
        {"choices": [{"index": 1, "delta": {"content": "another"}}]},
        piece("length", content="7"),
        {"model": "m", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}},
    ]
    expected = TeacherReply("The answer  is\n7", "3 and 4", "length", "", 5, 9, "m")
    assert parse_reply(stream(*events)) == expected
    assert parse_reply(stream(*events, end=b"")) == expected  # a finish reason is an end, too
    assert parse_reply(stream(*events).replace(b"\n", b"\r\n")) == expected
    halves = [piece(content="\ud83d"), piece("stop", content="\ude00 7")]  # one character in two events
    lines = (b"data: " + json.dumps(event).encode() + b"\n\n" for event in halves)
    assert parse_reply(b"".join(lines)).text == "\U0001f600 7"
    texts = [{"choices": [{"text": "7", "finish_reason": end}]} for end in (None, "eos")]
    assert parse_reply(stream(*texts)) == TeacherReply("77", finish_reason="eos")
    with_usage = [
        piece(content="7"),
        {"choices": [{"delta": {}, "finish_reason": "stop", "usage": {"completion_tokens": 2}}]},
    ]
    assert parse_reply(stream(*with_usage)).completion_tokens == 2


ERROR = {"error": {"message": "overloaded", "code": 503}}


@pytest.mark.parametrize(
    ("data", "reason", "status"),
    [
        (stream(piece(content="3 and"), end=b""), "stream broke off", None),
        (stream(piece(content="3 and"), end=b'data: {"choices": [{"del'), "stream broke off", None),
        (stream(piece(content="3 and"), ERROR), "error in the stream", 503),
        (stream(piece(content="3 and"), {"error": "lost"}), "error in the stream", None),
        (stream({"code": 429, "msg": "slow down"}), "error in the stream", 429),
        (stream(), "reply is empty", None),
        (stream(piece("stop", content="")), "reply is empty", None),
        (stream(piece("abort", content="7")), "reply broke off (abort)", None),
        (body({"content": "7"}, "error"), "reply broke off (error)", None),
        (
            body({"content": "7"}, "insufficient_system_resource"),
            "reply broke off (insufficient_system_resource)",
            None,
        ),
        (json.dumps(ERROR).encode(), "reply has no choice", 503),
        (b'{"choices": null, "error": {"code": "401"}}', "reply has no choice", 401),
        (b'{"choices": null, "usage": null}', "reply has no choice", None),
        (b'{"code": 500, "msg": "busy", "success": false}', "reply has no choice", 500),
        (body({"content": None, "reasoning_content": "Let me see"}), "reply is empty", None),
        (body({"content": [{"type": "image"}]}), "reply is empty", None),
        (b"<html><body>502 Bad Gateway</body></html>", "reply is not JSON", None),
    ],
)
def test_bodies_without_a_whole_reply(data: bytes, reason: str, status: int | None) -> None:
    with pytest.raises(AttemptFailed) as caught:
        parse_reply(data)
    assert (caught.value.reason, caught.value.status, caught.value.retryable) == (reason, status, True)


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b'{"choices": [{"text": " 3 + 4 = 7", "finish_reason": ""}]}', TeacherReply("3 + 4 = 7")),
        (
            b'{"choices": [{"delta": {"content": "7"}, "finish_reason": "stop"}]}',
            TeacherReply("7", finish_reason="stop"),
        ),
        (body({"content": "7"}, None, usage=None), TeacherReply("7")),
        (
            body({"content": "7"}, usage={"input_tokens": 3, "output_tokens": 2}),
            TeacherReply("7", "", "stop", "", 3, 2),
        ),
        (body({"content": ""}, "MAX_TOKENS"), TeacherReply("", finish_reason="MAX_TOKENS")),
        (b'{"choices": [{"text": "7", "finish_reason": {"type": "length"}}]}', TeacherReply("7", "", "length")),
        (b'{"choices": [{"text": "7", "finishReason": "STOP"}]}', TeacherReply("7", "", "STOP")),
        (b'{"choices": [{"text": "7", "finish_reason": null, "stop_reason": 2}]}', TeacherReply("7")),
        (body({"content": None}, "SAFETY"), TeacherReply("", finish_reason="SAFETY")),
        (body({"content": None, "refusal": "No."}), TeacherReply("", "", "stop", "No.")),
        (body({"content": [{"type": "refusal", "refusal": "No."}]}), TeacherReply("", "", "stop", "No.")),
        (b"\xef\xbb\xbf" + body({"content": "7"}), TeacherReply("7", finish_reason="stop")),
        (body({"content": "half \ud800"}), TeacherReply("half ?", finish_reason="stop")),
    ],
)
def test_bodies_with_a_reply(data: bytes, reply: TeacherReply) -> None:
    assert parse_reply(data) == reply


def test_an_empty_reply_as_long_as_allowed_is_cut_off_and_not_asked_again() -> None:
    data = body({"content": "", "reasoning": "hm"}, None, usage={"completion_tokens": 8})
    assert ending(parse_reply(data, max_tokens=8), 8) == "cut off"
    with pytest.raises(AttemptFailed, match="reply is empty"):
        parse_reply(data, max_tokens=9)
