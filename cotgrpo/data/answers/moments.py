"""Dates and times of the day, in the forms that English and Chinese texts write them."""

from __future__ import annotations

import re

MONTH_NAMES = "january february march april may june july august september october november december"
MONTHS = MONTH_NAMES.split()
MONTH = rf"(?P<month>(?:{'|'.join(MONTHS)})|(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.?)"
DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
YEAR = r"(?P<year>[0-9]{4})"
DATES = [
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"{MONTH} {DAY}(?:,? {YEAR})?",  # March 15th, 2024
        rf"{DAY}(?: of)? {MONTH}(?:,? {YEAR})?",  # 15 March 2024
        rf"{YEAR}([-/.])(?P<month>[0-9]{{1,2}})\2(?P<day>[0-9]{{1,2}})",  # 2024-03-15
        r"(?:(?P<year>[0-9]{4}) ?年 ?)?(?P<month>[0-9]{1,2}) ?月 ?(?P<day>[0-9]{1,2}) ?[日号]",
    )
]
NAME_OF_MONTH = rf"(?:{'|'.join(MONTHS)})"
DATE_FIRST = re.compile(
    rf"(?:the )?(?:{NAME_OF_MONTH} [0-9]{{1,2}}(?:st|nd|rd|th)?|[0-9]{{1,2}}(?:st|nd|rd|th)?(?: of)? {NAME_OF_MONTH})"
    r"(?:,? [0-9]{4})?(?!\w)|(?:[0-9]{4}年)?[0-9]{1,2}月[0-9]{1,2}[日号]",
    re.IGNORECASE,
)
"""A date at the beginning of a sentence."""
CLOCK = re.compile(
    r"(?P<before>上午|早上|凌晨|下午|晚上|午前|午後|오전|오후)? ?(?P<hour>[0-9]{1,2})"
    r"(?P<rest>(?: ?: ?[0-9]{2}){0,2})(?: ?(?P<half>a\.?m\.?|p\.?m\.?))?",
    re.IGNORECASE,
)
CHINESE_CLOCK = re.compile("([0-9]{1,2}) ?[点點时時] ?([0-9]{2}) ?分?$")
AFTERNOON = ("p", "下", "晚", "午後", "오후")


def date(text: str) -> tuple[int, int, int | None] | None:
    """Return month, day and year (None without one); None if the text is no date.

    Example:
        >>> date("March 15th, 2024"), date("15 March"), date("2024-3-15"), date("15")
        ((3, 15, 2024), (3, 15, None), (3, 15, 2024), None)
    """
    text = text.removeprefix("the ").removeprefix("The ")
    for form in DATES:
        if (match := form.fullmatch(text)) is not None:
            name = match["month"].lower()
            month = int(name) if name.isdigit() else 1 + [long[:3] for long in MONTHS].index(name[:3])
            return month, int(match["day"]), int(match["year"]) if match["year"] else None
    return None


def clock_time(text: str) -> tuple[int, str, str] | None:
    """Return the hour, the minutes, and "am", "pm" or ""; None if the text is no time of the day.

    With "am" or "pm", the hour is that of 24 hours.

    Example:
        >>> clock_time("8:30 p.m."), clock_time("8:30"), clock_time("8 PM"), clock_time("8")
        ((20, ':30', 'pm'), (8, ':30', ''), (20, ':00', 'pm'), None)
    """
    match = CLOCK.fullmatch(CHINESE_CLOCK.sub(r"\1:\2", text))
    if match is None or not (match["rest"] or match["half"]):
        return None
    hour, half = int(match["hour"]), ""
    mark = (match["half"] or match["before"] or "").lower()
    if mark:
        half = "pm" if mark.startswith(AFTERNOON) else "am"
        hour = hour % 12 + (12 if half == "pm" else 0) if hour <= 12 else hour
    return hour, match["rest"].replace(" ", "") or ":00", half


def times_equal(left: tuple[int, str, str], right: tuple[int, str, str]) -> bool:
    """Return whether two times of the day are equal. With "am" or "pm" on one side, the other may have 12 hours."""
    if left[1] != right[1]:
        return False
    if bool(left[2]) == bool(right[2]):
        return left == right
    (marked, bare) = (left, right) if left[2] else (right, left)
    return bare[0] in (marked[0], marked[0] % 12 or 12)
