"""Rows/s of plain and chat encoding, next to the bare tokenizer's batch call over the same text.

    python benchmarks/chat_encoding.py TOKENIZER_FOLDER [--rows 2000] [--repeats 5] [--turns 1]

The tokenizer needs a chat template; SmolLM2-135M-Instruct's will do. The rows are made here: sums in sentences, about
1,200 characters each. The runs alternate, and the fastest of each counts. CPU seconds include the tokenizer's threads.
They depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Literal

from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.template import AnyTemplate, Template, or_raise
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.data.triples import Triple

SEPARATOR = "<file_sep>"


def make_rows(count: int, turns: int) -> list[Triple]:
    """Return made rows; with several turns, the earlier ones are their context."""
    draw = random.Random(0)
    return [make_row(draw, number, turns) for number in range(count)]


def make_row(draw: random.Random, number: int, turns: int) -> Triple:
    """Return one made row."""
    chat = [make_turn(draw) for _ in range(turns)]
    *earlier, (question, rationale, answer) = chat
    context: list[dict[str, str]] = []
    for asked, said, found in earlier:
        reply = f"{said}\n\n#### {found}"
        context += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    context += [{"role": "user", "content": question}] if context else []
    return Triple(question, rationale, answer, source=f"made:{number}", context=tuple(context))


def make_turn(draw: random.Random) -> tuple[str, str, str]:
    """Return a question, its rationale and its answer."""
    steps, total = [], 0
    for step in range(draw.randint(6, 14)):
        count, price = draw.randint(1, 999), draw.randint(1, 99)
        total += count * price
        steps.append(
            f"Step {step + 1}: the shop sells {count} apples at {price} cents each, which gives "
            f"{count}*{price}={count * price}, and so {total} in all."
        )
    question = f"A shop sells apples on {len(steps)} days, at another price each day. How much does it take in all?"
    return f"{question} The first price is {draw.randint(1, 99)}.", "\n".join(steps), str(total)


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the fewest wall and CPU seconds of each run."""
    best = {name: (float("inf"), float("inf")) for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            took = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder of a tokenizer with a chat template")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest run of each counts")
    parser.add_argument("--turns", type=int, default=1, help="of each chat")
    args = parser.parse_args(argv)
    tokenizer, rows = load_tokenizer(args.tokenizer), make_rows(args.rows, args.turns)
    several: tuple[Literal["last", "all"], ...] = ("last",) if args.turns == 1 else ("last", "all")
    forms: tuple[Literal["plain", "think"], ...] = ("plain", "think")
    templates: dict[str, AnyTemplate] = {
        f"chat, {reasoning}, {turns}": ChatTemplate(tokenizer, reasoning, loss_on="completion", turns=turns)
        for reasoning in forms
        for turns in several
    }
    if args.turns == 1:
        templates["plain"] = Template(tokenizer, SEPARATOR if SEPARATOR in tokenizer.get_vocab() else "\n###\n")
    for name, template in templates.items():
        examples = [example for found in template.encode_batch(rows) for example in or_raise(found)]
        texts = [tokenizer.decode(example.tokens) for example in examples]
        runs: dict[str, Callable[[], object]] = {
            "bare": functools.partial(tokenizer.__call__, texts, add_special_tokens=False),
            "encoded": functools.partial(template.encode_batch, rows),
        }
        took = seconds(runs, args.repeats)
        (bare, bare_cpu), (encoded, encoded_cpu) = took["bare"], took["encoded"]
        print(
            f"{name:20} {len(rows) / bare:8,.0f} rows/s bare {len(rows) / encoded:8,.0f} rows/s encoded   "
            f"time x{encoded / bare:.2f}, CPU x{encoded_cpu / bare_cpu:.2f}   "
            f"({len(examples)} sequences, {sum(map(len, texts)) / len(texts):,.0f} characters each)"
        )


if __name__ == "__main__":
    main()
