"""The commands `sft` and `grpo`: set up, measure, train, measure, report. GRPO is GhostRespond Policy Optimization, not Group Relative."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import cotgrpo
from cotgrpo.config import Config
from cotgrpo.data.batches import make_batches
from cotgrpo.objectives import Objective
from cotgrpo.run.checkpoint import restore_params
from cotgrpo.run.evaluate import EvalResult, eval_loss, exact_match
from cotgrpo.run.report import write_report
from cotgrpo.run.setup import Setup, claim_folder, set_up
from cotgrpo.run.train import LoopSettings, train
from cotgrpo.types import TrainState

PACKAGES = ("cotgrpo", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
SAMPLES_SHOWN = 12


def run_sft(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains a student on triples with the next-token loss, in `run_dir/sft`; run again, it resumes. Returns the report."""
    return Stage("sft", config, console or Console()).run()


def run_grpo(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains on with a GhostRespond objective, in `run_dir/grpo`, from the SFT student or `grpo.init_from`. Returns the report."""
    return Stage("grpo", config, console or Console()).run()


@dataclasses.dataclass
class Stage:
    """One stage of a run: "sft" or "grpo"."""

    name: str
    config: Config
    console: Console

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        settings = getattr(self.config, self.name)
        self.folder = Path(self.config.run_dir) / self.name
        claim_folder(self.folder, self.config, self.name)
        setup = set_up(self.config)
        for title, report in setup.reports.items():
            self.console.print(f"{title}: {report}", highlight=False, markup=False)
        params, origin = self.start_params(setup)
        self.console.print(
            f"{self.name}: {setup.decoder.num_params() / 1e6:.2f} M parameters from {origin}, {len(setup.train)} training rows, "
            f"{len(setup.test_triples)} held out",
            highlight=False,
        )
        before = self.measure_before(setup, params)
        tx = dataclasses.asdict(settings.optimizer)
        tx = cotgrpo.make_optimizer(tx.pop("name"), total_steps=settings.steps, **tx)
        state = TrainState.create(params=jax.tree.map(jnp.copy, params), tx=tx, key=self.config.seed)
        step, extra = self.build_step(setup, tx, params)
        batches = make_batches(
            setup.train,
            batch_size=settings.batch_size,
            seq_len=self.config.data.seq_len,
            seed=self.config.seed,
            packing=self.config.data.packing,
        )
        state = train(
            step,
            state,
            batches,
            self.folder,
            LoopSettings(
                title=self.name,
                total_steps=settings.steps,
                log_every=settings.log_every,
                eval_every=settings.eval_every,
                checkpoint_every=self.config.checkpoint.every,
                keep=self.config.checkpoint.keep,
                max_skipped=self.config.max_skipped,
            ),
            extra=extra,
            evaluate=lambda p: self.held_out_loss(setup, p),
            console=self.console,
        )
        return self.finish(setup, state.params, before, time.perf_counter() - started)

    def build_step(self, setup: Setup, tx: Any, params: Any) -> tuple[Any, tuple[Any, ...]]:
        """The compiled step and its further arguments: the reference's parameters, where the objective keeps near one."""
        settings = getattr(self.config, self.name)
        if self.name == "sft":
            made = cotgrpo.make_sft_step(setup.student, tx, micro_batches=settings.micro_batches)
            return cotgrpo.jit_step(made), ()
        objective: Objective = settings.objective.build()
        reference = setup.student if getattr(objective, "needs_reference", False) else None
        made = cotgrpo.make_grpo_step(
            setup.student, tx, objective, reference=reference, micro_batches=settings.micro_batches
        )
        return cotgrpo.jit_step(made), () if reference is None else (params,)

    def start_params(self, setup: Setup) -> tuple[Any, str]:
        """Parameters before the first step, and where they come from."""
        init_from = getattr(self.config, self.name).init_from
        if init_from is None and self.name == "sft":
            return setup.init_params(), "scratch"
        folder = Path(init_from) if init_from is not None else Path(self.config.run_dir) / "sft"
        params, step = restore_params(folder / "checkpoints", jax.eval_shape(setup.init_params))
        return params, f"{folder} at step {step}"

    def held_out_loss(self, setup: Setup, params: Any) -> dict[str, float]:
        """Mean NLL and its companions over the held-out rows, rationales and all."""
        if not hasattr(self, "eval_step"):
            self.eval_step = jax.jit(cotgrpo.make_eval_step(setup.student))
        batches = setup.test_batches(getattr(self.config, self.name).batch_size)
        return eval_loss(self.eval_step, params, batches)

    def exact_match(self, setup: Setup, params: Any) -> EvalResult:
        evaluation = self.config.eval
        return exact_match(
            setup.decoder,
            params,
            setup.template,
            setup.test_triples,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            vocab_size=setup.vocab_size,
        )

    def measure_before(self, setup: Setup, params: Any) -> dict[str, Any]:
        """Accuracy and held-out loss of the student before this stage; measured once, kept for a resumed run."""
        path = self.folder / "before.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        earlier = Path(self.config.run_dir) / "sft" / "after.json"
        if self.name == "grpo" and self.config.grpo.init_from is None and earlier.is_file():
            measured = json.loads(earlier.read_text(encoding="utf-8"))
        else:
            measured = self.measure(setup, params)
        write_json(path, measured)
        return measured

    def measure(self, setup: Setup, params: Any) -> dict[str, Any]:
        result = self.exact_match(setup, params)
        self.console.print(
            f"held-out accuracy: {result.accuracy:.1%} of {result.n} (95 % interval {result.low:.1%} to {result.high:.1%})",
            highlight=False,
        )
        return {
            "accuracy": {"value": result.accuracy, "n": result.n, "low": result.low, "high": result.high},
            "truncated": result.truncated,
            "unparsable": result.unparsable,
            "loss": self.held_out_loss(setup, params)["loss"],
            "samples": result.samples,
        }

    def finish(self, setup: Setup, params: Any, before: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Measures the trained student and writes `after.json`, `report.json` and `report.html`."""
        path = self.folder / "after.json"
        if path.is_file():
            after = json.loads(path.read_text(encoding="utf-8"))
        else:
            after = self.measure(setup, params)
            write_json(path, after)
        report_path = self.folder / "report.json"
        if report_path.is_file():
            return json.loads(report_path.read_text(encoding="utf-8"))
        measured = {"sft": after, "base": before} if self.name == "sft" else {"grpo": after, "sft": before}
        if self.name == "grpo":
            base = Path(self.config.run_dir) / "sft" / "before.json"
            if self.config.grpo.init_from is None and base.is_file():
                measured["base"] = json.loads(base.read_text(encoding="utf-8"))
        report = {
            "title": f"cotgrpo {self.name}",
            "command": f"cotgrpo {self.name} --config {self.folder / 'config.yaml'}",
            "accuracy": {name: m["accuracy"] for name, m in measured.items()},
            "held_out_loss": {name: m["loss"] for name, m in measured.items()},
            "wall_seconds": {self.name: seconds},
            "samples": merge_samples({name: m["samples"] for name, m in measured.items()}),
            "data": {title: r.to_dict() for title, r in setup.reports.items()},
            "config": (self.folder / "config.yaml").read_text(encoding="utf-8"),
            "versions": versions(),
        }
        write_json(report_path, report)
        self.console.print(f"report: {write_report(self.folder)}", highlight=False)
        return report


def merge_samples(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same questions as the student answered them at each point: some that changed first, then others."""
    names = list(samples)
    rows = []
    for answers in zip(*samples.values(), strict=True):
        replies = {n: {"text": a["reply"], "correct": a["correct"]} for n, a in zip(names, answers, strict=True)}
        rows.append({"question": answers[0]["question"], "gold": answers[0]["gold"], "replies": replies})
    changed = [r for r in rows if len({x["correct"] for x in r["replies"].values()}) > 1]
    same = [r for r in rows if r not in changed]
    first = changed[: SAMPLES_SHOWN * 2 // 3]
    return first + same[: SAMPLES_SHOWN - len(first)]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the device."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader, or a crash, never meets half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
