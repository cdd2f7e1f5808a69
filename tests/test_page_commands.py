"""Every code block of README and docs/ is run, as the page has it, or is in one table with the reason why it is not.

Commands run in this process, in a folder of their own, with tiny sizes. What a page starts on other machines, such as
`vllm serve`, is a server on loopback.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from helpers.commands import write_model
from helpers.pages import PAGES, ROOT, Block, Runner, blocks_of, documented_metrics
from helpers.rollout_server import RolloutServer
from helpers.scoring_server import ScoringServer
from helpers.writing_teacher import WritingTeacher

from cotgrpo import SftBatch, make_optimizer, make_sft_step
from cotgrpo.cli import main
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.models import save_pretrained
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

LIBTPU = "compiles for a TPU, which needs libtpu; tests/planning runs plans where it is installed"
CLOUD = "asks a cloud provider for machines, or runs on them"
HUB = "writes to an account of the hub; tests/commands/test_push.py has a hub on loopback"
HOURS = "runs for hours; tests/test_benchmarks.py runs the script at a tiny size"
PEERS = "needs environments with PyTorch, TRL and Tunix"
NOT_RUN = [
    ("docs/checkpoints.md", "hf auth login", HUB),
    ("docs/checkpoints.md", "cotgrpo export --out student --push", HUB),
    ("docs/checkpoints.md", "cotgrpo export --run_dir runs/svamp --out student --dtype", "needs llama.cpp"),
    ("docs/from_trl.md", "cotgrpo plan", LIBTPU),
    ("docs/plan.md", "cotgrpo plan", LIBTPU),
    ("docs/launch.md", "cotgrpo plan --config configs/llama3_8b_v5p32.yaml", LIBTPU),
    ("docs/launch.md", "cotgrpo plan --config configs/llama3_8b_v5e16.yaml", LIBTPU),
    ("docs/launch.md", "export REPOSITORY=", "clones from the account that the page is read from"),
    ("docs/launch.md", "export PROJECT=", CLOUD),
    ("docs/launch.md", "export SLICE=", CLOUD),
    ("docs/launch.md", "HOSTS=$(gcloud", CLOUD),
    ("docs/launch.md", "gcloud compute instances create", CLOUD),
    ("docs/launch.md", "gcloud compute instance-groups managed delete", CLOUD),
    ("docs/launch.md", "export TPU=", CLOUD),
    ("docs/launch.md", "on_all() {", CLOUD),
    ("docs/launch.md", "FROM python:3.12-slim", "builds an image"),
    ("docs/launch.md", "export CLUSTER=", CLOUD),
    ("docs/launch.md", "apiVersion: jobset", CLOUD),
    ("docs/launch.md", "kubectl apply", CLOUD),
    ("docs/launch.md", "gcloud compute tpus queued-resources create", CLOUD),
    ("docs/launch.md", "workdir: .", CLOUD),
    ("docs/launch.md", "uv tool install 'skypilot", CLOUD),
    ("docs/launch.md", "#!/bin/bash", "needs SLURM and 16 GPUs"),
    ("docs/launch.md", "cd /shared/cotgrpo", "needs GPUs"),
    ("docs/launch.md", "tmux new", "trains Qwen3-0.6B in a terminal that stays"),
    ("docs/launch.md", "cotgrpo sft --config configs/qwen3_0.6b_v5e8.yaml", "needs a TPU v5e-8"),
    ("docs/method.md", "python benchmarks/ablation.py --size saturated", HOURS),
    ("docs/method.md", "text='nll, teacher_forced' new=", HOURS),
    ("docs/method.md", "new='on_policy, new questions' text=", HOURS),
    ("docs/method.md", "new='on_policy, new questions'\n", HOURS),
    ("docs/method.md", "out=benchmarks/results/cpu", HOURS),
    ("docs/method.md", "python benchmarks/pooled.py", "tests/test_paired.py runs it"),
    ("docs/method.md", "python benchmarks/real_student.py", HOURS),
    ("docs/own_code.md", "pip install wandb", "needs wandb and mlflow"),
    ("docs/performance.md", "python benchmarks/peers.py --shape", PEERS),
    ("docs/performance.md", "python benchmarks/peers.py --task generate", PEERS),
    ("docs/results.md", "cotgrpo quickstart", "the README's command, which .ci/run runs"),
    ("docs/scaling.md", "export XLA_FLAGS=", "flags of XLA for GPUs"),
]
"""(page, beginning of the block, why it is not run). test_docs_site.py parses all, and checks the options they have."""
RUN_BY = {
    ("README.md", "sh"): ".ci/run",
    ("README.md", "python"): "tests/test_packaging.py::test_the_example_in_the_readme_runs",
    ("README.md", "py"): "tests/runs/test_docs.py::test_the_blocks_run",
    ("README.zh.md", "sh"): "tests/quickstart/test_quickstart.py::test_the_quick_start_learns",
    ("README.zh.md", "py"): "tests/runs/test_docs.py::test_the_blocks_run",
    ("docs/python.md", "python"): "tests/runs/test_docs.py::test_the_blocks_run",
    ("docs/from_trl.md", "py"): "tests/runs/test_docs.py::test_the_blocks_run",
    ("docs/own_code.md", "python"): "tests/test_own_code.py::test_a_stage_with_everything_of_ones_own",
    ("docs/own_code.md", "yaml"): "tests/test_own_code.py::test_grpo_learns_from_the_objective_and_the_reward",
    ("docs/hosts.md", "sh"): "tests/test_page_commands.py::test_two_processes",
}
"""Blocks that other tests run, by page and language."""

SETTINGS = """
run_dir: runs/run
student: {width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, mlp_width: 32, init_scale: 0.2}
tokenizer: {path: teacher}
data: {train: [rows.jsonl], seq_len: 160, test_rows: 8, loss_on: completion}
sft: {steps: 2, batch_size: 2, log_every: 2}
grpo: {steps: 2, batch_size: 8, log_every: 1, max_entropy_growth: null}
eval: {rows: 4, batch_size: 4, max_new_tokens: 4}
checkpoint: {every: 2}
"""
SHAPE = DecoderConfig(
    vocab_size=300, width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, init_scale=0.2
)
ROWS = ProceduralTeacher(seed=1).draw(40)


def why_not(block: Block) -> str:
    """Why a block is not run, or ""."""
    found = [reason for page, start, reason in NOT_RUN if page == block.page and block.code.startswith(start)]
    return found[0] if found else ""


def left(page: str) -> list[Block]:
    """The blocks of a page that its own test here runs."""
    code = [block for block in blocks_of(page) if block.language not in ("", "text")]
    return [block for block in code if not why_not(block) and (page, block.language) not in RUN_BY]


def test_every_block_is_run_once_or_has_a_reason() -> None:
    for page, start, reason in NOT_RUN:
        found = [block for block in blocks_of(page) if block.code.startswith(start)]
        assert len(found) == 1 and reason, f"{page}: {start} names {len(found)} blocks"
    for page, language in RUN_BY:
        assert any(block.language == language for block in blocks_of(page)), f"{page} has no block in {language}"
    assert {page for page in PAGES if left(page)} == set(TESTS)


def test_output_that_a_page_shows_is_no_command() -> None:
    """A block without a language is not run, so it must not hold commands."""
    for page in PAGES:
        for block in blocks_of(page):
            if not block.language:
                assert not re.match(r"(cotgrpo (?!\S*:)[a-z]+ --|pip |python )", block.first), f"{page}: {block.first}"


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values())))
def test_the_tests_that_run_blocks_exist(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file()


@pytest.mark.parametrize("script", ["ablation", "peers"])
def test_options_of_scripts_that_are_not_run(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option that a page gives to a script is one of its options, and every arm one of its arms."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    code = [b.code for page in PAGES for b in blocks_of(page) if why_not(b) and f"benchmarks/{script}.py" in b.code]
    given = {flag for block in code for flag in re.findall(r"(?<!\S)--[a-z_]+", block)}
    assert given and given <= known
    if script == "ablation":
        said = [words for block in code for words in expanded(block)]
        arms = {arm for words in said for arm in arms_of(words)}
        assert len(arms) > 20 and arms <= set(module.ARMS), arms - set(module.ARMS)


def expanded(code: str) -> list[list[str]]:
    """The commands that a shell would run, with its variables and loops."""
    script = "python() { printf '%s\\0' \"$@\"; printf '\\n'; }\n" + code
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True)
    return [line.rstrip("\0").split("\0") for line in done.stdout.splitlines()]


def arms_of(words: list[str]) -> Iterator[str]:
    """The arms of a command of the ablation."""
    if "--arms" in words:
        for word in words[words.index("--arms") + 1 :]:
            if word.startswith("--"):
                return
            yield word


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, two models, settings under two names, and a run of SFT."""
    folder = tmp_path_factory.mktemp("pages")
    write_triples(folder / "rows.jsonl", ROWS)
    asked = [{"question": row.question, "gold": row.answer} for row in ROWS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    write_triples(folder / "replies.jsonl", ROWS[:6])
    texts = [f"{row.question}\n{row.rationale}\n{row.answer}" for row in ROWS]
    save_pretrained(
        folder / "teacher",
        SHAPE,
        init_params(SHAPE, jax.random.key(5)),
        tokenizer=train_tokenizer(texts, vocab_size=280),
    )
    write_model(folder / "model", texts)
    for name in ("c.yaml", "run.yaml"):
        (folder / name).write_text(SETTINGS, encoding="utf-8")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["sft", "--config", "c.yaml"]) == 0
        assert main(["export", "--run_dir", "runs/run", "--out", "served"]) == 0
    return folder


@dataclasses.dataclass
class Place:
    """Where a page runs.

    Attributes:
        folder: the current one, with what `prepared` made.
        stack: closes servers.
        number: of the runs so far.
    """

    folder: Path
    stack: ExitStack
    number: int = 0

    def small(self, words: list[str]) -> list[str]:
        """The options that make a command small. Each stage of training gets a folder of its own."""
        if words[0] == "eval":
            return ["--eval.rows", "4", "--eval.max_new_tokens", "4"]
        if words[0] not in ("sft", "grpo"):
            return []
        self.number += 1
        more = ["--run_dir", f"runs/{self.number}"]
        if words[0] == "grpo":
            more += ["--grpo.init_from", "runs/run/sft"]
            # What a teacher wrote are other rows than those of SFT.
            more += ["--allow_changed", "data"] if "cached" in words else ["--grpo.ghosts.max_new_tokens", "8"]
        return more if "--config" in words else ["--config", "c.yaml", *more]

    def scoring(self) -> str:
        """Start a server that scores texts and writes solutions. Return its address."""
        teacher = WritingTeacher(self.folder / "teacher", ROWS)

        class Both(ScoringServer):
            def answer(self, path: str, body: Any, key: str) -> tuple[int, Any]:
                if path == "/v1/chat/completions":
                    return 200, teacher.chat(body)
                return super().answer(path, body, key)

        return self.stack.enter_context(Both(teacher.model, teacher.tokenizer, ("vllm",))).url


def run_all(page: str, runner: Runner) -> Runner:
    for block in left(page):
        runner.run(block)
    return runner


def answers(place: Place) -> None:
    """What the page shows as a comment is what comes out."""
    (block,) = left("docs/answers.md")
    (shown,) = re.findall(r"^# (Grade\(.*\))$", block.code, re.M)
    (call,) = re.findall(r"^grade\(.*\)$", block.code, re.M)
    runner = run_all("docs/answers.md", Runner())
    assert repr(eval(call, runner.names)) == shown


def checkpoints(place: Place) -> None:
    run_all("docs/checkpoints.md", Runner({"runs/svamp": "runs/run"}))
    assert Path("student/config.json").is_file()


def commands(place: Place) -> None:
    assert len(run_all("docs/commands.md", Runner()).ran) == 3


def data(place: Place) -> None:
    """One file has the columns of the page's examples."""
    rows = [
        {"q": r.question, "a": f"{r.rationale}\n#### {r.answer}", "score": n % 5, "trace": {"steps": r.rationale}}
        | {"text": f"{r.question}### Answer:{r.rationale}\n#### {r.answer}", "results": [r.answer]}
        | {"meta": {"truth": r.answer}}
        for n, r in enumerate(ROWS)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runner = run_all("docs/data.md", Runner({"http://localhost:8000/v1": place.scoring()}, place.small))
    assert [command[0] for command in runner.ran] == ["sft", "generate", "sft"]
    assert len(Path("replies/triples.jsonl").read_text(encoding="utf-8").splitlines()) == len(ROWS)
    merged = yaml.safe_load(SETTINGS)
    merged["data"] |= yaml.safe_load(Path("page.yaml").read_text(encoding="utf-8"))["data"]
    Path("columns.yaml").write_text(yaml.safe_dump(merged), encoding="utf-8")
    assert main(["sft", "--config", "columns.yaml", "--run_dir", "runs/columns"]) == 0


def evaluation(place: Place) -> None:
    for name in ("test.jsonl", "gsm8k_test.jsonl", "algebra.jsonl", "geometry.jsonl"):
        write_triples(place.folder / name, ROWS[:5])
    names = {"HuggingFaceTB/SmolLM2-135M-Instruct": "teacher", "runs/a": "runs/run"}
    runner = run_all("docs/evaluation.md", Runner(names, place.small))
    assert [command[0] for command in runner.ran] == ["eval", "eval", "eval", "export"]
    assert Path("results/eval.json").is_file() and Path("exported/config.json").is_file()
    assert main(["eval", "--run_dir", "runs/run", "--config", "page.yaml"]) == 0
    measured = json.loads(Path("runs/run/sft/eval.json").read_text(encoding="utf-8"))
    assert set(measured["sets"]) == {"gsm8k", "math"}


def method(place: Place) -> None:
    runner = run_all("docs/method.md", Runner({"FOLDER": "teacher"}, place.small))
    assert [command[0] for command in runner.ran].count("grpo") == 4
    merged = yaml.safe_load(SETTINGS)
    merged["grpo"] |= yaml.safe_load(Path("page.yaml").read_text(encoding="utf-8"))["grpo"]
    merged["grpo"]["ghosts"]["max_new_tokens"] = 8
    merged["data"]["seq_len"] = 320
    Path("self.yaml").write_text(yaml.safe_dump(merged), encoding="utf-8")
    assert main(["grpo", "--config", "self.yaml", "--run_dir", "runs/self", "--grpo.init_from", "runs/run/sft"]) == 0


def own_code(place: Place) -> None:
    """The page's Python is the module that its commands name."""
    code = [block.code for block in blocks_of("docs/own_code.md") if block.language == "python"]
    Path("own.py").write_text("\n\n".join(code), encoding="utf-8")
    assert [command[0] for command in run_all("docs/own_code.md", Runner(more=place.small)).ran] == ["sft", "sft"]
    assert "own:reward" in Path("runs/1/sft/config.yaml").read_text(encoding="utf-8")


def results(place: Place) -> None:
    """The config of the page, with rows of our own and small sizes. Its two stages share a folder."""
    small = yaml.safe_load(SETTINGS)
    options = ["--data.train", "rows.jsonl", "--data.test_rows", "8", "--tokenizer.vocab_size", "300"]
    for section in ("student", "sft", "eval"):
        options += [word for key, value in small[section].items() for word in (f"--{section}.{key}", str(value))]
    stage = ["--grpo.steps", "2", "--grpo.batch_size", "2"]
    warm = [f"--{name}.optimizer.warmup_steps=0" for name in ("sft", "grpo")]
    runner = run_all("docs/results.md", Runner(more=lambda words: [*options, *stage, *warm]))
    assert [command[0] for command in runner.ran] == ["sft", "grpo"]
    assert Path("runs/gsm8k_small/grpo/report.html").is_file()


def rollouts(place: Place) -> None:
    server = place.stack.enter_context(RolloutServer(place.folder / "served", ("vllm",)))
    run_all("docs/rollouts.md", Runner({"http://localhost:8000/v1": server.url}, place.small))
    assert len(server.loaded) == 2, "the engine has loaded the weights of each step"


def scaling(place: Place) -> None:
    run_all("docs/scaling.md", Runner())


def steps(place: Place) -> None:
    """A small model stands for the reader's."""
    B, T = 2, 6
    config = DecoderConfig(vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32)
    own, ones = make_student(config), jnp.ones((B, T), jnp.int32)
    ids = jax.random.randint(jax.random.key(1), (B, T + 1), 0, 32)
    text = SftBatch(ids[:, :-1], ids[:, 1:], jnp.cumsum(ones, 1) - 1, ones, ones)
    names: dict[str, Any] = {"params": init_params(config, jax.random.key(0)), "head": own.head, "hidden": own.hidden}
    names |= {"tx": make_optimizer(learning_rate=1e-3, total_steps=4), "drawn_BT": ids[:, 1:], "text": text}
    names |= {"log_probs_BT": jnp.full((B, T), -3.0), "advantages_BT": jnp.ones((B, T))}
    names["batch"] = importlib.import_module("cotgrpo").GhostBatch.teacher_forced(text)
    names["model"] = lambda params, *arrays: (own.hidden(params, *arrays), jnp.ones((B, T)), jnp.zeros((B, T)))
    runner = Runner(names=names)
    first, auxiliary, objective, whole = left("docs/steps.md")
    runner.run(first)
    runner.run(auxiliary)
    one = lambda step, batch: step(names["TrainState"].create(params=names["params"], tx=names["tx"], key=0), batch)[1]
    assert {"aux_loss", "dropped"} <= set(one(make_sft_step(names["student"], names["tx"]), text))
    runner.run(objective)
    trusted = dataclasses.replace(text, extra={"trust": jnp.ones((B, T))})
    assert "ghost_prob" in one(make_sft_step(names["student"], names["tx"], names["trusted"]), trusted)
    runner.run(whole)
    assert "ratio" in one(names["step"], names["batch"])


def teachers(place: Place) -> None:
    runner = run_all("docs/teachers.md", Runner({"http://localhost:8000/v1": place.scoring()}, place.small))
    assert [command[0] for command in runner.ran] == ["grpo", "generate", "grpo", "generate"]
    assert Path("ghosts/ghosts.parquet").is_file() and Path("scored/ghosts.parquet").is_file()


TESTS: dict[str, Callable[[Place], None]] = {
    "docs/answers.md": answers,
    "docs/checkpoints.md": checkpoints,
    "docs/commands.md": commands,
    "docs/data.md": data,
    "docs/evaluation.md": evaluation,
    "docs/method.md": method,
    "docs/own_code.md": own_code,
    "docs/results.md": results,
    "docs/rollouts.md": rollouts,
    "docs/scaling.md": scaling,
    "docs/steps.md": steps,
    "docs/teachers.md": teachers,
}


@pytest.mark.slow
@pytest.mark.usefixtures("teacher_key")
@pytest.mark.parametrize("page", TESTS)
def test_the_blocks_of_a_page_run(page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepared, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.syspath_prepend(tmp_path / "page")
    with ExitStack() as stack:
        TESTS[page](Place(tmp_path / "page", stack))
    logged = {key for path in Path().rglob("metrics.jsonl") for row in read_metrics(path.parent) for key in row}
    assert logged <= {"step", *documented_metrics()}, "docs/metrics.md lists every metric"


TOY = """
student: {width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 64}
sft: {steps: 2, batch_size: 2, optimizer: {warmup_steps: 0}}
grpo: {steps: 2, batch_size: 2, optimizer: {warmup_steps: 0}}
eval: {rows: 4, batch_size: 4, max_new_tokens: 8}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """The shell of docs/hosts.md, in bash, with a command that adds small sizes."""
    (block,) = [block for block in blocks_of("docs/hosts.md") if block.language == "sh"]
    (tmp_path / "toy.yaml").write_text(TOY, encoding="utf-8")
    command = tmp_path / "bin" / "cotgrpo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cotgrpo.cli "$@" --config {tmp_path}/toy.yaml\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", block.code.replace("9876", str(free_port()))],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "two" / "report.html").is_file(), done.stdout + done.stderr
