"""How every test runs: on eight virtual CPU devices, no rank promoted in silence, the package's signatures checked.

The modules of cotgrpo write shapes in their signatures and import the names for them under `if TYPE_CHECKING:`, so that
they need neither jaxtyping nor beartype. Here, and only here, an import hook makes those blocks real and puts the two
packages' check around every function and method of cotgrpo: a call with a wrong shape, dtype or type raises. NumPy
arrays pass as arrays, as they do in JAX. Nothing is written to disk: code that runs outside the tests is never checked.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType

PACKAGE = "cotgrpo"

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; subprocesses of the tests inherit it
# Most of the time goes into compiling, and half of that into LLVM's optimizations; XLA's own are made all the same.
# `XLA_FLAGS= python -m pytest` tests the programs that users run, as CI does with the slow tests.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # of the programs that `compilation_cache` below keeps
# A script's background job starts with Ctrl-C ignored, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


CHECK = "@__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)\ndef _(): ..."
ARRAY = "Array = __import__('jax').Array | __import__('numpy').ndarray"


class SignatureChecks(ast.NodeTransformer):
    """Makes `if TYPE_CHECKING:` `if True:` and adds the check as the innermost decorator of functions and methods.

    Functions inside functions are left alone: they are the traced bodies of what is checked already.
    """

    def visit_If(self, node: ast.If) -> ast.If:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.test = ast.copy_location(ast.Constant(True), node.test)
            names = {alias.name for part in node.body if isinstance(part, ast.ImportFrom) for alias in part.names}
            if "Array" in names:
                node.body.append(ast.copy_location(ast.parse(ARRAY).body[0], node.body[-1]))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        check = ast.parse(CHECK).body[0]
        assert isinstance(check, ast.FunctionDef)
        node.decorator_list.append(ast.copy_location(check.decorator_list[0], node))
        return node


class CheckedLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = SignatureChecks().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class CheckedFinder:
    """First on `sys.meta_path`: finds the package's modules as Python would, and gives them the loader above."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


# Python has no such module: type checkers bring it.
sys.modules["_typeshed"] = ModuleType("_typeshed")
sys.modules["_typeshed"].DataclassInstance = object  # type: ignore[attr-defined]

assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before tests/conftest.py: its signatures would go unchecked"
sys.meta_path.insert(0, CheckedFinder)

import hypothesis  # noqa: E402
import jax  # noqa: E402  after the environment is set
import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")

# For meshes; what names no mesh runs on the first device, commands too. Subprocesses of a test have one, as a user's process has.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_device", jax.devices()[0])
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("cotgrpo", deadline=None)  # tests do not time
hypothesis.settings.load_profile("cotgrpo")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Slow tests begin no later than `COTGRPO_SLOW_UNTIL`, in seconds since 1970, if it is set: CI has so much time and no more, on slow machines too."""
    if item.get_closest_marker("slow") and time.time() > float(os.environ.get("COTGRPO_SLOW_UNTIL", "inf")):
        pytest.skip("the time for slow tests is up")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs are kept for this run of the tests and the processes they start, not in the user's folder: many tests compile the same one."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("programs"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


CORE_ALONE = """
import sys
import flax.linen, flax.struct, jax, jax.numpy as jnp, numpy as np, optax

jax.jit(jax.grad(lambda x: jnp.sum(x @ x)))(jnp.ones((2, 2)))  # what JAX itself imports late
known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {"cotgrpo"}

class NothingElse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in known:
            raise ImportError(f"jax, flax, optax and numpy alone are needed here, but {name} was imported")

sys.meta_path.insert(0, NothingElse)
"""


@pytest.fixture
def run_on_the_core_alone() -> Callable[..., str]:
    """`run(program, *arguments)`: the output of a Python program in which nothing but jax, flax, optax and numpy can be imported."""

    def run(program: str, *arguments: str) -> str:
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", CORE_ALONE + program, *arguments],
            capture_output=True,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
