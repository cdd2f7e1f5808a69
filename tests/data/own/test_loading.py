"""Code of a user's own by its path: what is wrong with it is one line that names it and the line of its file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from cotgrpo.data.own.loading import OwnCodeError, call, load_function, load_object, path_of
from cotgrpo.data.own.verifier import Verdict, Verifier

NUMBER = itertools.count()
MODULE = '''
import json

class Thing:
    """A class."""
    constant = 3

    @staticmethod
    def inner(row):
        return row

def right(reply, gold, row):
    return True

def two(reply, gold):
    return True

def named(*, reply, gold, row):
    return True

def anything(*arguments):
    return True

def raises(reply, gold, row):
    return row["unit"]

def deep(reply, gold, row):
    return json.loads("{")

def leaves(reply, gold, row):
    raise SystemExit("bye")

number = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, new in each test: Python keeps what it has imported."""
    monkeypatch.chdir(tmp_path)
    name = f"own_code_of_a_test_{next(NUMBER)}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{m}", "verify.function must be package.module:function, got"),
        ("{m}:", "must be package.module:function"),
        (":right", "must be package.module:function"),
        ("{m}:wrong", "has no attribute 'wrong'"),
        ("{m}:Thing.other", "has no attribute 'other'"),
        (
            "no_such_module_of_a_test:f",
            r"\(ModuleNotFoundError: No module named 'no_such_module_of_a_test'\)\. Expected",
        ),
        ("{m}:number", "must be a function, got a int"),
        ("{m}:two", r"must take \(reply, gold, row\), got a function of \(reply, gold\)"),
        ("{m}:named", r"must take \(reply, gold, row\)"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(module: str, path: str, message: str) -> None:
    with pytest.raises(OwnCodeError, match=message) as found:
        load_function(path.format(m=module), "verify.function", ("reply", "gold", "row"))
    assert "\n" not in str(found.value) and str(found.value).startswith("verify.function")


@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module_of_a_test\n", "1 / 0\n", "raise SystemExit\n"])
def test_a_module_that_fails_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"own_code_of_a_test_{next(NUMBER)}"
    (tmp_path / f"{name}.py").write_text(f"# a comment\n{text}", encoding="utf-8")
    with pytest.raises(OwnCodeError, match=rf"{name}.py:2\. Expected") as found:
        load_object(f"{name}:f", "callbacks")
    assert "\n" not in str(found.value)


def test_functions_classes_and_what_is_in_them_are_found(module: str) -> None:
    assert load_function(f"{module}:anything", "reward", ("reply", "gold", "row"))()
    assert load_object(f"{module}:Thing.constant", "reward") == 3
    assert load_function(f"{module}:Thing.inner", "row_function", ("row",))({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"rows.jsonl:3: verify.function \S+:raises failed \(KeyError: 'unit'\) at \S+.py:25\. Fix it\."),
        ("deep", r"failed \(JSONDecodeError: .*\) at \S+own_code_of_a_test_\d+.py:28\."),
        ("leaves", r"failed \(SystemExit: bye\) at \S+.py:31\."),
    ],
)
def test_a_function_that_fails_names_itself_the_row_and_its_line(module: str, name: str, message: str) -> None:
    function = load_object(f"{module}:{name}", "verify.function")
    with pytest.raises(OwnCodeError, match=message):
        call(function, f"{module}:{name}", "verify.function", "rows.jsonl:3", "a", "b", {})  # type: ignore[arg-type]


def test_an_object_has_a_path_for_settings(module: str) -> None:
    right = load_object(f"{module}:right", "verify.function")
    assert path_of(right) == f"{module}:right" and path_of("a:b") == "a:b"
    first, second = (lambda: 1), (lambda: 2)
    paths = [path_of(first), path_of(second), path_of(first)]
    assert paths[0] == paths[2] != paths[1] and load_object(paths[1], "callbacks") is second


GIVEN = {
    "True": (True, Verdict(True)),
    "NumPy": (np.bool_(False), Verdict(False)),
    "message": ((False, "no unit"), Verdict(False, message="no unit")),
}


@pytest.mark.parametrize("name", GIVEN)
def test_verdicts(name: str) -> None:
    given, want = GIVEN[name]
    seen = []

    def verify(reply: str, gold: str, row: dict[str, object]) -> object:
        seen.append((reply, gold, dict(row)))
        row.clear()  # a copy: nothing else sees it
        return given

    row = {"unit": "m"}
    assert Verifier(verify)("a <sep> 3", "3", "4", row, "rows.jsonl:1") == want
    assert seen == [("a <sep> 3", "4", {"unit": "m"})] and row == {"unit": "m"}


@pytest.mark.parametrize("given", [None, 1, 0.0, "yes", [True], (True, 3), (True, "a", "b"), np.array([True]), {}])
def test_other_verdicts_are_an_error(given: object) -> None:
    with pytest.raises(OwnCodeError, match=r"^rows.jsonl:1: verify.function .* must return True or False.*, got"):
        Verifier(lambda reply, gold, row: given)("a", "a", "a", {}, "rows.jsonl:1")


@pytest.mark.parametrize("given", [1, 0.5, True, np.float32(2.0), np.int64(-3), np.array(0.25)])
def test_rewards(given: object) -> None:
    verdict = Verifier(reward=lambda reply, gold, row: given)("41", "41", "42", {}, "rows.jsonl:1")
    assert verdict == Verdict(False, float(given), verdict.message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [None, "1", math.nan, math.inf, -math.inf, 1e39, 10**400, [1.0], np.zeros(2), {}, 1j, (1.0, "why")]
)
def test_other_rewards_are_an_error(given: object) -> None:
    with pytest.raises(OwnCodeError, match=r"^rows.jsonl:1: verify.reward .* must return a finite number, got"):
        Verifier(reward=lambda reply, gold, row: given)("a", "a", "a", {}, "rows.jsonl:1")
