"""Set up every test: eight virtual CPU devices, rank promotion as an error, and checked signatures.

The modules of cotgrpo import the names of their array types under `if TYPE_CHECKING:`, so they need neither jaxtyping
nor beartype. Here, and only here, those blocks are real and jaxtyping's import hook checks every call: a wrong shape,
dtype or type raises. NumPy arrays pass as arrays, as they do in JAX.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = "cotgrpo"

os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported; subprocesses of the tests inherit it
# Compiling takes most of the time, so LLVM optimizes nothing and JAX 0.10 uses the emitters that compile fastest.
# `XLA_FLAGS= python -m pytest` tests the programs that users run. CI runs the slow tests so.
fast_to_compile = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends the process on a flag that it does not know
    fast_to_compile += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", fast_to_compile)
# XLA's threads on a CPU. With as few as a small machine has cores, programs on eight devices may wait for each other
# without end, and XLA then ends the process.
os.environ.setdefault("NPROC", "32")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # of the programs in the cache below
# A script's background job starts with Ctrl-C ignored, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def type_checking(name: str) -> bool:
    """Return `typing.TYPE_CHECKING`: true for the modules of cotgrpo, false for all others."""
    if name != "TYPE_CHECKING":
        raise AttributeError(f"module 'typing' has no attribute {name!r}")
    return sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == PACKAGE


assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before tests/conftest.py: its signatures would go unchecked"
del typing.TYPE_CHECKING
typing.__getattr__ = type_checking  # type: ignore[attr-defined]
# Python has no such module: type checkers bring it.
sys.modules["_typeshed"] = ModuleType("_typeshed")
sys.modules["_typeshed"].DataclassInstance = object  # type: ignore[attr-defined]

import hypothesis  # noqa: E402  after the environment is set
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping._import_hook import JaxtypingTransformer  # noqa: E402

jaxtyping.Array = jax.Array | np.ndarray  # type: ignore[misc, assignment]
# Functions and methods are checked, fields of dataclasses are not: JAX builds its trees of shapes and shardings too.
JaxtypingTransformer.visit_ClassDef = JaxtypingTransformer.generic_visit  # type: ignore[method-assign, assignment]
# An int passes as a float, as in mypy.
jaxtyping.install_import_hook(PACKAGE, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
pytest.register_assert_rewrite("helpers")

from helpers.faulty_server import KEY, FaultyServer  # noqa: E402

# For meshes. Code that names no mesh runs on the first device. A test's subprocesses have one device, as a user's have.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_device", jax.devices()[0])
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("cotgrpo", deadline=None)  # tests do not time
hypothesis.settings.load_profile("cotgrpo")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled programs for this run of the tests and the processes it starts, outside the user's folder."""
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
    """`run(program, *arguments)` returns the output of a program that can import jax, flax, optax and numpy alone."""

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


@pytest.fixture
def teacher_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the key of a teacher's endpoint into the environment, and nothing else about it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """Run an endpoint that lets this key in."""
    with FaultyServer(KEY) as server:
        yield server
