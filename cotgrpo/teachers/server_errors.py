"""Errors of OpenAI-compatible servers: what a status and its message mean, and what to change in the request."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

LimitField = Literal["max_tokens", "max_completion_tokens"]

FATAL_STATUSES = {401: "rejected the key", 402: "asks for payment", 404: "does not know this address or model"}
RETRIED_STATUSES = (408, 409, 425, 429)
"""All statuses from 500 on are retried too."""
COMPLAINT_STATUSES = (400, 405, 406, 422, 501)
"""Statuses whose message may name a field of the request."""
NO_QUOTA = re.compile(
    "insufficient[_ ](?:quota|balance|fund|credit)|balance.{0,40}(?:insufficient|too low|not enough)|"
    "exceeded_current_quota|billing_hard_limit|credit balance|out of credits|arrear|overdue|"
    "余额不足|餘額不足|欠费|欠費|请充值|"  # Chinese
    "残高が?不足|잔액.{0,6}부족|"  # Japanese, Korean
    "saldo insuficiente|solde insuffisant|guthaben.{0,20}(?:reicht nicht|aufgebraucht)|"
    "недостаточно средств",
    re.IGNORECASE | re.DOTALL,
)
"""Codes and messages of an account without money, in the languages of providers. Of rate limits, none."""

CONTENT_FILTER = re.compile(
    "content_?filter|content management policy|content_?policy|data_?inspection|inappropriate content|"
    "content exists risk|sensitive_?content|moderation|敏感|不安全|违规",
    re.IGNORECASE,
)
"""Codes and messages of a filter that takes no offence at the next question."""

VERDICT = re.compile(
    "support|invalid|illegal|only|must|should|range|deprecat|extra|unknown|unrecogni[sz]ed|unexpected|permitted|"
    "allowed|enabled?|cannot|can't|instead|both|require|too (?:large|big|high|low|small)|please|use |set |expect|wrong|"
    "bad |reject|accept|exceed|maximum|minimum|larger|greater|"
    "支持|必须|必須|无效|非法|合法|范围|不能|"
    "请|错误|不正确|"  # Chinese
    "サポート|無効|必要|지원|유효",  # Japanese, Korean
    re.IGNORECASE,
)
"""Words of a complaint about a field. A message without one may name a field by chance."""
STREAM = re.compile(r"stream|\bsse\b|流式|ストリー|스트리", re.IGNORECASE)
STREAM_OPTIONS = re.compile("stream_options|include_usage")
LIMIT = re.compile("max_tokens|max_completion_tokens|max_output_tokens|maxOutputTokens")
WRONG_NAME = re.compile(
    "unsupport|(?:not|n't) support|unknown|unrecogni|unexpected|extra|deprecat|instead|permitted|不支持",
    re.IGNORECASE,
)
OUT_OF_RANGE = re.compile(
    r"too (?:large|big|high|many)|exceed|range|at most|at least|less|greater|maximum|(?:must|should) be.*\d|"
    r"[<>≤≥]=? ?\d|范围|超过",
    re.IGNORECASE,
)
CONTEXT = re.compile("context[ _](?:length|window|size)|上下文", re.IGNORECASE)
OF_PROMPT = re.compile("context|prompt|messages|input", re.IGNORECASE)
SYSTEM = re.compile(
    r"system (?:role|message|prompt|instruction)|role.{0,40}system|['\"`]system['\"`]|developer instruction|"
    r"messages\[0\]\.role|roles? (?:information|must alternate)|"
    "角色信息|系统(?:提示|消息|角色)",
    re.IGNORECASE,
)


class TeacherError(RuntimeError):
    """The teacher cannot answer any more; the message gives the server's reason and the fix."""


@dataclasses.dataclass(frozen=True)
class ServerError:
    """An error that a server sent.

    Attributes:
        status: HTTP status.
        message: the server's words.
        param: the field that the server names as the cause, or "".
        codes: the server's codes for the error, in one text.
        headers: HTTP headers.
    """

    status: int
    message: str
    param: str = ""
    codes: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def no_quota(self) -> bool:
        """Whether the account has no money left, so that no request can succeed."""
        return 400 <= self.status < 500 and NO_QUOTA.search(f"{self.codes} {self.message}") is not None

    @property
    def is_refusal(self) -> bool:
        """Whether a content filter refuses this question."""
        return self.status in (400, 403, 422, 451) and CONTENT_FILTER.search(f"{self.codes} {self.message}") is not None

    @property
    def retryable(self) -> bool:
        return self.status in RETRIED_STATUSES or self.status >= 500


@dataclasses.dataclass(frozen=True)
class RequestForm:
    """What differs between servers in the form of a request.

    Attributes:
        limit_field: the server's name for the longest reply.
        stream: whether the reply comes as a stream.
        count_tokens: whether a stream is asked for its token counts.
    """

    limit_field: LimitField = "max_tokens"
    stream: bool = False
    count_tokens: bool = True

    def fields(self) -> dict[str, object]:
        """Return the body fields that ask for a stream, if one is wanted."""
        if not self.stream:
            return {}
        return {"stream": True} | ({"stream_options": {"include_usage": True}} if self.count_tokens else {})


@dataclasses.dataclass(frozen=True)
class Complaint:
    """A server's complaint about a field of the request.

    Attributes:
        fix: the setting that mends it, as a sentence.
        form: another form of the request that the server may take, or None: only the user can mend it.
        of_every_request: whether every request would be refused.
    """

    fix: str
    form: RequestForm | None = None
    of_every_request: bool = True


def find_complaint(
    error: ServerError,
    form: RequestForm,
    sampling: Mapping[str, object],
    extra: Mapping[str, object],
    *,
    stream: bool | Literal["auto"] = "auto",
    has_system: bool = False,
) -> Complaint | None:
    """Return what the server complains about, or None if it does not name a field.

    The form of a request changes by itself, since replies stay the same. Sampling settings are the user's to change.

    Args:
        error: the error.
        form: the form of the request.
        sampling: its sampling fields, without None.
        extra: the fields of `teacher.extra_body`.
        stream: `teacher.stream`.
        has_system: whether the request has a system message.
    """
    if error.status not in COMPLAINT_STATUSES:
        return None
    if not (error.param or VERDICT.search(error.message)):
        return stream_complaint(form, stream) if stream == "auto" and STREAM.search(error.message) else None
    for words in filter(None, (error.param, error.message)):  # a named field is a surer sign than the message
        if form.stream and form.count_tokens and STREAM_OPTIONS.search(words):
            return Complaint("The server refuses stream_options.", dataclasses.replace(form, count_tokens=False))
        if LIMIT.search(words) or CONTEXT.search(words):
            return limit_complaint(error, form)
        if named := [name for name in sampling if re.search(rf"\b{name}\b", words)]:
            fixes = " or ".join(f"teacher.{name}: null" for name in named)
            values = " and ".join(f"teacher.{name} {sampling[name]}" for name in named)
            return Complaint(f"It refuses {values}. Set {fixes} to send none, or a value that the model takes.")
        if has_system and SYSTEM.search(words):
            return Complaint("It takes no system message. Leave prompt.system empty, and use prompt.question alone.")
        if STREAM.search(words):
            return stream_complaint(form, stream)
        quoted = re.findall(r"['\"`]([\w.]+)['\"`]", words)
        if named := [name for name in extra if name in (words, *quoted)]:
            return Complaint(f"It refuses {named[0]}. Remove it from teacher.extra_body.")
    return None


def stream_complaint(form: RequestForm, stream: bool | Literal["auto"]) -> Complaint | None:
    """Return the complaint about streams; None if `teacher.stream: auto` streams already."""
    if stream == "auto":
        return None if form.stream else Complaint("The server sends streams alone.", streaming(form))
    return Complaint(f"It refuses teacher.stream {str(stream).lower()}. Set teacher.stream: auto.")


def streaming(form: RequestForm) -> RequestForm:
    """Return the form that asks for a stream."""
    return dataclasses.replace(form, stream=True)


def limit_complaint(error: ServerError, form: RequestForm) -> Complaint:
    """Return the complaint about the longest reply: the other name of the field, or a smaller value."""
    is_context = CONTEXT.search(error.message) is not None
    if is_context or (OUT_OF_RANGE.search(error.message) and not WRONG_NAME.search(error.message)):
        if is_context or OF_PROMPT.search(error.message):  # other prompts may be shorter
            fix = "Prompt and reply do not fit into the model's context. Set a smaller teacher.max_tokens."
            return Complaint(fix, of_every_request=False)
        return Complaint("It refuses the value of teacher.max_tokens. Set a value that the model takes.")
    other: LimitField = "max_tokens" if form.limit_field == "max_completion_tokens" else "max_completion_tokens"
    fix = f"The server refuses {form.limit_field}. Set teacher.token_limit_field: {other}."
    return Complaint(fix, dataclasses.replace(form, limit_field=other))
