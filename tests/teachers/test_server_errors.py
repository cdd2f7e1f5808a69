"""What servers complain about: a field that takes another form, a setting of the user's, or nothing of the kind."""

from __future__ import annotations

from typing import Any

import pytest

from cotgrpo.teachers.server_errors import RequestForm, ServerError, find_complaint

PLAIN, STREAM, UNCOUNTED = RequestForm(), RequestForm(stream=True), RequestForm(stream=True, count_tokens=False)
RENAMED = RequestForm("max_completion_tokens")
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def complaint_about(message: str, form: RequestForm = PLAIN, **more: Any) -> Any:
    error = ServerError(more.pop("status", 400), message, more.pop("param", ""))
    settings = {"sampling": SAMPLING, "extra": {"top_k": 5}, "has_system": True} | more
    return find_complaint(error, form, **settings)


@pytest.mark.parametrize(
    ("message", "before", "after"),
    [
        (
            "This model only support stream mode, please enable the stream parameter",
            PLAIN,
            STREAM,
        ),
        ("parameter.enable_thinking must be set to false for non-streaming calls", PLAIN, STREAM),
        ("parameter.enable_thinking必须设置为false才能进行非流式调用", PLAIN, STREAM),
        ("enable thinking can not be support when `stream=False`.", PLAIN, STREAM),
        ("该模型仅支持流式输出", PLAIN, STREAM),
        ("stream must be true", PLAIN, STREAM),
        ("Non-streaming requests are not supported", PLAIN, STREAM),
        ("no stream", PLAIN, STREAM),
        ("Only SSE is supported", PLAIN, STREAM),
        ("请使用流式输出", PLAIN, STREAM),
        ("Please use max_completion_tokens", PLAIN, RENAMED),
        (
            "Validation error at #/stream_options: Extra inputs are not permitted",
            STREAM,
            UNCOUNTED,
        ),
        (
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            PLAIN,
            RENAMED,
        ),
        ("max_tokens is deprecated for this model", PLAIN, RENAMED),
        ("Unrecognized request argument supplied: max_completion_tokens", RENAMED, PLAIN),
        ("[{'loc': ['body', 'max_completion_tokens'], 'msg': 'Extra inputs are not permitted'}]", RENAMED, PLAIN),
    ],
)
def test_the_form_of_a_request_changes_by_itself(message: str, before: RequestForm, after: RequestForm) -> None:
    assert complaint_about(message, before).form == after
    assert complaint_about(message, before, status=422).form == after


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        (
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default is supported.",
            "teacher.temperature: null",
        ),
        ("temperature: bad value", "teacher.temperature: null"),
        ("请将 temperature 设置为 1", "teacher.temperature: null"),
        ("invalid temperature: only 1 is allowed for this model", "teacher.temperature 0.7"),
        ("`temperature` is deprecated for this model.", "teacher.temperature: null"),
        ("`temperature` and `top_p` cannot both be specified for this model.", "teacher.top_p: null"),
        ("[{'loc': ('body', 'top_p'), 'msg': 'Input should be less than 1'}]", "teacher.top_p: null"),
        ("temperature 参数非法，取值范围是 (0,1)", "teacher.temperature: null"),
        ("[{'loc': ['body', 'max_tokens'], 'msg': 'Input should be <= 512'}]", "teacher.max_tokens"),
        ("Range of max_tokens should be [1, 8192]", "teacher.max_tokens"),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", "teacher.max_tokens"),
        ("max_tokens is too large: 100000. This model supports at most 16384 completion tokens", "teacher.max_tokens"),
        ("Unsupported value: 'messages[0].role' does not support 'system' with this model.", "prompt.system"),
        ("System role not supported", "prompt.system"),
        ("Developer instruction is not enabled for models/gemma-3-27b-it", "prompt.system"),
        ("[1214] Incorrect role information, only user and assistant are allowed", "prompt.system"),
        ("角色信息不正确", "prompt.system"),
        ("Unrecognized request argument supplied: 'top_k'", "teacher.extra_body"),
    ],
)
def test_a_setting_of_the_users_is_named(message: str, fix: str) -> None:
    found = complaint_about(message)
    assert found.form is None and fix in found.fix


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("I do not like this", {}),
        ("Content exists risk", {}),
        ("The system is busy, only try again", {}),
        ("temperature: 3", {}),  # a question's words
        ("System role not supported", {"has_system": False}),
        ("only 1 temperature is allowed", {"status": 500}),
        ("Unsupported value: 'stream' does not support true with this model.", {"form": STREAM}),
    ],
)
def test_other_errors_are_no_complaints(message: str, more: dict[str, Any]) -> None:
    assert complaint_about(message, **more) is None


def test_the_servers_own_field_name_is_enough() -> None:
    assert "teacher.temperature: null" in complaint_about("bad value", param="temperature").fix
    assert complaint_about("bad value", param="max_tokens").form == RENAMED
    # The rest of the message may repeat the request.
    assert complaint_about("stream must be true: {'max_tokens': 9}", param="stream").form == STREAM
    assert "extra_body" in complaint_about("bad value", param="top_k").fix
    assert "prompt.system" in complaint_about("bad value", param="messages[0].role").fix


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens, max_tokens exceeds what the messages leave",
        "'max_tokens' or 'max_completion_tokens' is too large: 32000. The context has 16384, the input 900 tokens.",
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
        "输入超过模型的最大上下文长度，请缩短",
    ],
)
def test_a_prompt_that_is_too_long_is_one_requests_fault(message: str) -> None:
    found = complaint_about(message)
    assert found.form is None and not found.of_every_request and "teacher.max_tokens" in found.fix


def test_a_stream_that_the_user_has_chosen() -> None:
    assert "teacher.stream: auto" in complaint_about("only stream mode is supported", stream=False).fix
    assert "teacher.stream: auto" in complaint_about("'stream' true is not supported", UNCOUNTED, stream=True).fix


@pytest.mark.parametrize(
    ("codes", "message", "no_quota"),
    [
        ("insufficient_quota", "You exceeded your current quota", True),
        ("exceeded_current_quota_error", "", True),
        ("Arrearage", "Access denied, please make sure your account is in good standing.", True),
        ("AccountOverdueError", "", True),
        ("1113", "您的账户已欠费，请充值后重试", True),
        ("", "余额不足或无可用资源包,请充值。", True),
        ("", "Sorry, your account balance is insufficient", True),
        ("", "Insufficient Balance", True),
        ("", "Your credit balance is too low to access the API", True),
        ("", "残高が不足しています", True),
        ("", "잔액이 부족합니다", True),
        ("", "Недостаточно средств на счёте", True),
        ("rate_limit_exceeded", "Rate limit reached: 3 requests per min", False),
        ("RESOURCE_EXHAUSTED", "Quota exceeded for requests per minute", False),
        ("1302", "您当前使用该API的并发数过高", False),
        ("", "the load balancer is busy", False),
    ],
)
def test_no_money_is_no_rate_limit(codes: str, message: str, no_quota: bool) -> None:
    assert ServerError(429, message, codes=codes).no_quota is no_quota
    assert not ServerError(503, message, codes=codes).no_quota
