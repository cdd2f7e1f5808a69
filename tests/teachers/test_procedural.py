"""The procedural teacher: its rationales and answers against Python's own arithmetic, read from the text alone."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.teachers.procedural import KINDS, Operation, ProceduralTeacher, write_triples

SIZES = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 3), (6, 2), (15, 1)]


def value(expression: str) -> int:
    """By Python, of whole numbers and + - * / alone; a division must leave nothing."""
    assert re.fullmatch(r"\d+([-+*/]\d+)*", expression), expression
    left, slash, right = expression.partition("/")
    if slash:
        assert int(left) % int(right) == 0
        return int(left) // int(right)
    return eval(expression, {"__builtins__": {}})


def answer_to(question: str) -> int:
    """What a reader who knows no more than the question answers."""
    n = [int(digits) for digits in re.findall(r"\d+", question)]
    if found := re.fullmatch(r"What is ([\d+-]+)\?", question):
        return value(found[1])
    if found := re.fullmatch(r"(\w+) has \d+ (\w+)\.( \1 \w+ \d+ \2\.)+ How many \2 has \1 now\?", question):
        signs = [-1 if verb in ("sells", "loses", "gives") else 1 for verb in re.findall(r" (\w+) \d+ ", question)[1:]]
        assert len(signs) == len(n) - 1
        return n[0] + sum(sign * amount for sign, amount in zip(signs, n[1:], strict=True))
    if re.fullmatch(r"\w+ buys \d+ \w+ at \d+ coins each and pays \d+ coins\. How many coins are left\?", question):
        return n[2] - n[0] * n[1]
    more = re.fullmatch(
        r"(\w+) has \d+ (\w+)\. (\w+) has \d+ \2 (more|less) than \1\. How many \2 do both have\?", question
    )
    if more:
        assert more[1] != more[3]
        return 2 * n[0] + (n[1] if more[4] == "more" else -n[1])
    boxes = r"(\w+) has \d+ (\w+) and (\w+) has \d+ \2\. They fill \d+ equal boxes\. How many \2 are in a box\?"
    if found := re.fullmatch(boxes, question):
        assert found[1] != found[3]
        return value(f"{n[0] + n[1]}/{n[2]}")
    raise AssertionError(f"no such question: {question}")


def check_rationale(triple: Triple, kind: str) -> None:
    """Every line is true; each result is made of the digits of its steps; each operation uses what is known by then."""
    known = set(re.findall(r"\d+", triple.question))
    result = None
    for line in triple.rationale.split("\n"):
        left, equals, right = line.partition("=")
        if not equals:
            operation, steps = line, []
            assert set(re.findall(r"\d+", line)) <= known, line
        elif left:
            assert value(left) == value(right), line
            steps.append(line)
        else:
            result = int(right)
            assert result == value(operation), (operation, line)
            if "/" in operation:
                digits = "".join(re.fullmatch(r"\d+=\d\*(\d)\+\d", step)[1] for step in steps)
            else:
                values = [step.partition("=")[2] for step in steps]
                digits = values[-1] + "".join(digit[-1] for digit in reversed(values[:-1]))
            assert int(digits) == result, (operation, steps)
            known.add(right)
    assert str(result) == triple.answer, triple


@pytest.mark.parametrize(("digits", "steps"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_rationales_and_answers_are_right(kind: str, digits: int, steps: int) -> None:
    teacher = ProceduralTeacher(seed=5, kinds=(kind,), digits=digits, steps=steps)
    for triple in itertools.islice(teacher, 100):
        assert triple.answer == str(answer_to(triple.question)), triple
        assert int(triple.answer) >= 0
        check_rationale(triple, kind)
        assert triple.id.startswith(kind)
        drawn = re.findall(r"\d+", triple.question)
        assert all(len(number) <= digits + len(str(steps)) + 1 for number in drawn) and "-0" not in triple.question


@pytest.mark.parametrize(
    ("operation", "lines"),
    [
        (Operation(47, "+", 85), "47+85 7+5=12 4+8+1=13 =132"),
        (Operation(132, "-", 19), "132-19 12-9=3 3-1-1=1 1-0=1 =113"),
        (Operation(100, "-", 99), "100-99 10-9=1 10-9-1=0 1-0-1=0 =1"),
        (Operation(5, "+", 999), "5+999 5+9=14 0+9+1=10 0+9+1=10 =1004"),
        (Operation(3, "*", 14), "3*14 3*4=12 3*1+1=4 =42"),
        (Operation(84, "/", 6), "84/6 8=6*1+2 24=6*4+0 =14"),
        (Operation(28, "/", 7), "28/7 28=7*4+0 =4"),
        (Operation(612, "/", 6), "612/6 6=6*1+0 1=6*0+1 12=6*2+0 =102"),
        (Operation(0, "-", 0), "0-0 0-0=0 =0"),
    ],
)
def test_operations_by_hand(operation: Operation, lines: str) -> None:
    assert operation.lines() == lines.split()


@pytest.mark.parametrize("held_out", [False, True])
def test_the_same_seed_gives_the_same_triples(held_out: bool) -> None:
    teacher = ProceduralTeacher(seed=7, held_out=held_out)
    first = list(itertools.islice(teacher, 100))
    assert list(itertools.islice(teacher, 100)) == first
    assert list(itertools.islice(ProceduralTeacher(seed=7, held_out=held_out), 100)) == first
    assert list(itertools.islice(ProceduralTeacher(seed=8, held_out=held_out), 100)) != first
    assert {t.id.rpartition("-")[0].rpartition("-")[0] for t in first} == set(KINDS)
    assert len({t.id for t in first}) == 100


def test_every_platform_and_process_gives_the_same_triples() -> None:
    """Whatever the hash seed. The triple itself is pinned: another stream would change every result."""
    code = "from cotgrpo.teachers.procedural import *; print(ProceduralTeacher(seed=3).draw(50))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout == f"{ProceduralTeacher(seed=3).draw(50)}\n"
    triple = next(iter(ProceduralTeacher(seed=3, kinds=("column_addition",), steps=1)))
    assert (triple.question, triple.answer, triple.id) == ("What is 58+43?", "101", "column_addition-3-0")


def sums(triples: list[Triple]) -> set[str]:
    """The operations, story left out."""
    return {" ".join(line for line in t.rationale.split("\n") if "=" not in line) for t in triples}


def test_held_out_sums_are_never_trained_on() -> None:
    """All sums of two digits, under several seeds and two stories: disjoint, complete, and in proportion."""
    kinds = ("column_addition", "gains_and_losses")
    parts: dict[bool, set[str]] = {}
    for held_out in (False, True):
        teachers = [ProceduralTeacher(s, kinds, 1, 1, held_out, held_out_fraction=0.2) for s in range(3)]
        parts[held_out] = sums([t for teacher in teachers for t in itertools.islice(teacher, 700)])
    assert not parts[True] & parts[False]
    additions = {f"{a}+{b}" for a in range(1, 10) for b in range(1, 10)}
    assert additions <= parts[True] | parts[False]
    assert 8 <= len(parts[True] & additions) <= 25  # 16.2 on average


def test_the_held_out_part_is_the_same_for_every_seed() -> None:
    training = sums(ProceduralTeacher(seed=0).draw(1000))
    for seed in range(1, 4):
        assert not training & sums(ProceduralTeacher(seed=seed, held_out=True).draw(100))


def test_draw() -> None:
    teacher = ProceduralTeacher(seed=1, kinds=("column_addition",), digits=1, steps=1)
    triples = teacher.draw(40)
    assert len({t.question for t in triples}) == 40 and teacher.draw(0) == []
    assert [t for t in dict.fromkeys(itertools.islice(teacher, 200)) if t in triples][:40] == triples
    with pytest.raises(ValueError, match=r"Only 7\d different questions were found, 82 are wanted: raise digits \(1\)"):
        teacher.draw(82)  # of 81, the held-out ones are not to be had


def test_the_stream_does_not_end_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(1 for _ in itertools.islice(ProceduralTeacher(digits=1, steps=1), 2000)) == 2000
    monkeypatch.setattr("cotgrpo.teachers.procedural.DRAWS_WITHOUT_SUM", 3000)  # what is left out: some seconds
    empty = ProceduralTeacher(kinds=("column_addition",), digits=1, steps=1, held_out=True, held_out_fraction=1e-3)
    with pytest.raises(ValueError, match=r"No sum fell into the held-out part .held_out_fraction 0.001.: raise digits"):
        next(iter(empty))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("column_additions",)}, r"kinds must name some of column_addition, .*got \('column_additions',\)"),
        ({"kinds": ()}, "kinds must name some of"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"digits": 0}, "digits must be at least 1, got 0"),
        ({"digits": 16}, "digits must be at most 15, got 16"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"held_out_fraction": 0.0}, r"held_out_fraction must be in \[0.001, 0.999\], got 0.0"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction must be in \[0.001, 0.999\], got 1.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProceduralTeacher(**arguments)


def test_written_triples_are_read_again(tmp_path: Path) -> None:
    triples = ProceduralTeacher().draw(50)
    write_triples(tmp_path / "rows.jsonl", triples)
    again, report = read_triples(tmp_path / "rows.jsonl")
    assert report.dropped == {}
    for old, new in zip(triples, again, strict=True):
        assert (old.question, old.rationale, old.answer, old.id) == (new.question, new.rationale, new.answer, new.id)
