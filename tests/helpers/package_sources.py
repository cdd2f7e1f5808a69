"""The package as its source has it: its modules, what each imports, and a program that needs the core alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "cotgrpo").rglob("*.py"))

CORE_PACKAGES = {"jax", "flax", "optax", "numpy"}


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
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, types_only, lazy or in_function)


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
