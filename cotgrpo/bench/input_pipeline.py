"""Measure the input pipeline. It needs grain, tokenizers and transformers, imported where they are used."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from cotgrpo.bench.measure import in_turn, ratio
from cotgrpo.bench.steps import Running
from cotgrpo.models.config import DecoderConfig


def measure_data(config: DecoderConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time steps on packed text from the Grain pipeline, in turn with the same step on one constant batch.

    Blocks of steps take turns. Only the end of a block waits for the device, so the next batch is made while the device
    works, as in training.
    """
    from cotgrpo.data.batches import make_batches, make_examples, packing_efficiency
    from cotgrpo.data.template import Template
    from cotgrpo.data.tokenizer import train_tokenizer
    from cotgrpo.data.triples import read_triples
    from cotgrpo.teachers.procedural import ProceduralTeacher

    triples = read_triples(args.rows)[0] if args.rows else ProceduralTeacher(seed=0).draw(2_000)
    texts = (f"{t.question}\n{t.rationale}\n{t.answer}" for t in triples)
    start = time.perf_counter()
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    trained = time.perf_counter()
    examples, report = make_examples(triples, Template(tokenizer), args.seq, too_long="drop")
    tokenized = time.perf_counter()
    sizes = {"batch_size": args.batch, "seq_len": args.seq}
    once = list(make_batches(examples, **sizes, num_epochs=1))
    packed = time.perf_counter()
    running = Running(config)
    batches = make_batches(examples, **sizes)
    constant = next(batches)
    step, _ = running.step("sft", constant)
    host = []
    for _ in range(args.steps * 4):
        began = time.perf_counter()
        next(batches)
        host.append(time.perf_counter() - began)

    def block(real: bool) -> Any:
        batch = constant
        for _ in range(args.steps):
            out = step(jax.device_put(batch))
            batch = next(batches) if real else constant
        return out

    times = in_turn({"constant": lambda: block(False), "real": lambda: block(True)}, args.repeats, args.warmup)
    efficiency = packing_efficiency(once[:-1] or once)  # the last batch is filled up with empty rows
    padded = args.batch * args.seq * args.steps
    rows = [
        {"batches": name}
        | {k: v / args.steps for k, v in found.row().items()}
        | {"padded_tokens_per_sec": padded / found.median, "tokens_per_sec": efficiency * padded / found.median}
        for name, found in times.items()
    ]
    return {
        "rows": rows,
        "real_over_constant": ratio(times["real"], times["constant"]),
        "packing_efficiency": efficiency,
        "rows_of": Path(args.rows).name if args.rows else "made-up sums",
        "documents": len(examples),
        "left_out": report.to_dict(),
        "host_seconds_a_batch": statistics.median(host),
        "seconds": {
            "tokenizer": trained - start,
            "tokenize": tokenized - trained,
            "pack_one_epoch": packed - tokenized,
        },
    }


def data_lines(result: dict[str, Any]) -> list[str]:
    """Return the ratio, the host's time and the packing efficiency as lines."""
    found = result["real_over_constant"]
    low, high = found["range"]
    return [
        f"real / constant: {found['median_of_pairs']:.3f} (median of pairs; {low:.3f} to {high:.3f}); "
        f"the host makes a batch in {1e3 * result['host_seconds_a_batch']:.2f} ms",
        f"packing efficiency {result['packing_efficiency']:.2%} over {result['documents']:,} documents",
    ]
