"""Measures how many parameters of the package are annotated `Any`.

    python tests/helpers/any_share.py            a line for each room
    python tests/helpers/any_share.py sampling   the parameters themselves, of the rooms named

`test_signatures.py` holds the shares.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cotgrpo"
CORE = ("types", "objectives", "tiled_loss", "sequence_loss", "train_steps", "sharding", "sampling", "models")
"""The rooms whose arguments are arrays."""


def room_of(path: Path) -> str:
    """Returns the first part of a module's path inside the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def parameters(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields `(place, is_any)` for each parameter of each function in a file, methods and nested functions included.

    `Any | None`, `*args: Any` and `**kwargs: Any` count as `Any`. So does a parameter without annotation, except `self`
    and `cls`.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        for argument in arguments:
            if argument.arg in ("self", "cls"):
                continue
            written = "Any" if argument.annotation is None else ast.unparse(argument.annotation).strip("'\"")
            is_any = "Any" in [part.strip() for part in written.split("|")]
            yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}({argument.arg})", is_any


def any_share(rooms: tuple[str, ...] = ()) -> tuple[int, int]:
    """Returns `(parameters that are Any, all parameters)` of these rooms; of the package if none is named."""
    found = [
        is_any
        for path in sorted(PACKAGE.rglob("*.py"))
        if not rooms or room_of(path) in rooms
        for _, is_any in parameters(path)
    ]
    return sum(found), len(found)


def main() -> None:
    """Prints the shares, or the parameters of the rooms that are named."""
    paths = sorted(PACKAGE.rglob("*.py"))
    if named := sys.argv[1:]:
        print(
            *(place for path in paths if room_of(path) in named for place, is_any in parameters(path) if is_any),
            sep="\n",
        )
        return
    for title, rooms in [(room, (room,)) for room in sorted({room_of(path) for path in paths})] + [
        ("core", CORE),
        ("package", ()),
    ]:
        count, total = any_share(rooms)
        print(f"{title:15} {count:4} of {total:5}  {count / total if total else 0:6.1%}")


if __name__ == "__main__":
    main()
