"""The model that a quantized one was made from, as its files name it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = re.compile(
    r"[-_.](gptq|awq|fp8|mxfp4|mxfp8|nvfp4|fp4|nf4|bnb|gguf|exl[23]|hqq|eetq|aqlm|vptq|quanto|mlx|torchao|autoround|"
    r"unsloth|quantized|dynamic|block|marlin|gemm|g?\d{2,3}g|w\d+a\d+|w\d+a\d+\w*|q\d\w*|u?int[2348]|[23468][-_]?bits?|"
    r"i1|imatrix)(?=[-_.]|$)",
    re.IGNORECASE,
)
"""Parts of a repository's name that tell how it was quantized."""
CARD = "README.md"


def name_original(folder: Path, name: str) -> str:
    """Return a sentence that names the unquantized model, by the model card or by the usual name. "" if unknown.

    Args:
        folder: of the quantized model.
        name: its hub id or folder.
    """
    if base := card_fields(folder).get("base_model"):
        base = base[0] if isinstance(base, list) and base else base
        if isinstance(base, str):
            return f" Its model card names {base}."
    short = Path(name).name
    plain = SUFFIXES.sub("", short)
    if plain and plain != short:
        return f" Its name suggests {plain}."
    return ""


def card_fields(folder: Path) -> Mapping[str, Any]:
    """Return the front matter of a folder's model card; empty if there is none."""
    import yaml

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
