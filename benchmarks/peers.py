"""Compare cotgrpo with its peers on the same weights and batch, in turn.

    python benchmarks/peers.py --shape 16m --batch 8 --seq 256 --python trl=envs/torch/bin/python
    python benchmarks/peers.py --task generate --shape 16m --batch 8 --seq 64 --python ...

    bare          a loop over `transformers` in torch: forward, loss, backward, clipping, fused AdamW; sdpa attention
    compiled      the same through `torch.compile`
    trl           TRL's SFTTrainer: no recomputation, fused AdamW, sdpa, full rows
    tunix         google-tunix's PeftTrainer on all parameters, or its Sampler
    transformers  `generate`, for --task generate
    cotgrpo       this library a second time: how far equal programs differ here

Training is SFT of all parameters with AdamW and clipping on full rows: float32 on a CPU, bfloat16 on a GPU. Generation
is greedy and of full length. Each contender has a process and an environment of its own. One pair is alive at a time,
cotgrpo and the peer: one takes its steps while the other waits, in turn. The ratio is the median over neighbouring
steps. `cpu x` is the ratio of processor seconds, which other work on a shared CPU disturbs least. `first step` starts
after the imports: it reads the weights, builds, compiles and takes one step. Losses (or tokens) of both are compared.

If a contender fails or its packages are missing, its row says so and the exit code is 1. The driver needs what
`save_pretrained` needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contenders import CONTENDERS, MISSING

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.accelerators.roofline import Work
from cotgrpo.bench.workload import SHAPES, random_batch
from cotgrpo.models.decoder import init_params
from cotgrpo.models.huggingface.weights import save_pretrained

ON_CPU = jax.default_backend() == "cpu"


class ContenderError(RuntimeError):
    """Raised when a contender ended; `missing` if its packages are not installed."""

    def __init__(self, message: str, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


class Contender:
    """A process of contenders.py, which waits for its turn."""

    def __init__(self, name: str, task: str, python: str, given: dict[str, Any]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in `close`
        # Two processes share a GPU, and neither may take all of it. Torch's threads do not spin while they wait.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("contenders.py"), name, task, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.values: list[Any] = []
        self.facts: dict[str, Any] = {}

    def first(self) -> None:
        """Wait for the first step."""
        self.facts["first_step_s"] = self.hear()[0]

    def warm_up(self, steps: int) -> None:
        """Take steps that do not count."""
        if steps:
            self.go(steps)
        self.seconds, self.cpu_seconds = [], []

    def go(self, steps: int) -> float:
        """Take this many steps; return the time of one."""
        with contextlib.suppress(BrokenPipeError):  # `hear` says why it ended
            print(steps, file=self.process.stdin, flush=True)
        seconds = self.hear()
        self.seconds += seconds
        return statistics.fmean(seconds)

    def hear(self) -> list[float]:
        """Return the seconds of the last steps. Raise ContenderError if the process ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise ContenderError(f"{self.name}: {last}", missing=code == MISSING)
        told = json.loads(line)
        self.values += told.pop("values")
        seconds: list[float] = told.pop("seconds")
        self.cpu_seconds += told.pop("cpu_seconds")
        self.facts |= told
        return seconds

    def close(self) -> None:
        """End the process if it is still alive."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # the contender reads an end, and leaves
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def write_task(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Write the model folder and the batch that every contender reads; return the decoder's config."""
    # One rotary base that all of them compute: Tunix's Llama has this one written into its code.
    config = dataclasses.replace(SHAPES[args.shape], rope_theta=1e6, param_dtype=args.dtype, dtype=args.dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        save_pretrained(folder / "model", config, init_params(config, jax.random.key(0)), tokenizer=words(config))
    # Token 0 is padding, which no contender may meet.
    ids = np.maximum(random_batch(config, args.batch, args.seq).tokens, 1)
    np.save(folder / "ids.npy", ids)
    given = {"folder": str(folder / "model"), "ids": str(folder / "ids.npy"), "dtype": args.dtype}
    return given | {"remat": args.remat, "new_tokens": args.new_tokens}, config


def words(config: Any) -> Any:
    """Return a tokenizer whose token n is the word "tn", for trainers and samplers that need one; 0 is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(config.vocab_size)}, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t0")


def pair(name: str, given: dict[str, Any], args: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """Measure one peer in turn with cotgrpo."""
    both: list[Contender] = []

    def started(who: str) -> Contender:
        both.append(Contender(who, args.task, pythons.get(who, sys.executable), given))
        both[-1].first()
        both[-1].warm_up(args.warmup)
        return both[-1]

    def apart(who: str) -> list[float]:
        contender = started(who)
        times = [contender.go(args.steps) for _ in range(args.turns)]
        contender.close()
        return times

    try:
        if args.apart:
            turns = [*zip(apart(name), apart("cotgrpo"), strict=True)]
        else:
            theirs, ours = started(name), started("cotgrpo")
            turns = [(theirs.go(args.steps), ours.go(args.steps)) for _ in range(args.turns)]
    except ContenderError as error:
        return {"peer": name, "missing" if error.missing else "failed": str(error)}
    finally:
        for contender in both:
            contender.close()
    theirs, ours = both
    ratios = [its / own for its, own in turns]
    return {
        "peer": name,
        "cotgrpo_row": measured(ours, args),
        "peer_row": measured(theirs, args),
        "times_as_fast": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(theirs.cpu_seconds) / statistics.median(ours.cpu_seconds) if ON_CPU else None,
        "same": compared(ours.values, theirs.values, args.task),
    }


def measured(contender: Contender, args: argparse.Namespace) -> dict[str, Any]:
    median = statistics.median(contender.seconds)
    tokens = args.batch * (args.seq if args.task == "train" else args.new_tokens)
    return contender.facts | {
        "median_s": median,
        "min_s": min(contender.seconds),
        "max_s": max(contender.seconds),
        "cpu_s": statistics.median(contender.cpu_seconds),
        "steps": len(contender.seconds),
        "tokens_per_sec": tokens / median,
    }


def compared(ours: list[Any], theirs: list[Any], task: str) -> dict[str, Any]:
    """Compare losses step by step, or return the share of tokens that both wrote."""
    if task == "generate":
        return {"tokens": float(np.mean(np.asarray(ours[0]) == np.asarray(theirs[0])))}
    both = list(zip(ours, theirs, strict=False))  # some report a step late
    return {"losses": both[:4], "largest_difference": max(abs(a - b) for a, b in both)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pythons = dict(entry.split("=", 1) for entry in args.python)
    with tempfile.TemporaryDirectory() as folder:
        given, config = write_task(Path(folder), args)
        result = {
            "device": jax.devices()[0].device_kind,
            "task": args.task,
            "shape": args.shape,
            "params": config.num_params(),
            "dtype": args.dtype,
            "batch": args.batch,
            "seq": args.seq,
            "new_tokens": args.new_tokens if args.task == "generate" else None,
            "remat": args.remat,
            "matrix_flops_per_sec": matrix_rate(args.dtype),
            "pairs": [],
        }
        if args.task == "train":
            result["model_flops"] = Work(config, args.batch * args.seq, args.seq).model_flops
        for name in args.peers:
            result["pairs"].append(pair(name, given, args, pythons))
            show_pair(result, result["pairs"][-1])
            if args.json:  # after each, so that a run cut short leaves what it had
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def show_head(args: argparse.Namespace) -> None:
    what = f"{args.batch} x {args.seq}" + (f" + {args.new_tokens} new" if args.task == "generate" else "")
    print(f"{args.task}: {args.shape}, {what}, {args.dtype}; one pair a block, `x` how many times as fast cotgrpo is")
    columns = f"{'median s':>10}{'min':>9}{'max':>9}{'tokens/s':>10}{'floor':>7}{'first s':>9}{'peak GB':>9}"
    print(f"{'':14}{columns}{'x':>7}{'(range)':>14}{'cpu x':>7}  same", flush=True)


def show_pair(result: dict[str, Any], found: dict[str, Any]) -> None:
    for word in ("missing", "failed"):
        if word in found:
            print(f"{found['peer']:14}{word}: {found[word]}", flush=True)
            return
    for name, row in (("cotgrpo", found["cotgrpo_row"]), (found["peer"], found["peer_row"])):
        floor = result.get("model_flops", 0) / result["matrix_flops_per_sec"] / row["median_s"]
        peak = row["device_peak_bytes"] or row["peak_rss_bytes"]
        line = f"{name:14}{row['median_s']:10.3f}{row['min_s']:9.3f}{row['max_s']:9.3f}{row['tokens_per_sec']:10.0f}"
        line += f"{floor:7.2f}" if floor else f"{'-':>7}"
        print(f"{line}{row['first_step_s']:9.1f}{peak / 1e9:9.2f}", end="")
        print("", end="" if row is found["peer_row"] else "\n")
    low, high = found["range"]
    cpu = f"{found['cpu_ratio']:.2f}" if found["cpu_ratio"] else "-"
    same = ", ".join(f"{k} {v:.1e}" if k != "tokens" else f"{v:.1%}" for k, v in found["same"].items() if k != "losses")
    print(f"{found['times_as_fast']:7.2f}{f'({low:.2f}-{high:.2f})':>14}{cpu:>7}  {same}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    names = [name for name in dict.fromkeys(n for kind in CONTENDERS.values() for n in kind)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(CONTENDERS), default="train")
    parser.add_argument("--shape", choices=list(SHAPES), default="16m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256, help="tokens of a row, or of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32" if ON_CPU else "bfloat16")
    parser.add_argument("--remat", action="store_true", help="recompute layers in the backward pass, in all contenders")
    parser.add_argument("--peers", nargs="+", choices=names, help="default: all that do the task")
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="interpreters; default: this one")
    parser.add_argument("--turns", type=int, default=5, help="turns of each of a pair")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps after the first that do not count")
    parser.add_argument(
        "--apart", action="store_true", help="run a pair one after the other, if memory does not hold both"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    args.peers = args.peers or [name for name in CONTENDERS[args.task] if name != "cotgrpo"]
    if unknown := set(args.peers) - set(CONTENDERS[args.task]):
        parser.error(f"{', '.join(sorted(unknown))}: not for --task {args.task}")
    show_head(args)
    result = measure(args)
    return int(any("times_as_fast" not in found for found in result["pairs"]))


if __name__ == "__main__":
    sys.exit(main())
