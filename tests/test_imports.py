"""What the rooms of the package may import, and how large a room and a function may be.

It is read from the source, so it holds for every code path.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from helpers.package_sources import CORE_PACKAGES, IMPORTS, MODULES, ROOT, SOURCES, TRAIN_STEP, Import

from cotgrpo.types import project

ROOMS = (
    "types",
    "disk_errors",
    "atomic_files",
    "huge_pages",
    "compiler_options",
    "sharding",
    "token_shards",
    "xla_cpu",
    "objectives",
    "tiled_loss",
    "sequence_loss",
    "optimizers",
    "train_steps",
    "testing",
    "models",
    "sampling",
    "data",
    "terminal",
    "ghosts",
    "teachers",
    "teacher_servers",
    "rollout_servers",
    "config",
    "distributed",
    "checkpoints",
    "accelerators",
    "evaluation",
    "logs",
    "rollouts",
    "reports",
    "identity",
    "training",
    "runs",
    "generation",
    "planning",
    "quickstart",
    "bench",
    "commands",
    "help",
    "cli",
)
"""A room imports the rooms above it, never one below."""
UNDERNEATH = {
    "disk_errors",
    "atomic_files",
    "huge_pages",
    "compiler_options",
    "token_shards",
    "xla_cpu",
    "terminal",
    "accelerators",
    "identity",
}
"""Rooms that the README leaves to CONTRIBUTING.md."""
CORE = ROOMS[: ROOMS.index("data")]
"""What `import cotgrpo` and a whole train step need."""

FILES_OF_A_ROOM = 12
LINES_OF_A_FUNCTION = 60


OWN_IMPORTS = {module: [found for found in imports if found.own] for module, imports in IMPORTS.items()}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def complain(module: str, found: Import, rule: str) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{found.line} imports {found.name or 'cotgrpo'}: {rule}"


def test_the_map_of_the_code_has_every_room_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Map of the code")[2]
    assert re.findall(r"^  (\w+)(?:\.py|/)", text, re.MULTILINE) == [room for room in ROOMS if room != "cli"]
    assert "commands/, cli.py" in text


def test_the_readme_names_every_room() -> None:
    """Without those that hold up the others: no reader looks for them first."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Map of the code")[2].split("```")[1]
    named = {word.strip("/") for line in block.splitlines() for word in line.split()[1:]}
    assert named <= set(ROOMS) and set(ROOMS) - named <= UNDERNEATH


def test_every_room_has_a_place() -> None:
    assert {room_of(module) for module in MODULES if module} == set(ROOMS)


def test_rooms_import_the_rooms_above_them() -> None:
    problems = []
    for module, imports in OWN_IMPORTS.items():
        room = room_of(module)
        for found in imports:
            if found.name == "":
                problems.append(complain(module, found, "import the module that defines the name, not the package"))
            elif module == "":
                if found.top not in CORE:
                    problems.append(complain(module, found, "`import cotgrpo` needs the core alone"))
            elif ROOMS.index(found.top) > ROOMS.index(room):
                problems.append(complain(module, found, f"{found.top} comes after {room}"))
    assert not problems, "\n".join(problems)


def test_the_core_imports_four_packages() -> None:
    """The weights of Hugging Face models may need others, but only when they are read or written."""
    problems = [
        complain(module, found, f"the core needs {', '.join(sorted(CORE_PACKAGES))} and nothing else")
        for module, imports in IMPORTS.items()
        for found in imports
        if room_of(module) in ("", *CORE)
        and not found.own
        and not found.types_only
        and not (found.lazy and module.startswith(("models.huggingface.", "models.quantized.")))
        and found.top not in CORE_PACKAGES | sys.stdlib_module_names
    ]
    assert not problems, "\n".join(problems)


def test_type_names_cost_nothing_outside_the_tests() -> None:
    problems = [
        complain(module, found, "import it under `if TYPE_CHECKING:`; the package must run without it")
        for module in MODULES
        for found in IMPORTS[module]
        if found.top in {"jaxtyping", "beartype", "typeguard"} and not found.own and not found.types_only
    ]
    assert not problems, "\n".join(problems)


def test_no_import_cycles() -> None:
    """Among imports at module level, `if TYPE_CHECKING:` included: the tests make those real."""
    edges = {
        module: {found.name for found in imports if not found.lazy and found.name in MODULES} - {module}
        for module, imports in OWN_IMPORTS.items()
    }
    while leaves := [module for module, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets.difference_update(leaves)
    assert not edges, f"these modules import each other, or modules that do: {sorted(edges)}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda path: path.name)
def test_a_room_has_at_most_twelve_files(folder: Path) -> None:
    files = [path.name for path in folder.glob("*.py")]
    assert len(files) <= FILES_OF_A_ROOM, f"{folder.name} has {len(files)} files, more than {FILES_OF_A_ROOM}: {files}"


def test_functions_have_at_most_sixty_lines() -> None:
    """Docstrings do not count."""
    problems = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                if lines > LINES_OF_A_FUNCTION:
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not problems, "\n".join(problems)


def test_signatures_are_checked_in_tests() -> None:
    """`project(rows[..., D], head[D, V])`: what tests/conftest.py adds to every function of the package."""
    rows, head = jnp.ones((2, 3)), jnp.ones((3, 5))
    assert project(rows, head).shape == (2, 5)
    with pytest.raises(jaxtyping.TypeCheckError, match="head_DV"):
        project(rows, head.T)
    with pytest.raises(jaxtyping.TypeCheckError, match="rows_D"):
        project(rows.astype(int), head)
    with pytest.raises(jaxtyping.TypeCheckError, match="softcap"):
        project(rows, head, "30")  # type: ignore[arg-type]


def test_a_train_step_runs_without_the_other_dependencies(run_on_the_core_alone: Callable[..., str]) -> None:
    assert run_on_the_core_alone(TRAIN_STEP).splitlines()[-1] == "steps: 4"
