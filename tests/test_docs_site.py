"""The documentation site: every page and setting is in it, and a broken link is an error."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.pages import documented_metrics

import cotgrpo
from cotgrpo.config import Config
from cotgrpo.config.sections import settings_in

ROOT = Path(__file__).parents[1]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("build_site")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](data.md#files) b", "[a](data.md#files) b"),
        ("[a](../docs/data.md)", "[a](data.md)"),
        ("see [`c`](../configs/gsm8k_small.yaml).", "see `c`."),
        ("![p](ghost_tokens.svg)", "![p](ghost_tokens.svg)"),
        ("[out](https://example.org/x)", "[out](https://example.org/x)"),
        ("[here](#files)", "[here](#files)"),
        ("```\n[a](nowhere.py)\n```", "```\n[a](nowhere.py)\n```"),
    ],
)
def test_links(site: Any, text: str, expected: str) -> None:
    assert site.out_of_site(text, "docs/steps.md", {"data.md"}) == expected


@pytest.mark.parametrize("target", ["nowhere.md", "../configs/none.yaml", "data.md/x"])
def test_a_link_to_nothing(site: Any, target: str) -> None:
    with pytest.raises(SystemExit, match=rf"docs/steps.md: a link to {re.escape(target)}"):
        site.out_of_site(f"[a]({target})", "docs/steps.md", {"data.md"})


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere(site: Any, tmp_path: Path) -> None:
    site.write_sources(tmp_path / "sources")
    written = {path.name for path in (tmp_path / "sources").glob("*.md")}
    assert written >= {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "settings.md", "api.md"}
    assert "without it" in (tmp_path / "sources" / "report.md").read_text(encoding="utf-8")
    for path in (tmp_path / "sources").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for _, _, target in site.LINK.findall(text):
            file, _, place = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            other = path if not file else tmp_path / "sources" / file
            assert other.is_file(), f"{path.name}: {target}"
            if place and other.suffix == ".md":
                assert place in anchors(other.read_text(encoding="utf-8")), f"{path.name}: {target}"


def anchors(text: str) -> set[str]:
    """The places in a page, by its headings, as the site names them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"[^\w\s-]", "", head.replace("`", "").lower()).strip() for head in heads]
    return {re.sub(r"[\s-]+", "-", head) for head in plain}


def test_every_setting_and_public_name_is_in_the_reference(site: Any) -> None:
    settings = "\n".join(site.settings_page(site.read_index()))
    names = re.findall(r"^- `([^`]*)`", settings, re.M)
    for setting in settings_in(Config()):
        assert f"--{setting.key}" in names, setting.key
    api = "\n".join(site.api_page())
    for name in cotgrpo.__all__:
        assert re.search(rf"^::: cotgrpo\.[\w.]+\.{name}$", api, re.M), name


def test_every_metric_of_the_reference_is_in_the_code() -> None:
    """Tests that run stages check the reverse (test_page_commands.py)."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "cotgrpo").rglob("*.py"))
    names = documented_metrics()
    assert len(names) > 35
    for name in names - {"train/teacher/NAME"}:
        last = name.partition("/")[2]
        assert f'"{last}"' in code or f'"{name}"' in code, name


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_is_code(page: str, site: Any) -> None:
    """Python parses, YAML loads, and a command of cotgrpo has only options that there are."""
    index = site.read_index()
    for language, code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if language in ("py", "python"):
            ast.parse(code)
        elif language == "yaml":
            list(yaml.safe_load_all(code))
        elif language in ("sh", "bash"):
            joined = re.sub(r"\\\n\s*", "", code)
            for name, rest in re.findall(r"(?:^|[\s/])cotgrpo (\w+)([^\n|;&>]*)", joined):
                if name not in index:  # the word is a folder's name
                    continue
                command = index[name] if name != "bench" else index[f"bench {rest.split()[0]}"]
                for flag in re.findall(r"(?<!\S)(--[a-z][\w.]*)", rest.partition(" #")[0]):
                    # Some settings are dicts, as --eval.sets.math FILE.
                    assert {flag, flag.rpartition(".")[0]} & {*command.flags, "--help", "--help-all"}, (
                        f"{page}: {name} {flag}"
                    )


def test_settings_that_the_pages_name_exist() -> None:
    """The keys between backticks in the page for users of TRL."""
    known = {setting.key for setting in settings_in(Config())}
    text = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:sft|grpo|data|eval)\.[a-z_.]+)`", text)
    assert len(named) >= 5 and set(named) <= known


def test_a_report_that_is_not_there(site: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        site.main(["--out", str(tmp_path / "site"), "--report", str(tmp_path / "none.html")])
    assert "--report must be a file" in capsys.readouterr().err and not (tmp_path / "site").exists()


SCREEN = 64
"""Lines of a screen and a half, at 42 lines a screen."""


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_never_further_apart_than_a_screen_and_a_half(page: str) -> None:
    lines, fenced, since, head = (ROOT / page).read_text(encoding="utf-8").splitlines(), False, 0, ""
    for line in lines:
        fenced ^= line.startswith("```")
        since, head = (0, line) if line.startswith("#") and not fenced else (since + 1, head)
        assert since <= SCREEN, f"{page}: {head} has more than {SCREEN} lines. Put a heading between them."


def test_the_five_paths_are_there() -> None:
    """The links of docs/from_trl.md: each from the README to a page, and to a heading of it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page, heading in {
        "docs/data.md": "## Other columns",
        "docs/own_code.md": "## Trackers",
        "docs/models.md": "## ",
        "docs/launch.md": "## Kaggle v5e-8",
    }.items():
        assert f"]({page})" in readme.replace("\n", " ") and heading in (ROOT / page).read_text(encoding="utf-8"), page


@pytest.mark.slow
def test_the_site_is_built_strictly(site: Any, tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="the site needs cotgrpo's docs extra")
    (tmp_path / "page.html").write_text("<!DOCTYPE html><title>The curves</title>", encoding="utf-8")
    report = os.environ.get("COTGRPO_QUICKSTART")
    shown = Path(report, "report.html") if report else tmp_path / "page.html"
    assert site.main(["--out", str(tmp_path / "site"), "--report", str(shown)]) == 0
    assert (tmp_path / "site" / site.REPORT).read_bytes() == shown.read_bytes()
    assert f'src="{site.REPORT}"' in (tmp_path / "site" / "report.html").read_text(encoding="utf-8")
    for page in ("index", "data", "method", "settings", "metrics", "api"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "log p(y*)" in api and 'id="cotgrpo.train_steps.make_grpo_step"' in api
    found = json.loads(next((tmp_path / "site").rglob("search*.json")).read_text(encoding="utf-8"))
    assert "GhostRespond" in json.dumps(found)
