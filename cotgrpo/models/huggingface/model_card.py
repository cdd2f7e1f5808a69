"""The model card of an exported model: base model, data, objective and accuracy."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

PARTS = ("base_model", "license", "language", "datasets", "data", "objective", "config", "accuracy", "versions")


def model_card(name: str, facts: Mapping[str, Any], library: str = "transformers") -> str:
    """Return README.md with the front matter that the hub reads. Missing facts are left out.

    Args:
        name: the title.
        facts: some of `PARTS`. `base_model`, `license`, `language` and `datasets` are hub ids for the front matter.
            `data` and `objective` are text, and `config` is a mapping. `accuracy` maps a test set's name to a number or
            to text. `versions` maps packages to versions, added to those of the core.
        library: the library that loads the folder.

    Raises:
        ValueError: a fact is not one of `PARTS`.
    """
    import yaml

    unknown = sorted(set(facts) - set(PARTS))
    if unknown:
        raise ValueError(f"A model card has no place for {unknown[0]!r}; expected some of {', '.join(PARTS)}.")
    front = {key: facts[key] for key in ("license", "language", "base_model", "datasets") if facts.get(key)}
    front |= {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["cotgrpo", "chain-of-thought"],
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n"]
    base = f" from `{facts['base_model']}`" if facts.get("base_model") else ""
    parts.append(f"A student that was trained{base} with `cotgrpo` to reason step by step.\n")
    for key, title in (("objective", "Objective"), ("data", "Data")):
        if facts.get(key):
            parts.append(f"## {title}\n\n{facts[key]}\n")
    if facts.get("accuracy"):
        rows = "".join(f"| {test} | {value} |\n" for test, value in facts["accuracy"].items())
        parts.append(f"## Accuracy\n\n| test set | accuracy |\n|---|---|\n{rows}")
    if facts.get("config"):
        config = yaml.safe_dump(plain(facts["config"]), sort_keys=False, allow_unicode=True)
        parts.append(f"## Config\n\n```yaml\n{config}```\n")
    versions = {package: importlib.metadata.version(package) for package in ("cotgrpo", "jax", "flax", "optax")}
    versions |= facts.get("versions", {})
    parts.append("## Versions\n\n" + "".join(f"- {package} {version}\n" for package, version in versions.items()))
    return "\n".join(parts)


def plain(config: Mapping[str, Any]) -> Any:
    """Return a config of JSON types, which YAML can write: tuples become lists, paths become text."""
    return json.loads(json.dumps(config, default=str))
