"""The words of the procedural teacher's problems, in English and in Chinese.

Both languages have as many names, things and verbs, so the same draws make the same sums in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

LanguageName = Literal["en", "zh"]


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of one language. Sentences are format strings.

    Attributes:
        names: of persons.
        things: what they have.
        gains: verbs of a gain.
        losses: verbs of a loss.
        relations: "more" and "less".
        units: measure word of each thing, which follows a number; a thing without one is missing.
        money: unit of an amount of money that follows the number of an answer, or "".
        sums: the question of a bare sum.
        holding: the start of a story.
        change: a gain or a loss.
        between: text between the parts of a story.
        now: the end of a story, with its question.
        purchase: a problem of prices.
        comparison: a problem of differences.
        shares: a problem of equal shares.
    """

    names: tuple[str, ...]
    things: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    relations: tuple[str, str]
    units: Mapping[str, str]
    money: str
    sums: str
    holding: str
    change: str
    between: str
    now: str
    purchase: str
    comparison: str
    shares: str

    def unit(self, thing: str) -> str:
        """Return the measure word of a thing, or ""."""
        return self.units.get(thing, "")


ENGLISH = Words(
    names=("Ana", "Ben", "Eva", "Ian", "Mia", "Tom"),
    things=("figs", "nuts", "pens", "cups", "eggs", "hats"),
    gains=("finds", "buys", "gets"),
    losses=("sells", "loses", "gives"),
    relations=("more", "less"),
    units={},
    money="",
    sums="What is {sums}?",
    holding="{name} has {count} {thing}.",
    change="{name} {verb} {count} {thing}.",
    between=" ",
    now=" How many {thing} has {name} now?",
    purchase="{name} buys {count} {thing} at {price} coins each and pays {paid} coins. How many coins are left?",
    comparison=(
        "{name} has {count} {thing}. {other} has {difference} {thing} {relation} than {name}. "
        "How many {thing} do both have?"
    ),
    shares=(
        "{name} has {first} {thing} and {other} has {second} {thing}. They fill {boxes} equal boxes. "
        "How many {thing} are in a box?"
    ),
)

CHINESE = Words(
    names=("小明", "小红", "小华", "小丽", "小军", "小芳"),
    things=("苹果", "铅笔", "故事书", "糖果", "鸡蛋", "气球"),
    gains=("又找到", "又买来", "又得到"),
    losses=("卖掉", "弄丢", "送出"),
    relations=("多", "少"),
    units={"苹果": "个", "铅笔": "支", "故事书": "本", "糖果": "颗", "鸡蛋": "个", "气球": "只"},
    money="元",
    sums="{sums}等于多少？",
    holding="{name}有{count}{unit}{thing}",
    change="{verb}{count}{unit}",
    between="，",
    now="。现在{name}有多少{unit}{thing}？",
    purchase="{name}买了{count}{unit}{thing}，每{unit}{price}元，付了{paid}元。应找回多少元？",
    comparison=(
        "{name}有{count}{unit}{thing}，{other}比{name}{relation}{difference}{unit}。两人一共有多少{unit}{thing}？"
    ),
    shares=(
        "{name}有{first}{unit}{thing}，{other}有{second}{unit}{thing}，平均装进{boxes}个盒子。"
        "每个盒子里有多少{unit}{thing}？"
    ),
)

WORDS: dict[str, Words] = {"en": ENGLISH, "zh": CHINESE}
