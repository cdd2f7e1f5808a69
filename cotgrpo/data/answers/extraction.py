r"""Find the final answer in a reply: a box, `####`, a phrase such as "the answer is", or the last number."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Literal

from cotgrpo.data.answers.characters import same_length
from cotgrpo.data.answers.formulas import has_symbols, may_be_formula
from cotgrpo.data.answers.moments import DATE_FIRST
from cotgrpo.data.answers.numerals import LEADING_NUMBER, MULTIPLIER, NUMBER_IN_TEXT, SIGNED, WORDS_IN_TEXT
from cotgrpo.data.answers.quantities import COPULA, CURRENCY, parse_quantity
from cotgrpo.data.answers.thoughts import split_thought

BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:and|or|和|或|、)?[\s$]*")
HASHES = re.compile(r"####[ \t]*+([^\n#]*[^\s#])")
ANSWER_TAG = re.compile(r"<answer>\s*(.{1,2000}?)\s*</answer>", re.DOTALL | re.IGNORECASE)
NEXT_QUESTION = re.compile(
    r"\n\s*(?:\*\*|#+ ?)?(?:Question|Problem|Q|问题|题目|Вопрос|Pregunta|Frage)(?: ?[0-9]+)?(?:\*\*)?\s*[:.]"
)
"""A student that goes on writes the next question of its prompt."""

NOUN = (
    r"(?:\banswers?\b(?: (?:choice|option|key))?|答案|(?<![解回问作应報])答(?=\s*[:,])|答え|解答|正解|정답|(?<!\w)답|"
    r"\b(?:ответ(?:ом)?|відповідь|відповіддю|respuesta|réponse|antwort|lösung|resposta|risposta|odpowied[źz]|cevap|yanıt|"
    r"jawaban(?:nya)?|antwoord|svaret|svar|απάντηση|đáp án|đáp số)\b|คำตอบ|الإجابة|الجواب|الاجابة|उत्तर|উত্তর|תשובה|"
    r"پاسخ|جواب)"
)
PURPOSE = (  # up to the verb or the mark
    r"\s+(?:to|for|of|in|the|as)\b[^\n.:=]{1,50}?(?=\s(?:is|are|was|would|will|should|must)\b|\s?[:=])"
)
KIND = r"\s+(?:final[ea]?|correcta?|النهائية|الصحيحة|النهائي|choice|option|number)"
GAP = rf"(?:\s*[\])*_]{{1,4}})?(?:{PURPOSE}|\s*\([^()\n]{{1,30}}\)|{KIND})?"
"""Between the noun and the verb: "to the first question", "(in dollars)"."""
VERB = (
    r"(?:\s*(?:\b(?:is|are|was|be|would be|will be|should be|must be|equals?|es|est|ist|lautet|beträgt|é|è|là|"
    r"adalah|равен|равно|это|будет|wynosi|är|είναι)\b|应该?[是为]|[是为為选選]|等于|는|은|이|は|が|คือ|هي|هو|है|হলো|היא|"
    r"است)(?: (?:therefore|thus|then|simply|just|clearly|exactly|approximately|about|option|choice)\b)*)?"
)
MARK = r"(?:\s*[*_]{0,3}\s*(?::|=|\s[-—]\s|—|→|=>)+)?"
PHRASE = re.compile(
    rf"{NOUN}(?P<gap>{GAP})(?P<verb>{VERB})(?P<mark>{MARK})[ \t*_]*(?P<line>\n{{1,2}}[ \t*_]*)?", re.IGNORECASE
)
HEADING = re.compile(r"(?:^|\n)[#*_ \t]*[^\n]{0,20}$")
CHOOSE_ZH = r"故选|应选|故答案选|(?<!不)选择?|選擇?|选项(?:是|为)?|正确的[是有为]"
CHOOSE = rf"(?:{CHOOSE_ZH}|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Вв]ариант)\b(?: is)?)\s*:?\s*"
LETTERS = r"(?:[A-J]{1,5}(?![A-Za-z])|[甲乙丙丁]|[①-⑩]{1,6})"
IS_CORRECT = r"(?= is (?:the )?(?:correct|right)\b|选?项?是?正确)"
CHOSEN = re.compile(
    rf"{CHOOSE}(?P<letters>[(\[]?{LETTERS}[)\]]?)|(?P<correct>[(\[]?(?<![A-Za-z])[A-J](?![A-Za-z])[)\]]?){IS_CORRECT}"
    r"|(?:\b(?:Therefore|Thus|Hence|So),? |\b(?:[Ss]elect|[Cc]hoose|[Pp]ick) )(?P<last>[(\[]?[A-J][)\]]?)(?=\.?\s*$)"
)
"""`故选A`, `Option (B)`, `C is correct`."""
SENTENCE_END = re.compile(r"(?<![A-Z])(?<!Rs)(?<!approx)\.(?![0-9A-Za-z])|(?<=[A-Z])\.(?=\s|$)|[!?\n]")
CLAUSE_END = re.compile(r"[,;]|\s[-—]\s|\s\(")
ITEM_END = re.compile(r",(?![0-9]{3}(?![0-9]))\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+|和|\s?\(")
"""After an item of a list in a sentence. A comma before three digits groups thousands."""
REMARK = re.compile(
    r"(?:\s*\((?=[^()\n]*[^\W\d_]{2})(?![^()]*=)|(?<=[.!?])\s*\()[^()\n]{3,120}\)[.\s]*$"  # words, or its own sentence
)
REFERENCE = re.compile(
    r"(?:\b(?:step|equation|part|case|figure|table|question|method|line|section|page|example)s? #?|第)$", re.I
)
"""Before a number that names a place in the reply."""
TIME_OR_NUMBER = re.compile(
    rf"(?<![0-9:])[0-9]{{1,3}}:[0-9]{{1,3}}(?::[0-9]{{2}})?(?: ?[apAP]\.?[mM]\b)?"
    rf"|[0-9]{{4}}[-/.][0-9]{{1,2}}[-/.][0-9]{{1,2}}|{NUMBER_IN_TEXT.pattern}"
)
MATH = re.compile(
    r"\$(?! )((?:(?![^\W\d_]{3,} )[^$\n]){1,200}?)(?<! )\$(?![0-9])|\\\((.{1,200}?)\\\)|\\\[(.{1,200}?)\\\]"
)
"""A formula in a sentence: `$x = 2$`. `$5 and $` is none."""
NAME_AND_NUMBER = re.compile(r"[A-Z]\w+ [0-9]{1,4}(?:, [0-9]{4})?")
"""A date, such as `June 20`, or another name with a number in it."""
STOP = re.compile(
    r"\s+(?:because|since|so|which|that|who|as|and|but|for|in|if|when|after|at|on|by|with|from|per|more|less|left|total|"
    r"altogether|remaining|each|every|he|she|they|we|it|is|are|was|were)\b",
    re.IGNORECASE,
)
NOT = re.compile(
    r"(?:\b(?:not|never|cannot|kein\w?|nicht|не|pas|non|não|no (?:es|son|hay))|n't|不是|不等于|并非|ليس|±|\\pm)"
    r"(?: (?:be|equal(?: to)?))?[ *$\"']*$",
    re.IGNORECASE,
)
"""Before a number that is not the answer."""
COMPARED = re.compile(r"(?<!no )(?<!not )\b(?:less|more|fewer|greater|larger|smaller) than[ *$]*$", re.IGNORECASE)
RANGE = re.compile(r"\bbetween \\?[$€£]?[0-9.,]{1,15} and[ *$]*$", re.IGNORECASE)
REASON = re.compile(
    r",? (?:since|because)\b(?=[^.=]*\.?\s*$)(?![^.]*\b(?:so|then|therefore|thus|has|have|left)\b)", re.IGNORECASE
)
"""A reason at the end of the last sentence."""
REASON_ZH = re.compile(r",\s*(?:比|其中|因为|由于)[^.\n]{1,60}\.?\s*$")
NOTE = re.compile(r"\n[\s*_(>]*(?:Note|Check|Verification|注意?|验证|检验)[*_]*\s*:", re.IGNORECASE)
TUPLE = re.compile(r"[(\[](?:[^()\[\]\n,]{1,30},){1,5}[^()\[\]\n,]{1,30}[)\]]")
"""A point in a sentence: (4, 0)."""
BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
LIST_AT_END = re.compile(
    rf"(?:\bare|[是为]) ?(?P<items>{SIGNED}(?:(?:, ?(?:and )?| and |和|、){SIGNED}){{1,9}})[ *]*\.?\s*$", re.IGNORECASE
)
"""`The numbers are 7 and 11.`"""
SYMBOL_AFTER = re.compile(r" ?(?:π|√ ?[0-9]+|\\pi(?![a-z])|\\sqrt *(?:\{[^{}]{1,40}\}|[0-9]))")
"""What makes a number the factor of another one: 16π."""
BOLD_NAME = re.compile(r"(?:\b(?:is|are|was|be)|[是为])[ :]*\*\*([^*\n0-9:]{1,60})\*\*[^*0-9\n]{0,30}$")
"""A name at the end that is bold: `The winner is **Elizabeth**.`"""
LEADING_AMOUNT = re.compile(rf"(?:{CURRENCY} ?)?{SIGNED}(?:{MULTIPLIER})?")
OPERATOR = re.compile(r"\s*[=+*/^×÷<>-]")
GOES_ON = re.compile(r"\s*(?:[=+*/^_\\<>({:×÷-]|\w)")
"""After a number that is the beginning of a formula or of a range."""
PROSE = re.compile(r"\s+(?!(?:times|plus|minus|divided)\b)[^\W\d_]{3,}")
"""After a number in a sentence."""
WORKED_OUT = re.compile(r"=|\b(?:and|so|then|plus|total|altogether|in all|now)\b|所以|因此|共", re.IGNORECASE)
MOST_SKIPPED = 4
"""Numbers at the end that may not count: after "step", after "not"."""
LONGEST_SENTENCE = 2000
LONGEST_UNIT = 40
LONGEST_REMARK = LONGEST_MATH = 200
REMEMBERED = 8
"""Texts whose answer is kept: reading a row, or grading a reply, asks for it several times."""
SHORT_ANSWER_WORDS = 6


@dataclasses.dataclass(frozen=True)
class Found:
    """An answer and its place in a text.

    Attributes:
        answer: the answer as written, without surrounding space.
        start, end: the place of the answer and the mark before it.
        kind: what marks it.
        whole: a longer reading: the whole sentence after a phrase; empty: none.
    """

    answer: str
    start: int
    end: int
    kind: Literal["box", "tag", "hashes", "phrase", "number"]
    whole: str = ""


def extract_answer(text: str) -> str | None:
    r"""Return the final answer in a reply, as written there.

    That is, after the thought if there is one: the last `\boxed{...}`; the text of the last `<answer>...</answer>`;
    the text after `####` on its line; the answer after a phrase such as "the answer is", "答案：" or "故选"; else the
    last number.

    Of several `####`, the first one followed by a number counts, as in GSM8K's own evaluation: text after the answer,
    such as a next question, does not change it. If no `####` has a number, the last one counts, since earlier ones may
    be headings. A line `#### number` after the last box wins over it.

    Args:
        text: a reply, or any text. A box may contain braces (`\boxed{\frac{1}{2}}`). Empty and unclosed boxes do not
            count. A number may have a sign, thousands separated by commas, decimals, `$` or `%`, or be a fraction
            (`3/4`, `1 3/4`). A period that ends the sentence is left out.

    Returns:
        The answer without surrounding space, or None: no answer, or a thought that never ends.

    Example:
        >>> extract_answer("48/2 = 24 clips in May, so 48 + 24 = 72 clips in all.")
        '72'
        >>> extract_answer("First I had \\boxed{3}. It is \\boxed{\\frac{1}{2}}, I am 90% sure.")
        '\\frac{1}{2}'
        >>> extract_answer("They cost 5 times $250.10.\n#### 1,250.50")
        '1,250.50'
        >>> extract_answer("#### Add them\n5 + 7 = 12\n#### 12\n\nQuestion: Tom has 99 apples.\n#### 99")
        '12'
        >>> extract_answer("The answer is 12 apples, since we used 2 numbers.")
        '12 apples'
    """
    reply = split_thought(text)
    found = None if reply.unclosed else find_answer(reply.text)
    return None if found is None else found.answer


@functools.lru_cache(REMEMBERED)
def find_answer(text: str) -> Found | None:
    """Return the final answer in a text without a thought; the rules are those of `extract_answer`."""
    plain = same_length(text)
    found = find_marked(plain)
    question = NEXT_QUESTION.search(plain)
    if question is not None:
        before = plain[: question.start()]
        found = find_marked(before) or find_phrase(before) or found
    found = found or find_phrase(plain) or find_heading(plain) or find_last_number(plain)
    return None if found is None else written(found, text)


def find_marked(text: str) -> Found | None:
    """Find a box, an answer in tags, or a `####`: with a number after it, or with any text in the last line."""
    box, hashes = find_box(text), find_hashes(text)
    starts_line = hashes is not None and text[: hashes.start].rpartition("\n")[2].strip() == ""
    if box is not None and not (hashes is not None and starts_line and hashes.start > box.end):
        return box
    return hashes or box or find_tag(text)


def written(found: Found, text: str) -> Found:
    """Return the answer with the characters of the text, which stands at the same place there."""
    if text.isascii() or found.kind == "box":
        return found
    place = text.find(found.answer, found.start)
    if place >= 0:
        return found
    return dataclasses.replace(found, answer=original(found.answer, text, found.start, found.end) or found.answer)


def original(answer: str, text: str, start: int, end: int) -> str:
    """Return the part of `text[start:end]` whose plain characters are `answer`."""
    place = same_length(text[start:end]).find(answer)
    return text[start + place : start + place + len(answer)].strip() if place >= 0 else ""


def begins_with_number(text: str) -> bool:
    """Return whether a text begins with a number that can be an answer, unlike the heading `1. Add them`."""
    return LEADING_NUMBER.match(same_length(text)) is not None


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` that is closed and not empty, in one pass; `\{` does not count."""
    found = find_box(text)
    return None if found is None else found.answer


def find_box(text: str) -> Found | None:
    r"""Find the last box. Boxes with only commas or "and" between them are one list."""
    opened: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, int]] = []  # start of the mark, start and end of the content
    for token in BRACES.finditer(text):
        if token[1] or token[0] == "{":
            opened.append((token.start(), token.end(), bool(token[1])))
        elif token[0] == "}" and opened:
            mark, start, is_box = opened.pop()
            if is_box and text[start : token.start()].strip():
                boxes.append((mark, start, token.start()))
    if not boxes:
        return None
    boxes.sort(key=lambda box: box[1])
    answers = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[2] + 1 : answers[0][0]] if box[2] < answers[0][0] else "in it"
        if not between.strip() or len(between) > 12 or not BETWEEN_BOXES.fullmatch(between):
            break
        answers.insert(0, box)
    answer = ", ".join(text[start:end].strip() for _, start, end in answers)
    return Found(answer, answers[0][0], answers[-1][2] + 1, "box")


def find_tag(text: str) -> Found | None:
    """Find the last `<answer>...</answer>`."""
    tags = list(ANSWER_TAG.finditer(text))
    if not tags:
        return None
    found = tags[-1]
    inner = last_box(found[1]) or found[1].strip()
    return Found(inner, found.start(), found.end(), "tag") if inner else None


def find_hashes(text: str) -> Found | None:
    """Find the first `####` with a number after it, else the last one if it is in the last line."""
    last = None
    for last in find_headings(text):
        if LEADING_NUMBER.match(last.answer):
            return last
    return last if last is not None and not text[last.end :].strip() else None


def find_heading(text: str) -> Found | None:
    """Find the last `####`, whatever follows."""
    last = collections.deque(find_headings(text), 1)
    return last.pop() if last else None


def find_headings(text: str) -> Iterator[Found]:
    """Yield every `####` with a text after it."""
    for match in HASHES.finditer(text):
        yield Found(match[1].strip(), match.start(), match.end(), "hashes")


def find_phrase(text: str) -> Found | None:
    """Find the answer after the last phrase that announces a number, a choice or a formula, else a short text."""
    found = list(phrases(text))
    firm = [one for one in found if is_firm(one.answer)]
    short = [one for one in found if len(one.answer.split()) <= SHORT_ANSWER_WORDS and len(one.answer) <= 60]
    if firm and short and short[-1].start > firm[-1].start and NUMBER_IN_TEXT.search(short[-1].answer) is None:
        later = short[-1]
        return later if is_choice(later.answer) else firm[-1]
    return firm[-1] if firm else short[-1] if short else None


def phrases(text: str) -> Iterator[Found]:
    """Yield the answers after all phrases, in order."""
    places = [(match.start(), match) for match in PHRASE.finditer(text)]
    chosen = [(match.start(), match) for match in CHOSEN.finditer(text)]
    for _, match in sorted(places + chosen, key=lambda place: place[0]):
        if match.re is CHOSEN:
            letters = match["letters"] or match["correct"] or match["last"]
            yield Found(letters.strip("()[]"), match.start(), match.end(), "phrase")
            continue
        announced = bool(match["verb"] or match["mark"])
        if match["line"] and not (announced and match["mark"]) and not HEADING.search(text[: match.end("mark")]):
            continue
        sentence = first_sentence(text[match.end() : match.end() + LONGEST_SENTENCE])
        if not announced and not match["line"] and not re.match(rf"[$]?{SIGNED}|[(]?[A-J]\b", sentence):
            continue
        answer = leading_answer(sentence)
        if answer:
            whole = sentence.strip(" *_$\"'")
            yield Found(answer, match.start(), match.end() + len(sentence), "phrase", whole)


def is_choice(text: str) -> bool:
    """Return whether a text is the letter of a choice."""
    return re.fullmatch(r"[(\[]?[A-J][)\]]?", text) is not None


def is_firm(answer: str) -> bool:
    """Return whether an answer is a number, a quantity, a choice or a formula, and not prose."""
    return (
        parse_quantity(answer) is not None
        or is_choice(answer)
        or (may_be_formula(answer) and has_symbols(answer))
        or (re.search(r"[0-9]", answer) is not None)
    )


def first_sentence(text: str) -> str:
    """Return the text up to the end of its first sentence or line; dollar signs keep a formula whole."""
    text = text.lstrip(" \t*_")
    math = re.match(r"\$\$?[^$\n]+\$?\$|\\\(.+?\\\)|\\\[.+?\\\]", text)
    start = math.end() if math is not None else 0
    end = SENTENCE_END.search(text, start)
    return text[: end.start()] if end is not None else text


def leading_answer(sentence: str) -> str:
    """Return the answer at the beginning of a sentence, without the reasons and remarks after it."""
    sentence = COPULA.sub("", sentence.strip().strip("*_").strip())
    sentence = REASON_ZH.sub("", sentence)
    if (date := DATE_FIRST.match(sentence)) is not None:
        return date[0]
    math = re.match(r"\$\$?([^$]+)\$?\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence)
    if math is not None and not re.match(r"\s*[0-9=+*/<>^-]", sentence[math.end() :]):
        return next(part for part in math.groups() if part is not None).strip().rstrip(".")
    choice = re.match(
        r"[(\[]([A-J])[)\]]|([A-J])(?=\s+(?:because|since)\b|[.):,]?\s*$|[.):,]\s|[^\x00-\x7f])", sentence
    )
    if choice is not None:
        return choice[1] or choice[2]
    items = leading_items(sentence)
    if items:
        return items
    if NAME_AND_NUMBER.fullmatch(sentence):
        return sentence
    clause = CLAUSE_END.split(sentence, maxsplit=1)[0].strip(" *_\"'$")
    if may_be_formula(clause) and has_symbols(clause) and not re.search(r"[^\W\d_]{3,} ", clause):
        return clause
    numbers = [match[0] for match in NUMBER_IN_TEXT.finditer(sentence)]
    first = NUMBER_IN_TEXT.search(sentence)
    if first is not None and len(numbers) == 1 and is_denied(sentence, first):
        return clause
    if numbers and "=" not in clause:
        return numbers[-1].strip()
    if numbers:
        last = clause.rpartition("=")[2].strip()
        return last if parse_quantity(last) is not None else clause
    return clause.strip(" *_\"'.$")


def leading_items(sentence: str) -> str:
    """Return the quantity at the beginning of a sentence, or the list of quantities; empty if there is none."""
    group = re.match(r"(?:\\left *)?[(\[{][^()\[\]{}]*[0-9][^()\[\]{}]*[)\]}]", sentence)
    if group is not None and "," in group[0]:
        return group[0]
    start = end = 0
    for separator in [*ITEM_END.finditer(sentence), None]:
        piece = sentence[start : len(sentence) if separator is None else separator.start()]
        item = quantity_at(piece)
        if not item:
            break
        end = start + len(piece) - len(piece.lstrip()) + len(item)
        if separator is None or separator[0].endswith("(") or len(item) < len(piece.strip()):
            break
        start = separator.end()
    return sentence[:end].strip(" *_\"'")


def quantity_at(text: str) -> str:
    """Return the beginning of a text that is a quantity, up to a word that goes on with the sentence."""
    text = text.strip(" *_")
    for cut in [*(match.start() for match in STOP.finditer(text)), len(text)]:
        start = text[:cut].rstrip(" *_")
        if re.search("[0-9]", start) and parse_quantity(start) is not None and not OPERATOR.match(text[cut:]):
            return start
    amount = LEADING_AMOUNT.match(text)
    if amount is None:
        return ""
    rest = text[amount.end() :]
    return "" if GOES_ON.match(rest) is not None and PROSE.match(rest) is None else amount[0]


def find_last_number(text: str) -> Found | None:
    """Find a bold answer in the last line, else the last number, else the last number in words."""
    text = without_reason(without_note(without_remark(text)))
    bold = find_bold(text)
    if bold is not None:
        return bold
    numbers = collections.deque(TIME_OR_NUMBER.finditer(text), MOST_SKIPPED)
    if not numbers:
        words = collections.deque(WORDS_IN_TEXT.finditer(text), 1)
        return Found(words[0][0], words[0].start(), words[0].end(), "number") if words else None
    last = numbers.pop()
    if numbers and REFERENCE.search(before(text, last)):
        last = numbers.pop()
    while NOT.search(before(text, last)) is not None:
        if not numbers:
            return None
        last = numbers.pop()
    return None if is_denied(text, last) else find_around(text, last)


def find_around(text: str, number: re.Match[str]) -> Found:
    """Find the list, point or formula that a number is a part of; else the number and its unit."""
    start = max(number.start() - LONGEST_REMARK, 0)
    items = LIST_AT_END.search(text, max(len(text) - LONGEST_REMARK, 0))
    if items is not None:
        return Found(items["items"].strip(), items.start(), items.end(), "number")
    for point in TUPLE.finditer(text, start):
        if point.start() < number.start() < point.end() and not re.search(r"[^\W\d_]{3,} |=", point[0]):
            return Found(point[0], point.start(), point.end(), "number")
    symbol = SYMBOL_AFTER.match(text, number.end())
    if symbol is not None:
        return Found(number[0].strip() + symbol[0], number.start(), symbol.end(), "number")
    formulas = find_formulas(text, number)
    if formulas is not None:
        return formulas
    with_unit = quantity_at(text[number.start() : number.end() + LONGEST_UNIT])
    quantity = parse_quantity(with_unit)
    has_unit = quantity is not None and quantity.unit is not None and quantity.unit.dimension != ""
    return Found(with_unit if has_unit else number[0].strip(), number.start(), number.end() + LONGEST_UNIT, "number")


def without_remark(text: str) -> str:
    """Return a text without the remark in parentheses at its end, if a number stands before it."""
    remark = REMARK.search(text[-LONGEST_REMARK:])
    if remark is None:
        return text
    shorter = text[: max(len(text) - LONGEST_REMARK, 0) + remark.start()]
    return shorter if NUMBER_IN_TEXT.search(shorter[-LONGEST_SENTENCE:]) else text


def without_note(text: str) -> str:
    """Return a text without a note in its last line, if a number stands before it."""
    start = text.rstrip().rfind("\n")
    if start < 0 or NOTE.match(text, start) is None:
        return text
    return text[:start] if NUMBER_IN_TEXT.search(text[max(start - LONGEST_SENTENCE, 0) : start]) is not None else text


def without_reason(text: str) -> str:
    """Return a text without the reason at the end of its last sentence, if a number stands before it there."""
    start = max(len(text) - LONGEST_REMARK, 0)
    reason = REASON.search(text, start) or REASON_ZH.search(text, start)
    if reason is None:
        return text
    sentence = SENTENCE_END.split(text[start : reason.start()])[-1]
    return text[: reason.start()] if NUMBER_IN_TEXT.search(sentence) is not None else text


def before(text: str, number: re.Match[str]) -> str:
    """Return the few characters before a number."""
    return text[max(number.start() - 30, 0) : number.start()]


def is_denied(text: str, number: re.Match[str]) -> bool:
    """Return whether a text says that the answer is not this number: `not 5`, `less than 5`, `between 4 and 5`."""
    words = before(text, number)
    return any(form.search(words) is not None for form in (NOT, COMPARED, RANGE))


def find_bold(text: str) -> Found | None:
    """Find the only bold quantity of the last line, if nothing is worked out after it; else a bold name at its end."""
    start = text.rstrip().rfind("\n") + 1
    bold = [match for match in BOLD.finditer(text, start) if parse_quantity(match[1].strip(" .:$")) is not None]
    if len(bold) == 1 and WORKED_OUT.search(text, bold[0].end()) is None and not NOT.search(before(text, bold[0])):
        return Found(bold[0][1].strip(), bold[0].start(), bold[0].end(), "number")
    name = BOLD_NAME.search(text, start)
    return None if name is None else Found(name[1].strip(), name.start(), name.end(), "phrase")


def find_formulas(text: str, number: re.Match[str]) -> Found | None:
    """Find the formula around a number, and those before it that are joined to it: `$x = 2$ and $x = 3$`."""
    found: list[re.Match[str]] = []
    for math in MATH.finditer(text, max(number.start() - LONGEST_MATH, 0)):
        if math.start() > number.start():
            break
        joined = found and BETWEEN_BOXES.fullmatch(text[found[-1].end() : math.start()])
        found = [*found, math] if joined else [math]
    if not found or found[-1].end() <= number.start():
        return None
    formulas = [next(part for part in math.groups() if part is not None).strip() for math in found]
    names = {formula.partition("=")[0].strip() for formula in formulas if "=" in formula}
    last = formulas[-1].rpartition("=")[2].strip()
    is_list = len(formulas) > 1 and len(names) == 1 and all("=" in formula for formula in formulas)
    answer = ", ".join(formulas) if is_list else last or number[0]
    return Found(answer, found[0 if is_list else -1].start(), found[-1].end(), "number")
