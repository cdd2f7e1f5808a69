"""Write the tables of docs/performance.md and NOTES.md from the JSON in benchmarks/results, so that all agree.

    python benchmarks/tables.py            write
    python benchmarks/tables.py --check    show the difference, and exit with 1 if there is one

In a page, a line `<!-- results/cpu/step_16m.json -->` precedes each table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotgrpo.bench.command import FORMATS
from cotgrpo.bench.parts import PARTS

HERE = Path(__file__).parent
PAGES = (HERE.parent / "docs" / "performance.md", HERE / "NOTES.md")
MARKED = re.compile(r"(<!-- (results/\S+\.json) -->\n)((?:\|[^\n]*\n)*)")
PEER_COLUMNS = (
    "peer",
    "median s",
    "tokens/s",
    "of the floor",
    "first step s",
    "peak GB",
    "cotgrpo in turn, s",
    "times as fast",
    "processor seconds",
)


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_part(result: dict[str, Any]) -> str:
    columns = PARTS[result["part"]].columns
    cells = [[FORMATS[kind](row[key]) for _, key, kind in columns] for row in result["rows"]]
    return markdown([title for title, _, _ in columns], cells)


def of_peers(result: dict[str, Any]) -> str:
    """Return a line for each contender; cotgrpo's is the one that ran with the first peer."""
    floor = result.get("model_flops", 0) / result["matrix_flops_per_sec"]
    cells = []
    for number, found in enumerate(result["pairs"]):
        if "times_as_fast" not in found:
            word = "missing" if "missing" in found else "failed"
            cells.append([found["peer"], f"{word}: {found[word]}", *[""] * (len(PEER_COLUMNS) - 2)])
            continue
        if not number:
            cells.append([*of_contender("**cotgrpo**", found["cotgrpo_row"], floor), "", "", ""])
        low, high = found["range"]
        ratio = f"{found['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
        beside = f"{found['cotgrpo_row']['median_s']:.3f}"
        cpu = f"{found['cpu_ratio']:.2f}" if found["cpu_ratio"] else "-"
        cells.append([*of_contender(found["peer"], found["peer_row"], floor), beside, ratio, cpu])
    return markdown(PEER_COLUMNS, cells)


def of_contender(name: str, row: dict[str, Any], floor: float) -> list[str]:
    share = f"{floor / row['median_s']:.2f}" if floor else "-"
    peak = (row["device_peak_bytes"] or row["peak_rss_bytes"]) / 1e9
    numbers = [
        f"{row['median_s']:.3f}",
        f"{row['tokens_per_sec']:,.0f}",
        share,
        f"{row['first_step_s']:.1f}",
        f"{peak:.2f}",
    ]
    return [name, *numbers]


def rewritten(page: str) -> str:
    """Return the page with every table from the results."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((HERE / match[2]).read_text(encoding="utf-8"))
        return match[1] + (of_peers(result) if "pairs" in result else of_part(result))

    return MARKED.sub(table, page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    wrong = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if check:
            print("\n".join(line for line in after.splitlines() if line not in before.splitlines()))
            wrong |= before != after
        else:
            page.write_text(after, encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
