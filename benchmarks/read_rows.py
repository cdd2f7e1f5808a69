"""Measure how fast rows are read, in memory and streamed, and the memory that it takes.

    python benchmarks/read_rows.py FOLDER [--megabytes 1000] [--json FILE]

Makes a JSONL file of made-up sums in FOLDER, unless an earlier call has. Each way of reading runs in a process of its
own, whose peak memory (resident set) counts.

- index: one pass over the file, which streaming does once for a run.
- memory: `read_triples`, which holds every row.
- streamed: rows by the index in random order, parsed as in memory; none is kept.
- batches: the index, a tokenizer from a sample, and packed batches of streamed rows.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotgrpo.data.streaming import StreamedBatches, StreamedTriples, WindowReader, index_rows
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import read_triples

SAMPLE = 10_000_000
"""Characters that the tokenizer is trained on."""


def make_file(path: Path, megabytes: int) -> None:
    """Write rows of sums, about 500 bytes each, until the file has its size."""
    draw, size, number = random.Random(0), 0, 0
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            total, steps = 0, []
            numbers = [draw.randint(100, 99_999) for _ in range(draw.randint(3, 12))]
            for value in numbers:
                steps.append(f"Add {value} to {total}: {total} + {value} = {total + value}.")
                total += value
            row = {
                "id": number,
                "question": f"What is the sum of {', '.join(map(str, numbers))}?",
                "rationale": "\n".join(steps),
                "answer": str(total),
            }
            line = json.dumps(row) + "\n"
            file.write(line)
            size, number = size + len(line), number + 1
    temporary.rename(path)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that the work takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(what: str, path: Path, rows: int, workers: int) -> dict[str, float]:
    """Measure one way of reading in this process. `rows` is the number of streamed rows."""
    index = path.parent / "row_index"
    if what == "memory":
        took, (triples, _) = seconds(lambda: read_triples(path))
        return {"rows": len(triples), "seconds": took, "rows_per_sec": len(triples) / took}
    if what == "index":
        for old in index.glob("*"):
            old.unlink()
    took, files = seconds(lambda: index_rows([path], index))
    if what == "index":
        return {"rows": len(files), "seconds": took, "rows_per_sec": len(files) / took}
    stream = StreamedTriples(files, bad_rows="drop")
    if what == "streamed":
        sample = stream.sample(0, rows=rows, characters=10**12)
        took, _ = seconds(lambda: collections.deque(sample, maxlen=0))
        rows = min(rows, len(files))
        return {"rows": rows, "seconds": took, "rows_per_sec": rows / took}
    texts = (f"{t.question}\n{t.rationale}\n{t.answer}" for t in stream.sample(0, rows=rows, characters=SAMPLE))
    to_tokenizer, tokenizer = seconds(lambda: train_tokenizer(texts, vocab_size=4_096))
    reader = WindowReader(stream, Template(tokenizer), seq_len=512, too_long="drop")
    start = time.perf_counter()
    batches = StreamedBatches(reader, batch_size=16, workers=workers)
    next(batches)
    first = time.perf_counter() - start
    start, before = time.perf_counter(), batches.report.read
    while batches.report.read - before < rows:
        next(batches)
    took = time.perf_counter() - start
    batches.close()
    return {
        "rows": batches.report.read,
        "seconds": took,
        "rows_per_sec": (batches.report.read - before) / took,
        "seconds_to_tokenizer": to_tokenizer,
        "seconds_to_first_batch": first,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=50_000, help="streamed rows to measure")
    parser.add_argument("--workers", type=int, default=0, help="processes that make the batches")
    parser.add_argument("--measure", choices=["index", "streamed", "batches", "memory"], nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    path = args.folder / f"rows_{args.megabytes}mb.jsonl"
    if args.one:
        found = measure(args.one, path, args.rows, args.workers)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found | {"peak_rss": peak}))
        return
    if not path.is_file():
        args.folder.mkdir(parents=True, exist_ok=True)
        make_file(path, args.megabytes)
    results = {"bytes": path.stat().st_size}
    for what in args.measure or ["index", "streamed", "batches", "memory"]:
        same = [str(args.folder), "--megabytes", str(args.megabytes), "--rows", str(args.rows)]
        command = [sys.executable, __file__, *same, "--workers", str(args.workers), "--one", what]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[what] = found = json.loads(out.splitlines()[-1])
        extra = "".join(
            f"  {name.replace('_', ' ')} {found[name]:.1f}" for name in found if name.startswith("seconds_")
        )
        print(
            f"{what:9} {found['rows']:10,.0f} rows  {found['seconds']:7.1f} s  {found['rows_per_sec']:9,.0f} rows/s  "
            f"peak {found['peak_rss'] / 1e6:,.0f} MB{extra}",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
