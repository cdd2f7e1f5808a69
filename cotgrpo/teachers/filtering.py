"""Filters of a teacher's replies: which are right, and which right ones become triples."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cotgrpo.data import answers
from cotgrpo.data.answers import answers_match, begins_with_number, grade, split_reply, split_thought
from cotgrpo.data.own.loading import OwnCodeError, load_function
from cotgrpo.data.own.verifier import EXACT_MATCH, Verifier
from cotgrpo.data.questions import Question, place_of
from cotgrpo.data.rows import squeeze
from cotgrpo.teachers.completions import TeacherReply, ending
from cotgrpo.teachers.decontamination import TestQuestions, ngrams, words

Check = Callable[[Mapping[str, Any], str, str], bool]
"""`check(row, rationale, answer)` returns whether a reply is right."""

REJECTED = (
    "wrong answer",
    "unparsable",
    "truncated",
    "refused",
    "duplicate",
    "contaminated",
    "control token",
    "check failed",
    "no majority",
)
"""Every reason to reject a reply."""
REFUSALS = {
    "English": "(?:i['\u2019]?m|i am) (?:very |really )?(?:sorry|afraid|unable|not able)|"
    "(?:very |so )?sorry\\b|"
    "(?:unfortunately,? |my apologies\\W+)?i (?:can['\u2019]?t|cannot|won['\u2019]?t|must decline) |"
    "(?:i |my |our )?apolog(?:i[sz]e|ies)|as an ai\\b|(?:unfortunately,? )?(?:i['\u2019]?m|i am) not able",
    "Chinese": "(?:您好|你好)?\\W*我?(?:很|非常|十分|真|深感|感到)?(?:对不起|對不起|抱歉|遗憾|遺憾|不好意思)|"
    "我(?:暂时|目前)?(?:无法|無法|不能|没办法|沒辦法)|(?:作为|作為|身为)\\S{0,6}(?:ai|人工智能|人工智慧|语言模型)|"
    "\\S{0,12}(?:无法|無法|不能)(?:回答|提供|协助|協助|帮助|幫助|满足)",
    "Japanese": "(?:大変|誠に)?(?:申し訳|申訳|すみません|ごめん|恐れ入り|残念)|"
    "\\S{0,30}(?:答え|回答|お手伝い|提供)\\S{0,6}できません",
    "Korean": "(?:정말 |대단히 )?(?:죄송|미안|유감)|.{0,30}(?:답변|도와|제공)\\S{0,4} (?:드릴 )?수 없",
    "Spanish": "lo (?:siento|lamento)|lamento|perd[oó]n|disculp|me temo que|"
    "(?:lamentablemente,? )?no (?:puedo|me es posible)\\b|como (?:ia|modelo|inteligencia)",
    "French": "(?:je suis )?(?:vraiment |sincèrement )?désolé|je (?:regrette|m['\u2019]excuse)|"
    "(?:malheureusement,? )?je ne (?:peux|suis|pourrai)|en tant qu",
    "German": "(?:es )?tut mir (?:sehr )?leid|entschuldig|(?:leider |das )?(?:kann|darf) ich|"
    "ich (?:kann|darf) .{0,30}nicht|als (?:ki|sprachmodell)",
    "Russian": "(?:мне )?(?:очень )?жаль|извин|простите|прошу прощен|к сожалению|я не (?:могу|смогу|в сост)|"
    "как (?:ии|языков)|с сожалением|увы",
    "Ukrainian": "вибач|перепрош|на жаль|я не можу",
    "Portuguese": "(?:sinto|lamento) muito|lamento|(?:me )?desculp|infelizmente|"
    "(?:eu )?não (?:posso|consigo)\\b|como (?:um |uma )?(?:ia|modelo)",
    "Italian": "mi (?:dispiace|spiace|scuso)|spiacente|purtroppo|non (?:posso|sono in grado)|in quanto (?:ia|modello)",
    "Dutch": "het spijt me|helaas|ik kan .{0,30}niet|excuses",
    "Polish": "przepraszam|przykro mi|niestety|nie mogę",
    "Czech": "omlouv|bohužel|je mi líto|nemohu",
    "Swedish": "jag är ledsen|tyvärr|förlåt|jag kan inte",
    "Romanian": "îmi pare rău|din păcate|nu pot",
    "Greek": "λυπάμαι|συγγνώμη|δεν μπορώ",
    "Turkish": "üzgünüm|maalesef|özür|ne yazık ki|.{0,30}yardımcı olam",
    "Arabic": "(?:أنا )?[آاأ]سف|عذر|أعتذر|نعتذر|معذرة|للأسف|لا (?:أستطيع|يمكنني)",
    "Persian": "مت[أا]سف|ببخشید|نمی.?توانم",
    "Hebrew": "(?:אני )?מצטער|סליחה|אני לא יכול",
    "Hindi": "(?:मुझे )?(?:खेद|माफ|क्षमा)|मैं .{0,40}नहीं|दुर्भाग्य",
    "Bengali": "(?:আমি )?দুঃখিত",
    "Thai": "ขอ(?:อภัย|โทษ)|เสียใจ|(?:ฉัน|ผม|ดิฉัน)?ไม่สามารถ",
    "Vietnamese": "(?:tôi |rất |chúng tôi )*(?:xin lỗi|tiếc)|tôi không thể",
    "Indonesian": "(?:mohon )?maaf|saya (?:tidak (?:bisa|dapat)|menyesal)|sayangnya",
}
"""Language -> how a refusal begins."""
REFUSAL = re.compile(rf"\W*(?:{'|'.join(REFUSALS.values())})", re.IGNORECASE)
CONTROL_TOKEN = re.compile(
    r"<[|\uff5c][^|\uff5c<>\s]{3,40}[|\uff5c]>|<(?:start|end)_of_turn>|</?s>|<[be]os>|<sep>|</?think>|\[/?INST\]|<</?SYS>>"
)
"""Tokens that only a template may write, of any model family. A student would learn to stop or switch roles."""
REPLACEMENT = "\ufffd"
"""Stands for bytes that are no text."""
MARKED_ANSWER = re.compile(r"####[ \t]*([^\n]*)")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement of a reply.

    Attributes:
        accepted: whether it may become a triple.
        reason: "correct" or "unverified", or one of `REJECTED`.
        detail: details of this reply.
    """

    accepted: bool
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A reply that may become a triple.

    Attributes:
        number: its number among the replies to a question, from 0.
        rationale, answer: its parts.
        reward: the reward of the user's own; 0 without one.
    """

    number: int
    rationale: str
    answer: str
    reward: float = 0.0


class Judge:
    """Judges each reply on its own: the order of replies does not matter.

    Args:
        check: decides instead of the row's right answer; None: answers are compared, if the row has one.
        test: questions that must not be learned from, or None.
        max_tokens: the longest reply that was allowed; None: not known.
        verifier: decides if it has a function of the user's own.

    Attributes:
        failures: the first error of that function for each question, by its place. After one, all verdicts are to be
            made again.
    """

    def __init__(
        self,
        check: Check | None = None,
        test: TestQuestions | None = None,
        max_tokens: int | None = None,
        verifier: Verifier = EXACT_MATCH,
    ) -> None:
        self.check, self.test, self.max_tokens, self.verifier = check, test, max_tokens, verifier
        self.failures: dict[str, OwnCodeError] = {}

    def __call__(self, question: Question, reply: TeacherReply) -> Verdict:
        """Return the first verdict that holds.

        In order: truncated, refused, unparsable, control token, contaminated, wrong, or accepted.
        """
        end, whole = ending(reply, self.max_tokens), reply.whole_text
        thought = split_thought(whole)
        if end in ("cut off", "broken off") or thought.unclosed:
            return Verdict(False, "truncated", "" if reply.finish_reason == "length" else reply.finish_reason)
        rationale, answer = parts_of(reply)
        refuses = answer in (None, thought.text) and REFUSAL.match(thought.text) is not None
        if end == "refused" or reply.refusal or refuses:
            return Verdict(False, "refused", f"{reply.refusal or thought.text:.80}")
        if answer is None or not rationale:
            return Verdict(False, "unparsable", "no answer found" if answer is None else "no rationale")
        if REPLACEMENT in whole and REPLACEMENT not in question.question:
            return Verdict(False, "unparsable", "a character that the server broke (U+FFFD)")
        control = control_text(rationale, answer)
        if control is not None:
            return Verdict(False, "control token", control)
        overlap = None if self.test is None else self.test.overlap(f"{rationale} {answer}")
        if overlap is not None:
            return Verdict(False, "contaminated", overlap)
        return self.correctness(question, whole, rationale, answer)

    def fingerprint(self, question: Question) -> str:
        """Return a hash of what a verdict depends on besides the reply; empty with a check, which may change unseen."""
        if self.check is not None or self.verifier.verify is not None:
            return ""
        test = None if self.test is None else self.test.fingerprint
        return hashlib.sha256(repr((rules_version(), question.gold, test, self.max_tokens)).encode()).hexdigest()[:16]

    def correctness(self, question: Question, whole: str, rationale: str, answer: str) -> Verdict:
        """Return whether the answer is right, by the check or the row's right answer."""
        if self.check is not None:
            try:
                right = self.check(question.row, rationale, answer)
            except Exception as error:  # of the user's code, which a bad reply may trip
                return Verdict(False, "check failed", f"{type(error).__name__}: {error}"[:200])
            return Verdict(True, "correct") if right else Verdict(False, "wrong answer", repr(answer)[:80])
        if self.verifier.verify is not None:
            return self.own_verdict(question, whole, answer)
        if not question.gold:
            return Verdict(True, "unverified")
        graded = grade(whole, question.gold)
        return Verdict(True, "correct") if graded.correct else Verdict(False, "wrong answer", graded.why)

    def own_verdict(self, question: Question, whole: str, answer: str) -> Verdict:
        """Return the verdict of the user's own function. An error is kept: a reply that was paid for is not lost."""
        try:
            found = self.verifier(whole, answer, question.gold, question.row, place_of(question))
        except OwnCodeError as error:
            self.failures.setdefault(place_of(question), error)
            return Verdict(False, "check failed", str(error)[:200])
        if found.correct:
            return Verdict(True, "correct", found.message[:80])
        return Verdict(False, "wrong answer", (found.message or repr(answer))[:80])

    def reward(self, question: Question, reply: TeacherReply) -> float:
        """Return the reward of the user's own; 0 without one."""
        return self.verifier.reward_of(reply.whole_text, question.gold, question.row, place_of(question)) or 0.0


@functools.cache
def rules_version() -> str:
    """Return a hash of the code that judges replies."""
    digest = hashlib.sha256(importlib.metadata.version("math-verify").encode())
    own = (Path(__file__).with_name(f"{name}.py") for name in ("filtering", "completions", "decontamination"))
    for path in (*sorted(Path(answers.__file__).parent.glob("*.py")), *own):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def parts_of(reply: TeacherReply) -> tuple[str, str | None]:
    """Return rationale and answer of a reply; the answer is None if there is none. The rules are `split_reply`'s."""
    return split_reply(reply.whole_text)


def control_token(text: str) -> str | None:
    """Return the first control token of a template in a text, or None."""
    found = CONTROL_TOKEN.search(text)
    return None if found is None else found[0]


def control_text(rationale: str, answer: str) -> str | None:
    """Return the text in a triple that every template refuses: a control token, or another marked answer; or None."""
    token = control_token(rationale) or control_token(answer)
    if token is not None:
        return token
    marked = (match[0] for match in MARKED_ANSWER.finditer(rationale) if begins_with_number(match[1]))
    return next(marked, None)


def load_check(name: str) -> Check:
    """Import the function "package.module:function".

    Raises:
        DataError: the module or the function is missing, or it is not a function.
    """
    return load_function(name, "verify.check")


def majority(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the largest group of candidates with matching answers, if it has two or more and no equal.

    Wang et al. 2022, "Self-consistency improves chain of thought reasoning in language models", arXiv:2203.11171.
    """
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        group = next((group for group in groups if answers_match(candidate.answer, group[0].answer)), None)
        if group is None:
            groups.append([candidate])
        else:
            group.append(candidate)
    groups.sort(key=len, reverse=True)
    is_majority = bool(groups) and len(groups[0]) > 1 and (len(groups) == 1 or len(groups[0]) > len(groups[1]))
    return groups[0] if is_majority else []


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without those that repeat an earlier one, white space aside."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(squeeze(f"{candidate.rationale} {candidate.answer}"), candidate)
    return list(first.values())


def shortest(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the `count` candidates with the fewest characters; the earlier one wins a tie."""
    return sorted(candidates, key=lambda candidate: (len(candidate.rationale), candidate.number))[:count]


def best(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the `count` candidates with the highest reward; the earlier one wins a tie."""
    return sorted(candidates, key=lambda candidate: (-candidate.reward, candidate.number))[:count]


def most_diverse(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the shortest candidate, then repeatedly the one least similar to those chosen, up to `count`.

    Similarity is the Jaccard index of word trigrams, |A and B| / |A or B|, to the most similar of those chosen. The
    shorter candidate wins a tie.
    """
    left = shortest(candidates, len(candidates))
    grams = {c.number: trigrams(c.rationale) for c in left}
    chosen = left[:1]
    left = left[1:]
    while left and len(chosen) < count:
        similarity = [max(jaccard(grams[c.number], grams[other.number]) for other in chosen) for c in left]
        chosen.append(left.pop(similarity.index(min(similarity))))
    return chosen


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Return the runs of three words; a shorter text is one run."""
    tokens = words(text)
    return set(ngrams(tokens, 3)) or {tuple(tokens)}


def jaccard(left: set[T], right: set[T]) -> float:
    """Return the Jaccard index of two sets that are not empty."""
    return len(left & right) / len(left | right)


def commonest(reasons: Sequence[tuple[str, str]], count: int = 10) -> list[str]:
    """Return a line for each of the `count` commonest reasons, with its number and an example.

    Args:
        reasons: (reason, detail) pairs.
        count: most lines.
    """
    examples: dict[str, str] = {}
    for reason, detail in reasons:
        examples[reason] = examples.get(reason) or detail
    tally = collections.Counter(reason for reason, _ in reasons)
    return [
        f"{n} x {reason}" + (f" ({examples[reason]})" if examples[reason] else "")
        for reason, n in tally.most_common(count)
    ]
