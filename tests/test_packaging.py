"""The package as pip sees it: version, dependencies, extras, the command, and what the README promises."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
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


OUTSIDE_OF_A_RELEASE = re.compile(
    r"^(runs|site|quickstart_run)/|(^|/)(\.git|\.ci|\.github|\.venv|\.\w+_cache|__pycache__)/|\.pyc$|events\.out"
)
TEXTS = (
    *("LICENSE", "README.md", "README.zh.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"),
    *("pyproject.toml", "PKG-INFO"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "venv", str(folder / "env"), cwd=folder)
    python = str(folder / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "hatchling", cwd=folder)
    run(python, "-m", "hatchling", "build", "-d", str(folder / "dist"), cwd=ROOT)
    return folder / "dist"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    """Templates, the live teachers and the help's index too, and nothing else."""
    (wheel,) = built.glob(f"cotgrpo-{PROJECT['version']}-py3-none-any.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cotgrpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == tracked


@pytest.mark.slow
def test_the_sdist_holds_what_a_clone_does(built: Path, tmp_path: Path) -> None:
    """Its tests, pages, examples, notebooks and configs. The package that is built from it has the same files."""
    (sdist,) = built.glob(f"cotgrpo-{PROJECT['version']}.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert set(TEXTS) <= held
    for folder in ("cotgrpo", "configs", "docs", "examples", "notebooks", "tests", "benchmarks"):
        wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in wanted if not OUTSIDE_OF_A_RELEASE.search(name)} <= held, folder
    assert not [name for name in held if OUTSIDE_OF_A_RELEASE.search(name)]
    (source,) = tmp_path.iterdir()
    run(str(built.parent / "env" / "bin" / "python"), "-m", "hatchling", "build", "-t", "wheel", cwd=source)
    (again,), (wheel,) = (source / "dist").glob("*.whl"), built.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_changelog_begins_with_this_version() -> None:
    heads = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    released = [head for head in heads if head != "Unreleased"]
    assert released[0] == PROJECT["version"]


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"] and form["body"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in form["body"])


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
