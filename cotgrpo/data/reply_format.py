r"""The form of a reply in a chat: a rationale, then the answer, as text both ways."""

from __future__ import annotations

import dataclasses
from typing import Literal

from cotgrpo.data.answers import begins_with_number, split_reply, split_thought
from cotgrpo.data.answers.extraction import find_answer

ANSWER_FORMATS = {"plain": "#### {answer}", "think": "{answer}"}


@dataclasses.dataclass(frozen=True)
class ReplyFormat:
    r"""Writes replies, and splits generated ones into rationale and answer.

    Attributes:
        reasoning: "plain": rationale, blank line, answer; "think": `<think>rationale</think>`, blank line, answer.
        answer_format: text around the answer with `{answer}` in it, such as `\boxed{{answer}}`; empty: `#### {answer}`
            for "plain", `{answer}` for "think".
        marks: of a thought, before and after it.

    Raises:
        ValueError: a setting outside its range.
    """

    reasoning: Literal["plain", "think"] = "plain"
    answer_format: str = ""
    marks: tuple[str, str] = ("<think>", "</think>")

    def __post_init__(self) -> None:
        if self.reasoning not in ANSWER_FORMATS:
            raise ValueError(f'reasoning must be "plain" or "think", got {self.reasoning!r}.')
        if self.phrase.count("{answer}") != 1:
            raise ValueError(f"answer_format must hold {{answer}} once, got {self.phrase!r}.")

    @property
    def phrase(self) -> str:
        """The text around the answer, with its default."""
        return self.answer_format or ANSWER_FORMATS[self.reasoning]

    @property
    def mark(self) -> str:
        """The text between rationale and answer."""
        return self.marks[1] if self.reasoning == "think" else "\n\n" + self.phrase.partition("{answer}")[0]

    def write_answer(self, answer: str) -> str:
        """Return the answer in `answer_format`."""
        return self.phrase.replace("{answer}", answer.strip())

    def message(self, rationale: str, answer: str, *, as_field: bool) -> dict[str, str]:
        """Return the assistant's message; `as_field` puts a thought into `reasoning_content`."""
        rationale, answer = rationale.strip(), self.write_answer(answer)
        if self.reasoning == "plain":
            return {"role": "assistant", "content": f"{rationale}\n\n{answer}"}
        if as_field:
            return {"role": "assistant", "content": answer, "reasoning_content": rationale}
        return {"role": "assistant", "content": f"{self.marks[0]}\n{rationale}\n{self.marks[1]}\n\n{answer}"}

    def split(self, text: str, *, cut_off: bool = False) -> tuple[str, str | None]:
        r"""Split a reply into rationale and answer.

        "think": the answer is the text after `</think>`, without the words of `answer_format`; None without `</think>`.
        "plain": the first whole line in `answer_format` whose answer begins with a number (`#### 12`), so text after
        it changes nothing, unless a box follows it. Without such a line, it is the text after the last blank line and
        the first words of `answer_format`. Without those, `extract_answer` finds it (a box, a phrase, the last number),
        so students that were never trained on the format have answers too.

        Args:
            text: the reply.
            cut_off: the reply hit its length limit. It then has an answer only if the answer's line has ended.
        """
        if self.reasoning == "think":
            return self.split_thought(text.strip())
        thought = split_thought(text)
        rationale, answer = self.split_plain(text, cut_off=cut_off)
        if thought.marked:
            answer = None if thought.unclosed else self.split_plain(thought.text, cut_off=cut_off)[1]
            answer = answer if answer is not None or cut_off else split_reply(text)[1]  # one line without a mark
            rationale = rationale if self.mark in thought.text else thought.thought
        return rationale, answer

    def split_plain(self, text: str, *, cut_off: bool) -> tuple[str, str | None]:
        """Split a reply without a thought in marks, as `split` does."""
        if (line := self.answer_line(text)) is not None:
            rationale, answer, rest = line
            return rationale.strip(), None if cut_off and not rest else answer
        found = find_answer(text.rpartition("\n")[0] if cut_off else text)
        if cut_off:
            marked = found is not None and found.kind in ("box", "tag")
            return text.strip(), found.answer if found is not None and marked else None
        text = text.strip()
        rationale, mark, answer = text.rpartition(self.mark)
        if not mark or (found is not None and found.kind in ("box", "tag") and found.end <= len(rationale)):
            return text, None if found is None else found.answer
        return rationale.strip(), answer.strip().removesuffix(self.phrase.partition("{answer}")[2].strip()).strip()

    def split_thought(self, text: str) -> tuple[str, str | None]:
        """Split a reply at the closing mark of its thought. The opening mark may stand in the prompt."""
        rationale, found, answer = text.partition(self.marks[1])
        rationale, answer = rationale.removeprefix(self.marks[0]).strip(), answer.strip()
        within = self.within_phrase(answer)
        return rationale, (answer if within is None else within) if found else None

    def answer_line(self, text: str) -> tuple[str, str, str] | None:
        """Find the first line in `answer_format` whose answer begins with a number.

        Returns:
            The text before the line, the answer, and the text after the line. None without such a line, or if the
            format begins with the answer.
        """
        if self.phrase.startswith("{answer}"):
            return None
        start = 0
        for line in text.split("\n"):
            answer, end = self.within_phrase(line.strip()), start + len(line)
            if answer is not None and begins_with_number(answer):
                return text[:start], answer, text[end:]
            start = end + 1
        return None

    def within_phrase(self, words: str) -> str | None:
        """Return the answer in a text of the form `answer_format`; None for any other text."""
        first, last = (part.strip() for part in self.phrase.split("{answer}"))
        if len(words) < len(first) + len(last) or not (words.startswith(first) and words.endswith(last)):
            return None
        return words[len(first) : len(words) - len(last)].strip()
