"""Units of quantities: their names in several languages, and what they are worth."""

from __future__ import annotations

import dataclasses
import functools
import re
from fractions import Fraction

TABLE = """
length 1/1000 mm millimeter millimetre 毫米 мм
length 1/100 cm centimeter centimetre 厘米 公分 センチ см 센티미터
length 1/10 dm decimeter decimetre 分米 дм
length 1 m meter metre 米 メートル м метр метра метров 미터 metro metros Meter
length 1000 km kilometer kilometre 千米 公里 キロメートル км 킬로미터
length 254/10000 in inch inches
length 3048/10000 ft foot feet
length 9144/10000 yd yard yds
length 1609344/1000 mi mile
mass 1/1000 mg milligram 毫克 мг
mass 1 g gram gramme 克 グラム г грамм
mass 500 斤
mass 1000 kg kilogram kilo 千克 公斤 キログラム кг 킬로그램
mass 1000000 t ton tonne 吨 тонн
mass oz ounce
mass lb lbs
time 1 s sec secs second 秒 秒钟 с сек секунд 초
time 60 min mins minute 分钟 мин минут минуты 분 minuto minutos Minute Minuten
time 3600 h hr hrs hour 小时 时 時間 ч час часа часов 시간 hora horas heure heures Stunde Stunden
time 86400 d day 天 日 дней день дня 일 día días jour jours Tag Tage
time 604800 week wk wks 周 星期 недель
month month 月 个月 ヶ月 месяцев
year year yr yrs 年 лет год года 년 año años
volume 1 ml mL milliliter millilitre 毫升 мл
volume 1000 L l liter litre 升 л литр литров
money:dollar 1/100 cent ¢
money:dollar 1 dollar $ USD US$ buck 美元 долл долларов
money:euro 1 euro € EUR 欧元 евро
money:pound 1/100 pence
money:pound 1 £ GBP 英镑
money:yuan 1/10 角 毛
money:yuan 1 yuan 元 块 块钱 元钱 RMB CNY 人民币 圆
money:yuan-or-yen 1 ¥
money:yen 1 yen JPY 円 日元
money:rupee 1 rupee ₹ INR Rs
money:rouble 1 рублей рубль рубля руб ₽ RUB rouble ruble
money:won 1 won 원 ₩ KRW
power W watt 瓦
power kW kilowatt 千瓦
force N newton 牛顿
energy J joule 焦耳
voltage V volt 伏特
pressure Pa pascal
frequency Hz hertz
angle ° degree deg 度 градусов grados Grad
temperature:C °C celsius 摄氏度
temperature:F °F fahrenheit 华氏度
angle:rad radian rad
length/time 1 mps
length/time 1000/3600 kmh kph
length/time 1609344/3600000 mph
charge C coulomb 库仑
"""
"""A line: dimension, the unit's worth in it if it can be converted, and names. A plural s may follow a name."""
AREA_WORDS = re.compile(r"(?:square|sq\.?|平方) ?(.+)|(.+?) ?(?:\^ ?\{?2\}?|squared)")
VOLUME_WORDS = re.compile(r"(?:cubic|cu\.?|立方) ?(.+)|(.+?) ?(?:\^ ?\{?3\}?|cubed)")
PER = re.compile(r"(.+?) ?(?:/| per |每)(?: ?an? )? ?(.+)")
NOUN = re.compile(r"[^\W\d_]{3,}(?:['-][^\W\d_]+)*|(?:[^\W\d_a-zA-Z]|[\u0900-\u0e7f])+|per|a|an|/")
"""Vowel signs of Hindi, Tamil or Thai are no letters to Python."""
CJK = re.compile(r"[\u2e80-\u9fff\u3040-\u30ff\uac00-\ud7af]{1,8}")
NOT_CJK = re.compile("[和或与及比至到又加减乘除余倍分点第多约零一二三四五六七八九十百千万亿]")
"""Characters that go on with the number, or with another one: 12和13, 3倍."""
NOT_NOUNS_TEXT = """
or and to of plus minus times than from over out through with without by divided multiplied if when but because since so
which that is are was were squared cubed factorial choose mod point hundred thousand million billion trillion half
percent per pi tau phi theta alpha beta gamma delta lambda sigma omega sin cos tan log sqrt exp max min inf infinity
не или и y o und oder et ou
"""
NOT_NOUNS = frozenset(NOT_NOUNS_TEXT.split())
QUALIFIER = re.compile(
    r" (?:old|long|tall|high|wide|deep|away|ago|each|apiece|left|more|less|remaining|altogether|together|(?:in )?total|"
    r"in all|per person)$"
)
"""What may follow a unit without changing it."""
MOST_WORDS = 5
ATTACHED = frozenset(["m", "g", "s", "h", "L", "l", "t", "V", "W", "N", "J"])
"""Units of one letter that may stand right after the number; others there are variables: `2x`."""
PLURAL_EXCEPTIONS = {"people": "person", "children": "child", "men": "man", "women": "woman", "feet": "foot"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit, or the noun that is counted.

    Attributes:
        dimension: what it measures; for a noun, "".
        worth: its worth in the dimension's base unit; None if it is not converted.
        name: the name of a unit that is not converted; the words of a noun, in the singular.
    """

    dimension: str
    worth: Fraction | None
    name: str


@functools.cache
def known_units() -> dict[str, Unit]:
    """Return the units of `TABLE` by name."""
    units = {}
    for line in TABLE.strip().split("\n"):
        dimension, *names = line.split()
        worth = Fraction(names.pop(0)) if re.fullmatch("[0-9/]+", names[0]) else None
        unit = Unit(dimension, worth, "" if worth else names[0])
        for name in names:
            units[name] = unit
            if len(name) > 2 and name.isascii() and name.islower():
                units[f"{name}s"] = unit
    return units


def parse_unit(text: str, *, attached: bool = False) -> Unit | None:
    """Return the unit or the counted noun in the text after a number; None for any other text.

    Args:
        text: without the number.
        attached: whether no space stands between the number and the text, as in `2x`.
    """
    text = QUALIFIER.sub("", " ".join(text.split()).strip(" ."))
    known = known_units()
    for name in (text, text.lower()):
        if name in known and not (attached and len(name) == 1 and name.isascii() and name.isalpha()):
            return known[name]
    if text in ATTACHED:
        return known[text]
    if re.fullmatch(r"degrees? ?(?:C|celsius|centigrade)", text, re.IGNORECASE):
        return known["°C"]
    if re.fullmatch(r"degrees? ?(?:F|fahrenheit)", text, re.IGNORECASE):
        return known["°F"]
    return power_of_unit(text) or rate(text) or parse_noun(text, attached)


def power_of_unit(text: str) -> Unit | None:
    """Return the unit of an area, of a volume, or of time squared; None for any other text."""
    for pattern, power in ((AREA_WORDS, 2), (VOLUME_WORDS, 3)):
        if (match := pattern.fullmatch(text)) is not None:
            name = match[1] or match[2]
            base = known_units().get(name) or known_units().get(name.lower())
            if base is not None and base.dimension in ("length", "time") and base.worth is not None:
                return Unit(f"{base.dimension}^{power}", base.worth**power, "")
            if name.startswith("unit"):
                return Unit("", None, "unit")
    return None


def rate(text: str) -> Unit | None:
    """Return the unit of `miles per hour`, `m/s^2`, `元/千克` or `千米每小时`; None for any other text."""
    match = PER.fullmatch(text)
    if match is None:
        return None
    top, bottom = (known_units().get(name) or power_of_unit(name) for name in match.groups())
    if top is None or bottom is None or top.worth is None or bottom.worth is None:
        return None
    return Unit(f"{top.dimension}/{bottom.dimension}", top.worth / bottom.worth, "")


def parse_noun(text: str, attached: bool) -> Unit | None:
    """Return a counted noun of a few words, or None."""
    if CJK.fullmatch(text):
        return None if NOT_CJK.search(text) else Unit("", None, text)
    words = text.split()
    if not words or len(words) > MOST_WORDS or (attached and text.isascii()):
        return None
    if not all(NOUN.fullmatch(word) for word in words):
        return None
    if words[0].lower() in NOT_NOUNS or any(word.lower() in NOT_NOUNS - {"of", "per"} for word in words):
        return None
    return Unit("", None, " ".join(singular(word.lower()) for word in words))


def singular(word: str) -> str:
    """Return an English noun in the singular, near enough to compare two of them."""
    if word in PLURAL_EXCEPTIONS:
        return PLURAL_EXCEPTIONS[word]
    for ending, single in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + single
    return word.removesuffix("s") if not word.endswith("ss") else word


def units_agree(left: Unit, right: Unit) -> bool:
    """Return whether two units name the same thing, apart from their worth."""
    if left == right:
        return True
    if left.dimension.partition(":")[0] in ("angle", "temperature") and "angle" in (left.dimension, right.dimension):
        return right.dimension.partition(":")[0] in ("angle", "temperature") and "angle:rad" not in (
            left.dimension,
            right.dimension,
        )
    if "money:yuan-or-yen" in (left.dimension, right.dimension):
        return {left.dimension, right.dimension} <= {"money:yuan-or-yen", "money:yuan", "money:yen"}
    if "pound" in (left.name, right.name):  # of money, or of weight
        return {left.dimension, right.dimension} <= {"", "mass", "money:pound"} and {left.name, right.name} <= {
            *("", "pound", "lb"),
        }
    if left.dimension or right.dimension:
        return left.dimension == right.dimension and left.worth is not None and right.worth is not None
    if CJK.fullmatch(left.name) and CJK.fullmatch(right.name):
        return left.name in right.name or right.name in left.name
    one, other = set(left.name.split()), set(right.name.split())
    return one <= other or other <= one
