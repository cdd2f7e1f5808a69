"""The tables of docs/models.md, made from those of the package. `python tests/helpers/models_page.py` writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from cotgrpo.models.huggingface.config import decoder_config
from cotgrpo.models.huggingface.families import FAMILIES, LACKING, WRAPPERS
from helpers.published_models import PUBLISHED

UNSIZED = ("tested on random weights", "the text part of a model with images")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def families_table() -> str:
    """Return a row for each type that loads."""
    lines = [
        "| `model_type` | class in transformers | published models (parameters of the text part) |",
        "|---|---|---|",
    ]
    for kind, row in {**FAMILIES, **WRAPPERS}.items():
        sizes = [f"{name} ({size_of(hf)})" for name, hf in PUBLISHED.items() if hf["model_type"] == kind]
        published = ", ".join(sizes) or UNSIZED[kind.endswith("_text")]
        lines.append(f"| `{kind}` | {row.architecture} | {published} |")
    return "\n".join(lines)


def size_of(hf: dict[str, Any]) -> str:
    """Return the number of parameters, and of those that a token uses if that is another."""
    config = decoder_config(hf)
    size, active = (f"{count / 1e9:.2f} B" for count in (config.num_params(), config.num_active_params()))
    return size if size == active else f"{size}, {active} active"


def refused_table() -> str:
    """Return a row for each type that people ask for and that does not load."""
    rows = [f"| `{kind}` | {what} |" for kind, what in LACKING.items()]
    return "\n".join(["| `model_type` | the decoder lacks |", "|---|---|", *rows])


def filled(page: str) -> str:
    """Return the page with its tables as they are now."""
    for name, table in (("families", families_table()), ("refused", refused_table())):
        start, rest = page.split(f"<!-- {name} -->\n")
        page = f"{start}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
