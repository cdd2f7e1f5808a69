"""The launch guides and notebooks: their commands parse, their configs exist, their manifests and cells are whole."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.commands import read, write_rows_and_model

from cotgrpo import cli
from cotgrpo.config import Config

ROOT = Path(__file__).parents[1]
PAGES = ("docs/launch.md", "docs/hosts.md")
NOTEBOOKS = ("notebooks/kaggle_tpu.ipynb", "notebooks/colab.ipynb")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s/\"'(])cotgrpo (sft|grpo|plan|eval|export|quickstart|generate|bench)\b([^\n\"'|;&>)]*)")
VARIABLES = {"BUCKET": "my-bucket", "REGION": "us-east5", "i": "0"}
SEVERAL_HOSTS = ("llama3_8b_v5e16", "llama3_8b_v5p32", "llama3_8b_8gpu")
"""Configs for more than one process."""


def blocks(page: str, *languages: str) -> list[str]:
    """The code of a page, with continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [re.sub(r"\\\n\s*", "", code) for language, code in BLOCK.findall(text) if language in languages]


def commands(page: str) -> list[list[str]]:
    """The arguments of every command of cotgrpo on a page, in shells, in manifests, and in text."""
    found = [match for code in blocks(page, "sh", "yaml") for match in COMMAND.findall(code)]
    for code in blocks(page, "yaml"):
        found += [
            (words[1], shlex.join(words[2:])) for words in lists_of(yaml.safe_load(code)) if words[0] == "cotgrpo"
        ]
    known = [(name, re.split(r" #| \d?>| 2$", rest)[0]) for name, rest in found]
    return [[name, *shlex.split(re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], rest))] for name, rest in known]


def lists_of(tree: Any) -> list[list[str]]:
    """Every list of strings in a manifest."""
    if isinstance(tree, list) and tree and all(isinstance(item, str) for item in tree):
        return [tree]
    return [
        found
        for item in (tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ())
        for found in lists_of(item)
    ]


def read_only(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Let every command read its arguments and its config, and do nothing. Returns what the last one read."""
    seen: list[Config] = []
    for name in ("sft", "grpo", "plan", "eval"):
        module = importlib.import_module(f"cotgrpo.commands.{name}")
        monkeypatch.setattr(module, "run", lambda options, console: seen.append(options.settings(Config())))
    for name in ("export", "quickstart"):
        module = importlib.import_module(f"cotgrpo.commands.{name}")
        monkeypatch.setattr(module, "run", lambda options, console: seen.append(Config()))
    monkeypatch.setattr(cli, "join_processes", lambda arguments: None)
    return seen


PARSED = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_have_commands() -> None:
    assert len(PARSED) >= 12
    assert {command[0] for _, command in PARSED} >= {"sft", "plan", "quickstart"}


@pytest.mark.parametrize(
    ("page", "command"), PARSED, ids=[f"{Path(page).stem}-{number}" for number, (page, _) in enumerate(PARSED)]
)
def test_commands_parse(
    page: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line itself, from the repository's folder, with the config that they name."""
    monkeypatch.chdir(ROOT)
    seen = read_only(monkeypatch)
    assert cli.main(command) == 0, f"{page}: {command}: {capsys.readouterr().err}"
    assert len(seen) == 1


@pytest.mark.parametrize("wrong", [["sft", "--checkpoint.folders", "x"], ["sft", "--config", "configs/none.yaml"]])
def test_a_wrong_command_would_be_found(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only(monkeypatch)
    assert cli.main(wrong) == 2 and capsys.readouterr().err


def test_commands_for_several_hosts_name_a_shared_folder() -> None:
    for _, command in PARSED:
        config = command[command.index("--config") + 1] if "--config" in command else ""
        if command[0] in ("sft", "grpo") and Path(config).stem.startswith(SEVERAL_HOSTS):
            shared = dict(itertools.pairwise(command))
            place = shared.get("--checkpoint.folder", shared.get("--run_dir", ""))
            assert place.startswith(("gs://", "/shared/")), command


def test_runs_that_outlive_the_connection() -> None:
    """What is started over ssh is in the background, with its output in a file."""
    started = [
        line for code in blocks("docs/launch.md", "sh") for line in code.splitlines() if "bin/cotgrpo sft" in line
    ]
    over_ssh = [line for line in started if "on_all" in line or "ssh" in line]
    assert len(over_ssh) >= 3
    for line in over_ssh:
        assert "nohup" in line and "< /dev/null &" in line and "> sft.log 2>&1" in line, line


def test_install_lines_work_from_a_clone() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    for page in ("README.md", "README.zh.md", *pages, *NOTEBOOKS):
        text = (ROOT / page).read_text(encoding="utf-8")
        for line in text.splitlines():
            if "pip install" in line:
                names = re.findall(r"pip install ([^&|`#\\]*)", line)
                assert all("'cotgrpo" not in name for name in names), f"{page}: not on the package index: {line}"
        if page == "docs/launch.md":
            assert "OWNER: the account" in text and "git clone $REPOSITORY" in text and "uv venv --python 3.12" in text


def test_extras_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in (*PAGES, *NOTEBOOKS):
        named = re.findall(r"'\.\[([a-z,]+)\]'", (ROOT / page).read_text(encoding="utf-8"))
        assert {extra for names in named for extra in names.split(",")} <= extras.keys(), page


def test_shells_are_whole() -> None:
    for page in PAGES:
        for number, code in enumerate(blocks(page, "sh")):
            checked = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
            assert checked.returncode == 0, f"{page}, block {number}: {checked.stderr}"


def test_cloud_commands_have_their_flags() -> None:
    lines = [line for code in blocks("docs/launch.md", "sh") for line in code.splitlines()]
    needs = {
        "gcloud compute tpus queued-resources create": ("--accelerator-type=", "--runtime-version=", "--node-"),
        "gcloud compute instance-templates create": ("--machine-type=", "--image-family=", "--boot-disk-size="),
        "gcloud compute instance-groups managed create": ("--template=", "--size=", "--workload-policy=", "--zone="),
        "gcloud compute resource-policies create workload-policy": ("--type=", "--accelerator-topology=", "--region="),
        "gcluster job submit": ("--name", "--cluster", "--location", "--compute-type", "--image", "--command"),
    }  # fmt: skip
    for start, flags in needs.items():
        found = [line for line in lines if line.startswith(start)]
        assert found, start
        for line in found:
            assert all(flag in line for flag in flags), line


def test_the_manifest_runs_every_host_of_its_slice() -> None:
    (job,) = [
        tree for code in blocks("docs/launch.md", "yaml") if (tree := yaml.safe_load(code)).get("kind") == "JobSet"
    ]
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    sides = [int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == sides[0] * sides[1] // chips
    assert job["apiVersion"].startswith("jobset.x-k8s.io/") and pod["restartPolicy"] == "Never"
    assert container["image"] and container["command"][0] == "cotgrpo"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_named_files_exist() -> None:
    for page in (*PAGES, *NOTEBOOKS):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in set(re.findall(r"configs/[\w./-]+", text)):
            assert (ROOT / name.rstrip(".")).exists(), f"{page} names {name}"
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]+)?\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def cells(name: str) -> list[dict[str, Any]]:
    return read(ROOT / name)["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_whole(name: str) -> None:
    notebook = read(ROOT / name)
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["source"], list)
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    host = {
        "kaggle_tpu": "https://kaggle.com/kernels/welcome?src=",
        "colab": "https://colab.research.google.com/github/",
    }
    badge = (
        host[Path(name).stem] + ("https://github.com/" if "kaggle" in name else "") + f"OWNER/cotgrpo/blob/main/{name}"
    )
    assert badge in "".join(cells(name)[0]["source"])
    assert badge in (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    text = json.dumps(notebook)
    assert "import jax" not in text, "a TPU serves one process at a time"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells in order, as they are, with a small model and a few rows in place of those of the hub.

    Commands of cotgrpo run in this process, which has imported JAX already.
    """
    write_rows_and_model(tmp_path)
    config = tmp_path / "small.yaml"
    rows = f"data: {{train: [{tmp_path / 'rows.jsonl'}], seq_len: 320, test_rows: 12}}"
    text = (tmp_path / "c.yaml").read_text(encoding="utf-8").replace("data: {seq_len: 320, test_rows: 12}", rows)
    config.write_text(text, encoding="utf-8")
    program = tmp_path / "environment" / "bin" / "cotgrpo"
    program.parent.mkdir(parents=True)
    run = tmp_path / "working" / "run"
    settings = {"CONFIG": config, "RUN": run, "ENVIRONMENT": program.parents[1], "REPOSITORY": ROOT}
    for key, value in settings.items():
        monkeypatch.setenv(f"COTGRPO_{key}", str(value))
    called: list[str] = []

    def in_this_process(command: str, *, shell: bool, check: bool, cwd: Path) -> None:
        """Stands for `subprocess.run`, with the arguments that the notebooks give it."""
        words = shlex.split(command)
        assert shell and check and cwd == ROOT and words[0] == str(program), command
        called.append(words[1])
        assert cli.main(words[1:]) == 0, command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    names: dict[str, Any] = {}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    assert called == ["sft", "grpo", "eval", "export"]
    assert (run / "sft" / "report.html").exists() and (run / "grpo" / "report.html").exists()
    assert read(run / "grpo" / "eval.json")
    assert (run.parent / "student" / "config.json").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_without_an_account_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The badge and the clone need the account that the repository belongs to."""
    monkeypatch.setenv("COTGRPO_REPOSITORY", str(tmp_path / "none"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is installed"))
    code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    exec(code[0], names)
    with pytest.raises(SystemExit, match="OWNER"):
        exec(next(cell for cell in code if "git clone" in cell), names)
