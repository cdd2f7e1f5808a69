"""The package as pip sees it: version, dependencies, extras, the command, and what the README promises."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.package_sources import CORE_PACKAGES, IMPORTS, TRAIN_STEP
from packaging.requirements import Requirement

import cotgrpo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normalized(Requirement(line).name) for line in requirements}


BASE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
INSTALLED = importlib.metadata.packages_distributions()
THIRD_PARTY = [
    (f"cotgrpo/{module.replace('.', '/')}:{found.line}", found)
    for module, imports in IMPORTS.items()
    for found in imports
    if not found.own and found.top not in sys.stdlib_module_names | {"_typeshed"}  # type checkers bring it
]


def providers(top: str) -> set[str]:
    """The distributions that bring the top-level package `top`."""
    return {normalized(name) for name in INSTALLED.get(top, [top])}


def test_version_has_one_source() -> None:
    assert cotgrpo.__version__ == importlib.metadata.version("cotgrpo") == PROJECT["version"]


def test_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="cotgrpo")
    assert callable(script.load())


def test_every_import_is_declared() -> None:
    """By the base install; or by an extra, and then the import waits until it is used, or is one of types only."""
    extras = set().union(*EXTRAS.values())
    for where, found in THIRD_PARTY:
        if not providers(found.top) & BASE:
            assert providers(found.top) & extras, f"{where} imports {found.top}: neither dependency nor extra"
            assert found.lazy or found.types_only, f"{where} imports {found.top}, an extra, at module level"


def test_every_dependency_is_imported() -> None:
    """A package that the base install brings and nothing imports is weight for the user."""
    used = set().union(*(providers(found.top) for _, found in THIRD_PARTY))
    assert not BASE - used, f"pyproject.toml lists {sorted(BASE - used)}, but nothing in cotgrpo imports it"


def test_the_base_install_forces_no_other_framework() -> None:
    """Follows the requirements of the base install, without extras, through everything that is installed."""
    seen: set[str] = set()
    queue = sorted(BASE)
    while queue:
        name = normalized(queue.pop())
        if name in seen:
            continue
        seen.add(name)
        requirements = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not seen & {"torch", "tensorflow", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "triton", "vllm"}


def test_extras_of_jax_exist() -> None:
    """pip only warns about an extra that a package does not have."""
    offered = set(importlib.metadata.metadata("jax").get_all("Provides-Extra") or [])
    wanted = {
        extra
        for lines in PROJECT["optional-dependencies"].values()
        for line in lines
        if Requirement(line).name == "jax"
        for extra in Requirement(line).extras
    }
    assert wanted and wanted <= offered


def test_the_example_in_the_readme_runs(tmp_path: Path) -> None:
    """All of the README's Python blocks, in order, as one script."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert any("make_grpo_step" in block for block in blocks), "the README shows no ```python example of make_grpo_step"
    run(sys.executable, "-W", "error", "-c", "\n".join(blocks), cwd=tmp_path)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Templates, the live teachers and the help's index too, and nothing else."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("cotgrpo-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cotgrpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == tracked


@pytest.mark.slow
def test_the_core_in_an_environment_of_four_packages(tmp_path: Path) -> None:
    """A real one: pip installs the four and, without its dependencies, the package; then train steps run."""
    python = str(tmp_path / "env" / "bin" / "python")
    lines = [line for line in PROJECT["dependencies"] if Requirement(line).name in CORE_PACKAGES]
    assert len(lines) == len(CORE_PACKAGES)
    run(sys.executable, "-m", "venv", str(tmp_path / "env"), cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", *lines, cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT), cwd=tmp_path)
    for absent in ("datasets", "transformers", "tokenizers", "grain", "jsonargparse", "jaxtyping", "beartype"):
        assert f"No module named '{absent}'" in run(python, "-c", f"import {absent}", cwd=tmp_path, succeeds=False)
    assert run(python, "-W", "error", "-c", TRAIN_STEP, cwd=tmp_path).splitlines()[-1] == "steps: 4"


def run(*command: str, cwd: Path, succeeds: bool = True) -> str:
    """The output of a command in an environment that does not know of this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr
