"""A procedural teacher: an endless stream of column sums and short word problems with exact rationales and answers.

The rationale works digit by digit, one small sum a line, so every line follows from the lines before it. For example,
`47+85`, then minus 19:

    47+85          the sum to compute
    7+5=12         ones; the 1 is carried
    4+8+1=13       tens, and the carry
    =132           read off from the last line up
    132-19
    12-9=3         2 is less than 9: it borrows 10
    3-1-1=1        less the borrowed one
    1-0=1
    =113

A product by one digit carries the same way (`3*14`: `3*4=12`, `3*1+1=4`, `=42`). A division by one digit writes each
step as the dividend, its multiple and the remainder (`84/6`: `8=6*1+2`, `24=6*4+0`, `=14`).

In Chinese the same sums are

    先算47+85：
    个位7+5=12，进1
    十位4+8+1=13
    得132。
    再算132-19：
    个位12-9=3，借1
    十位3-1-1=1
    百位1-0=1
    得113。

The steps of `84÷6` are `8÷6=1余2` and `24÷6=4余0`. Answers of stories have their unit (`113个`, `12元`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
import random
import typing
from collections.abc import Callable, Iterator

from cotgrpo.data.triples import Triple, write_triples
from cotgrpo.teachers.procedural_words import ENGLISH, WORDS, LanguageName, Words

__all__ = ["KINDS", "ProceduralTeacher", "write_triples"]

PLACES = (
    *("个", "十", "百", "千", "万", "十万", "百万", "千万", "亿", "十亿", "百亿", "千亿", "万亿", "十万亿", "百万亿"),
    *("千万亿", "亿亿"),
)
"""Names of the places of a number in Chinese, ones first."""

DRAWS_WITHOUT_NEWS = 10_000
"""Consecutive repetitions before `draw` gives up."""
DRAWS_WITHOUT_SUM = 100_000
"""Consecutive draws from the other part before the stream gives up: a hundred times the smallest fraction's need."""
SMALLEST_FRACTION = 1e-3
MOST_DIGITS = 15
"""The resolution of `random()`: a float has 53 bits."""


class Step(typing.NamedTuple):
    """The step of one digit.

    Attributes:
        terms: what is added, subtracted, multiplied (the third term is then added) or divided.
        result: the result of the step.
        moved: the carry or loan of the next digit, or the remainder of a division.
    """

    terms: tuple[int, ...]
    result: int
    moved: int


@dataclasses.dataclass(frozen=True)
class Operation:
    """`left symbol right`, with whole numbers of zero or more.

    `symbol` is one of `+ - * /`. `*` has one digit on the left, and `/` one digit on the right.
    """

    left: int
    symbol: str
    right: int

    def __str__(self) -> str:
        return f"{self.left}{self.symbol}{self.right}"

    @property
    def result(self) -> int:
        apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}[self.symbol]
        return apply(self.left, self.right)

    @property
    def steps(self) -> list[Step]:
        """The steps digit by digit."""
        steps = {"+": addition, "-": subtraction, "*": product, "/": division}[self.symbol]
        return steps(self.left, self.right)

    def lines(self) -> list[str]:
        """Return the operation, its steps digit by digit, and its result."""
        steps = [
            f"{step.terms[0]}={step.terms[1]}*{step.result}+{step.moved}"
            if self.symbol == "/"
            else f"{expression(self.symbol, step.terms)}={step.result}"
            for step in self.steps
        ]
        return [str(self), *steps, f"={self.result}"]

    def chinese_lines(self, first: bool) -> list[str]:
        """Return the same in Chinese; `first` tells the first operation of a problem from the others."""
        steps = []
        for place, step in enumerate(self.steps):
            if self.symbol == "/":
                steps.append(f"{step.terms[0]}÷{step.terms[1]}={step.result}余{step.moved}")
                continue
            moved = f"，{'借' if self.symbol == '-' else '进'}{step.moved}"
            is_last = place == len(self.steps) - 1
            line = f"{place_name(place)}位{expression(self.symbol, step.terms)}={step.result}".replace("*", "×")
            steps.append(line + (moved if step.moved and not is_last else ""))
        sums = str(self).replace("*", "×").replace("/", "÷")
        return [f"{'先' if first else '再'}算{sums}：", *steps, f"得{self.result}。"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the operations that answer it, in order; the last result is the answer.

    Attributes:
        question: the question.
        operations: the operations.
        language: the language of the rationale.
        unit: the unit of the answer, or "".
    """

    question: str
    operations: tuple[Operation, ...]
    language: LanguageName = "en"
    unit: str = ""

    @property
    def rationale(self) -> str:
        if self.language == "zh":
            lines = [operation.chinese_lines(number == 0) for number, operation in enumerate(self.operations)]
        else:
            lines = [operation.lines() for operation in self.operations]
        return "\n".join(itertools.chain.from_iterable(lines))

    @property
    def answer(self) -> str:
        return f"{self.operations[-1].result}{self.unit}"

    @property
    def arithmetic(self) -> str:
        """The sums alone, without the story."""
        return " ".join(map(str, self.operations))


class Draws:
    """Random choices that are the same on every platform and Python version.

    `random.Random` guarantees that for `random()` alone.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """Draw a whole number in [low, high]."""
        return low + int(self.random() * (high - low + 1))

    def of_digits(self, digits: int) -> int:
        """Draw a whole number of exactly this many digits."""
        return self.between(10 ** (digits - 1), 10**digits - 1)

    def choice(self, options: tuple[str, ...]) -> str:
        return options[self.between(0, len(options) - 1)]

    def two(self, options: tuple[str, ...]) -> tuple[str, str]:
        """Draw two different options."""
        first = self.between(0, len(options) - 1)
        second = (first + self.between(1, len(options) - 1)) % len(options)
        return options[first], options[second]


def column_addition(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make a sum: `What is 47+85+36?`."""
    terms = [draws.of_digits(digits) for _ in range(steps + 1)]
    question = words.sums.format(sums="+".join(map(str, terms)))
    return Problem(question, chain(terms[0], [("+", term) for term in terms[1:]]))


def column_subtraction(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make a difference that is never below zero: `What is 132-19-45?`."""
    terms = [draws.of_digits(digits) for _ in range(steps)]
    start = sum(terms) + draws.between(0, 10**digits - 1)
    question = words.sums.format(sums="-".join(map(str, [start, *terms])))
    return Problem(question, chain(start, [("-", term) for term in terms]))


def gains_and_losses(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make a chain of gains and losses.

    `Ana has 47 figs. Ana finds 85 figs. Ana sells 19 figs. How many figs has Ana now?`
    """
    name, thing = draws.choice(words.names), draws.choice(words.things)
    unit = words.unit(thing)
    total = start = draws.of_digits(digits)
    changes: list[tuple[str, int]] = []
    story = [words.holding.format(name=name, count=start, unit=unit, thing=thing)]
    for _ in range(steps):
        amount = draws.of_digits(digits)
        loses = draws.between(0, 1) == 1 and amount <= total
        changes.append(("-" if loses else "+", amount))
        total += -amount if loses else amount
        verb = draws.choice(words.losses if loses else words.gains)
        story.append(words.change.format(name=name, verb=verb, count=amount, unit=unit, thing=thing))
    question = words.between.join(story) + words.now.format(name=name, unit=unit, thing=thing)
    return Problem(question, chain(start, changes), unit=unit)


def change_from_purchase(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make a purchase: `Ana buys 3 pens at 14 coins each and pays 60 coins. How many coins are left?`."""
    name, thing = draws.choice(words.names), draws.choice(words.things)
    count, price = draws.between(2, 9), draws.of_digits(digits)
    cost = Operation(count, "*", price)
    paid = cost.result + draws.between(0, 10**digits - 1)
    question = words.purchase.format(
        name=name, count=count, unit=words.unit(thing), thing=thing, price=price, paid=paid
    )
    return Problem(question, (cost, Operation(paid, "-", cost.result)), unit=words.money)


def comparison(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make a comparison: `Ana has 23 figs. Tom has 18 figs more than Ana. How many figs do both have?`."""
    (name, other), thing = draws.two(words.names), draws.choice(words.things)
    unit = words.unit(thing)
    first, difference = draws.of_digits(digits), draws.of_digits(digits)
    fewer = draws.between(0, 1) == 1 and difference < first
    second = Operation(first, "-" if fewer else "+", difference)
    question = words.comparison.format(
        name=name,
        other=other,
        count=first,
        unit=unit,
        thing=thing,
        difference=difference,
        relation=words.relations[fewer],
    )
    return Problem(question, (second, Operation(first, "+", second.result)), unit=unit)


def equal_shares(draws: Draws, digits: int, steps: int, words: Words = ENGLISH) -> Problem:
    """Make equal shares.

    `Ana has 38 figs and Tom has 46 figs. They fill 4 equal boxes. How many figs are in a box?`
    """
    (name, other), thing = draws.two(words.names), draws.choice(words.things)
    unit = words.unit(thing)
    first, second, boxes = draws.of_digits(digits), draws.of_digits(digits), draws.between(2, 9)
    second -= (first + second) % boxes
    second += boxes if second < 10 ** (digits - 1) else 0
    total = Operation(first, "+", second)
    question = words.shares.format(
        name=name, other=other, first=first, second=second, unit=unit, thing=thing, boxes=boxes
    )
    return Problem(question, (total, Operation(total.result, "/", boxes)), unit=unit)


KINDS: dict[str, Callable[[Draws, int, int, Words], Problem]] = {
    "column_addition": column_addition,
    "column_subtraction": column_subtraction,
    "gains_and_losses": gains_and_losses,
    "change_from_purchase": change_from_purchase,
    "comparison": comparison,
    "equal_shares": equal_shares,
}


def chain(start: int, changes: list[tuple[str, int]]) -> tuple[Operation, ...]:
    """Chain operations: each has the result of the one before on its left."""
    operations: list[Operation] = []
    for symbol, amount in changes:
        operations.append(Operation(operations[-1].result if operations else start, symbol, amount))
    return tuple(operations)


def columns(left: int, right: int) -> Iterator[tuple[int, int]]:
    """Yield the digits of two numbers in pairs, ones first, with zeros in front of the shorter one."""
    return itertools.zip_longest(map(int, reversed(str(left))), map(int, reversed(str(right))), fillvalue=0)


def addition(left: int, right: int) -> list[Step]:
    steps, carry = [], 0
    for a, b in columns(left, right):
        total = a + b + carry
        steps.append(Step((a, b, carry) if carry else (a, b), total, total // 10))
        carry = total // 10
    return steps


def subtraction(left: int, right: int) -> list[Step]:
    steps, borrow = [], 0
    for a, b in columns(left, right):
        rest = a - b - borrow
        owed = int(rest < 0)
        terms = (a + 10 * owed, b)
        steps.append(Step((*terms, borrow) if borrow else terms, rest + 10 * owed, owed))
        borrow = owed
    return steps


def product(digit: int, number: int) -> list[Step]:
    steps, carry = [], 0
    for b in map(int, reversed(str(number))):
        total = digit * b + carry
        steps.append(Step((digit, b, carry) if carry else (digit, b), total, total // 10))
        carry = total // 10
    return steps


def division(number: int, digit: int) -> list[Step]:
    steps: list[Step] = []
    rest = 0
    for a in map(int, str(number)):
        dividend = 10 * rest + a
        quotient, rest = divmod(dividend, digit)
        if quotient or steps:
            steps.append(Step((dividend, digit), quotient, rest))
    return steps


def expression(symbol: str, terms: tuple[int, ...]) -> str:
    """Return the terms of a step with the symbol between: `7+5+1`, `12-9-1` or `3*4+1`."""
    first, second, *moved = terms
    return f"{first}{symbol}{second}" + "".join(f"{'-' if symbol == '-' else '+'}{term}" for term in moved)


def place_name(place: int) -> str:
    """Return the name in Chinese of a place, 0 for the ones: 个, 十, 百."""
    return PLACES[place] if place < len(PLACES) else f"第{place + 1}"


@dataclasses.dataclass(frozen=True)
class ProceduralTeacher:
    """An endless stream of triples; the same arguments give the same triples everywhere, from the start each time.

    A hash of the sums divides them between the training and the held-out part, for every seed. A sum of the held-out
    part never comes in the training part, not even in another story.

    Attributes:
        seed: random seed, at least 0.
        kinds: which of `KINDS` to draw, with equal probability; None: all.
        digits: digits of the drawn numbers, 1 to 15.
        steps: operations of `column_addition`, `column_subtraction` and `gains_and_losses`, at least 1. The other kinds
            have two.
        held_out: True gives the held-out part.
        held_out_fraction: share of the held-out sums, in [0.001, 0.999]. Both parts need the same
            value, or they overlap.
        language: "en" for English, "zh" for Chinese. Both have the same sums, in the same order and the same parts.

    Raises:
        ValueError: an argument outside its range, or an unknown kind or language; while iterating, a part without
            any sum (numbers of one digit have few).

    Example:
        >>> teacher = ProceduralTeacher(seed=3, kinds=("column_addition",), steps=1)
        >>> triple = next(iter(teacher))
        >>> print(triple.question, triple.rationale.split(), triple.answer)
        What is 58+43? ['58+43', '8+3=11', '5+4+1=10', '=101'] 101
    """

    seed: int = 0
    kinds: tuple[str, ...] | None = None
    digits: int = 2
    steps: int = 2
    held_out: bool = False
    held_out_fraction: float = 0.1
    language: LanguageName = "en"

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("digits", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ProceduralTeacher.{name} must be at least {least}, got {getattr(self, name)}.")
        if self.digits > MOST_DIGITS:
            raise ValueError(f"ProceduralTeacher.digits must be at most {MOST_DIGITS}, got {self.digits}.")
        if not SMALLEST_FRACTION <= self.held_out_fraction <= 1 - SMALLEST_FRACTION:
            raise ValueError(
                f"ProceduralTeacher.held_out_fraction must be in [0.001, 0.999], got {self.held_out_fraction}."
            )
        unknown = [kind for kind in self.kinds or () if kind not in KINDS]
        if unknown or (self.kinds is not None and not self.kinds):
            raise ValueError(f"ProceduralTeacher.kinds must name some of {', '.join(KINDS)}, got {self.kinds}.")
        if self.language not in WORDS:
            raise ValueError(f"ProceduralTeacher.language must be one of {', '.join(WORDS)}, got {self.language!r}.")

    def __iter__(self) -> Iterator[Triple]:
        draws = Draws(self.seed)
        kinds = tuple(KINDS) if self.kinds is None else self.kinds
        misses = 0
        for index in itertools.count():
            kind = draws.choice(kinds)
            problem = KINDS[kind](draws, self.digits, self.steps, WORDS[self.language])
            problem = dataclasses.replace(problem, language=self.language)
            misses = 0 if is_held_out(problem, self.held_out_fraction) == self.held_out else misses + 1
            if misses > DRAWS_WITHOUT_SUM:
                raise ValueError(
                    f"No sum fell into the {'held-out' if self.held_out else 'training'} part (held_out_fraction "
                    f"{self.held_out_fraction}): raise digits ({self.digits}) or steps ({self.steps}), or change the "
                    "fraction."
                )
            if not misses:
                yield Triple(problem.question, problem.rationale, problem.answer, id=f"{kind}-{self.seed}-{index}")

    def draw(self, count: int) -> list[Triple]:
        """Return the first `count` triples of the stream with different questions.

        Raises:
            ValueError: the stream has fewer, or the rest is too rare to turn up.
        """
        found: dict[str, Triple] = {}
        repeated = 0
        for triple in self:
            if len(found) >= count:
                break
            repeated = repeated + 1 if triple.question in found else 0
            found.setdefault(triple.question, triple)
            if repeated > DRAWS_WITHOUT_NEWS:
                raise ValueError(
                    f"Only {len(found)} different questions were found, {count} are wanted: raise digits "
                    f"({self.digits}) or steps ({self.steps}), or allow more kinds ({self.kinds})."
                )
        return list(found.values())


def is_held_out(problem: Problem, fraction: float) -> bool:
    """Return whether a problem's sums are held out: the SHA-256 hash of their text decides."""
    digest = hashlib.sha256(problem.arithmetic.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
