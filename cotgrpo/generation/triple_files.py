"""Output files of `generate`: triples as JSONL or Parquet, and their data set card."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import whole_file, write_text
from cotgrpo.config import GenerateConfig

COLUMNS = {
    "id": "string",
    "question": "string",
    "rationale": "string",
    "answer": "string",
    "gold": "string",
    "correct": "bool",
    "teacher": "string",
}
FORMATS = ("jsonl", "parquet")
RIGHT = {
    "error": "its answer is that of the question's row",
    "majority": "its answer is that of the question's row, or of most replies to the question if the row has none",
    "unverified": "its answer is that of the question's row; if the row has none, every reply counts, unverified",
}
"""`verify.without_gold` -> the rule of a right reply."""
KEPT = {
    "all": "all",
    "shortest": "at most {}, the shortest",
    "diverse": "at most {}, those that differ most",
    "best": "at most {}, those with the highest reward",
}
"""`verify.keep` -> the kept replies."""


def write_rows(out: Path, rows: list[dict[str, Any]], form: str) -> Path:
    """Write `triples.jsonl` or `triples.parquet` atomically, and remove the file of the other format."""
    path = out / f"triples.{form}"
    if form == "jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        import datasets

        datasets.disable_progress_bars()  # the command has its own
        features = datasets.Features({name: datasets.Value(kind) for name, kind in COLUMNS.items()})
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    for other in FORMATS:
        if other != form:
            (out / f"triples.{other}").unlink(missing_ok=True)
    return path


def write_card(out: Path, config: GenerateConfig, summary: dict[str, Any]) -> None:
    """Write README.md with the hub's front matter: teacher, prompt, checks and counts, but no endpoint address."""
    import yaml

    teacher, verify = config.teacher, config.verify
    front = {
        "configs": [{"config_name": "default", "data_files": f"triples.{config.format}"}],
        "task_categories": ["text-generation"],
        "tags": ["cotgrpo", "chain-of-thought", "reasoning", "synthetic"],
    }
    sources = [config.questions] if isinstance(config.questions, str) else config.questions
    tests = [verify.test_sets] if isinstance(verify.test_sets, str) else verify.test_sets
    sampling = {name: getattr(teacher, name) for name in ("temperature", "top_p", "max_tokens")}
    named = ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None)
    judge = verify.function or verify.check
    right = f"the function `{judge}` accepts it" if judge else RIGHT[verify.without_gold]
    kept = KEPT[verify.keep].format(verify.keep_at_most) + (f" (`{verify.reward}`)" if verify.reward else "")
    tested = f"{', '.join(f'`{t}`' for t in tests)} ({verify.ngram}-grams of words)" if tests else "none"
    prompt = json.dumps(dataclasses.asdict(config.prompt), indent=1, ensure_ascii=False)
    left_out = summary["rejected"] | {"right but not chosen": summary["not_chosen"], "no reply": summary["failed"]}
    counts = "".join(f"| {reason} | {count} |\n" for reason, count in left_out.items())
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {out.resolve().name}

{summary["kept"]} triples of question, rationale and answer, for {summary["questions_with_triples"]} questions. The
rationales were written by a language model, `{teacher.name}`, and its provider's terms apply to them. The questions
have the licence of their source.

- Questions: {", ".join(f"`{s}`" for s in sources)}{f" (split {config.split})" if config.split else ""}
- Teacher: `{teacher.name}`, {named}, {config.candidates} {"reply" if config.candidates == 1 else "replies"} a question
- A reply is right if {right}
- Kept of a question's right replies: {kept}
- Test sets for decontamination: {tested}

| requests | {summary["requests"]} |
|---|---|
| kept | {summary["kept"]} |
{counts}
Columns: {", ".join(COLUMNS)}; `correct` is true if the answer was verified, else null.

## Prompt

```json
{prompt}
```

Made by `cotgrpo generate`, version {importlib.metadata.version("cotgrpo")}.
"""
    write_text(out / "README.md", text)
