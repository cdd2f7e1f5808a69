"""What the package's modules may import, and how long they may be.

Most of it is read from the source, so it holds for every code path.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import jaxtyping
import pytest

from cotgrpo.types import project

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "cotgrpo").rglob("*.py"))

CORE_PACKAGES = {"jax", "flax", "optax", "numpy"}
CORE_MODULES = {
    "",  # cotgrpo/__init__.py
    "types",
    "objectives",
    "divergences",
    "token_engine",
    "train_steps",
    "optimizers",
    "sharding",
    "sampling",
    "models.attention",
    "models.blocks",
    "models.config",
    "models.decoder",
    "models.elementwise",
    "models.lora",
    "models.products",
    "models.rotary",
    "models.splash",
}
CHAIN = ("types", "objectives", "divergences", "token_engine", "train_steps", "run", "cli")
"""Each of these imports those to its left, never one to its right."""

FILE_LINES = 400
FUNCTION_LINES = 60


class Import(NamedTuple):
    """One imported module, dotted. `cotgrpo.` is cut off and marked by `own`."""

    line: int
    name: str
    own: bool
    types_only: bool
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def module_name(path: Path) -> str:
    """`models.decoder` for cotgrpo/models/decoder.py, `` for cotgrpo/__init__.py."""
    parts = path.relative_to(ROOT / "cotgrpo").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(walk(tree, types_only=False, lazy=False))


def walk(node: ast.AST, types_only: bool, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (imported(child, alias.name, types_only, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write absolute imports, `from cotgrpo.x import y`"
            yield from from_import(child, types_only, lazy)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from walk(child, True, lazy)
        else:
            yield from walk(child, types_only, lazy or isinstance(child, ast.FunctionDef | ast.Lambda))


def from_import(node: ast.ImportFrom, types_only: bool, lazy: bool) -> Iterator[Import]:
    """`from cotgrpo import data` imports `cotgrpo.data` where that is a module, else what `cotgrpo` holds."""
    assert node.module is not None
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        is_module = full.removeprefix("cotgrpo.") in MODULES
        yield imported(node, full if is_module else node.module, types_only, lazy)


def imported(node: ast.stmt, name: str, types_only: bool, lazy: bool) -> Import:
    own = name == "cotgrpo" or name.startswith("cotgrpo.")
    return Import(node.lineno, name.removeprefix("cotgrpo").lstrip(".") if own else name, own, types_only, lazy)


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def own_imports(module: str) -> list[Import]:
    return [found for found in IMPORTS[module] if found.own]


def complain(module: str, found: Import, rule: str) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{found.line} imports {found.name or 'cotgrpo'}: {rule}"


def test_the_core_imports_four_packages() -> None:
    assert set(MODULES) >= CORE_MODULES, f"no such module: {sorted(CORE_MODULES - set(MODULES))}"
    problems = [
        complain(module, found, f"the core may import {', '.join(sorted(CORE_PACKAGES))} and itself, nothing else")
        for module in sorted(CORE_MODULES)
        for found in IMPORTS[module]
        if not found.types_only
        and (
            found.name not in CORE_MODULES | {"models"}
            if found.own
            else found.top not in CORE_PACKAGES and found.top not in sys.stdlib_module_names
        )
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


def test_imports_point_down() -> None:
    problems = []
    for module in MODULES:
        top = module.partition(".")[0]
        for found in own_imports(module):
            if top in CHAIN and found.top in CHAIN[CHAIN.index(top) + 1 :]:
                problems.append(complain(module, found, f"imports point down: {' <- '.join(CHAIN)}"))
            elif top not in {*CHAIN, "config", "config_file", ""} and found.top in CHAIN[CHAIN.index("train_steps") :]:
                problems.append(complain(module, found, f"{top} stands below the steps: it may not import {found.top}"))
            elif top not in {"run", "cli", "config_file"} and found.top == "config":
                problems.append(complain(module, found, "only run and cli import config; pass the values"))
            elif top not in {""} and found.name == "":
                problems.append(complain(module, found, "import the module that defines the name, not the package"))
    assert not problems, "\n".join(problems)


def test_no_import_cycles() -> None:
    """Among imports at module level, `if TYPE_CHECKING:` included: the tests make those real."""
    edges = {m: {f.name for f in own_imports(m) if not f.lazy and f.name in MODULES} - {m} for m in MODULES}
    while leaves := [module for module, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets.difference_update(leaves)
    assert not edges, f"these modules import each other, or modules that do: {sorted(edges)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines <= FILE_LINES, f"{path.name} has {lines} lines, more than {FILE_LINES}: split it by idea"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            where = f"{path.name}:{node.lineno} {node.name}"
            assert lines <= FUNCTION_LINES, f"{where} has {lines} lines of code, more than {FUNCTION_LINES}: split it"


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


TRAIN_STEP = """
import os
import jax
import numpy as np

environment = dict(os.environ)
settings = dict(jax.config.values)

import cotgrpo
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

assert dict(os.environ) == environment, "importing cotgrpo changed the environment"
assert dict(jax.config.values) == settings, "importing cotgrpo changed JAX's configuration"

config = DecoderConfig(vocab_size=13, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
student, params = make_student(config), init_params(config, jax.random.key(0))
tx = cotgrpo.make_optimizer(learning_rate=1e-2, total_steps=10)
ones = np.ones((2, 6), np.int32)
batch = cotgrpo.SftBatch(ones * 3, ones * 4, ones * np.arange(6, dtype=np.int32), ones, ones.astype(np.float32))
state = cotgrpo.TrainState.create(params=params, tx=tx, key=0)
for make_step in (cotgrpo.make_sft_step, cotgrpo.make_grpo_step):
    step = cotgrpo.jit_step(make_step(student, tx))
    for _ in range(2):
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"].mean()) and metrics["skipped"].mean() == 0
print("steps:", int(state.step))
"""


def test_a_train_step_runs_without_the_other_dependencies(run_on_the_core_alone: Callable[..., str]) -> None:
    assert run_on_the_core_alone(TRAIN_STEP).splitlines()[-1] == "steps: 4"
