"""Build the documentation site with Zensical: the pages of this folder, the README, and the reference.

    pip install -e '.[docs]' && cotgrpo quickstart && python docs/build_site.py --out site

The report of the quick start is a page of the site, if there is one (`--report`). `site/index.html` opens without a
server or a network, its search too. The settings come from the index that the help uses, and the API from docstrings. A
broken link or reference is an error.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cotgrpo
from cotgrpo.help.index import Command, read_index

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES: dict[str, dict[str, str]] = {
    "Start": {"cotgrpo": "index.md", "A report": "report.md"},
    "Guides": {
        "Coming from TRL": "from_trl.md",
        "Your data": "data.md",
        "Answers": "answers.md",
        "Teachers": "teachers.md",
        "Rollouts on a server": "rollouts.md",
        "Your own code": "own_code.md",
        "Models": "models.md",
        "Checkpoints in and out": "checkpoints.md",
        "LoRA and QLoRA": "lora.md",
        "Whole runs from Python": "python.md",
        "Evaluation": "evaluation.md",
        "Launch": "launch.md",
        "Several hosts": "hosts.md",
        "Commands": "commands.md",
    },
    "Concepts": {
        "The method": "method.md",
        "Steps in your loop": "steps.md",
        "Scaling": "scaling.md",
        "Reliability": "reliability.md",
    },
    "Evidence": {"Results": "results.md", "Performance": "performance.md", "Plan": "plan.md"},
    "Reference": {
        "Settings": "settings.md",
        "Metrics": "metrics.md",
        "API": "api.md",
        "Changelog": "CHANGELOG.md",
        "Contributing": "CONTRIBUTING.md",
    },
}
"""Title of each page in the navigation. A page of this folder that is missing here is an error."""
MORE_NAMES = (
    "cotgrpo.models.load_pretrained",
    "cotgrpo.models.save_pretrained",
    "cotgrpo.models.decoder.DecoderConfig",
    "cotgrpo.models.decoder.init_params",
    "cotgrpo.models.decoder.make_student",
    "cotgrpo.sampling.SamplingSettings",
    "cotgrpo.sampling.make_sampler",
    "cotgrpo.sampling.pad_prompts",
    "cotgrpo.data.answers.grade",
    "cotgrpo.testing.check_objective",
    "cotgrpo.runs.Run",
    "cotgrpo.runs.Trained",
)
"""Public names outside `cotgrpo` itself."""
REPORT, FRAME = "quickstart_report.html", "width: 100%; height: 80vh; border: 1px solid #8884"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def out_of_site(text: str, page: str, pages: set[str]) -> str:
    """Return a page in which a link to a file outside the site is its text, and one to a page leads to it."""

    def replaced(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        file, _, place = target.partition("#")
        if "://" in target or not file:
            return found[0]
        name = Path(file).name
        if name in pages or (mark and (DOCS / name).is_file()):
            return f"{mark}[{words}]({name}{'#' + place if place else ''})"
        if not (ROOT / page).parent.joinpath(file).exists():
            raise SystemExit(f"{page}: a link to {target}, which does not exist.")
        return words

    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def settings_page(commands: dict[str, Command]) -> Iterator[str]:
    """Yield the lines of the reference of all settings and options, by command and section."""
    yield "# Settings\n"
    yield "A setting is a key of a config file and an option. `grpo` and `eval` have those of `sft`, too.\n"
    for name in ("sft", "grpo", "generate", "eval", "export", "plan", "compare", "quickstart"):
        yield f"## cotgrpo {name}\n"
        for group in commands[name].groups:
            own = name in ("sft", "generate") or group.title.startswith(name)
            if not own and group.title not in ("options", "arguments"):
                continue
            yield f"### {name}: {group.title}\n"
            for option in group.options:
                flag = ", ".join(option.flags) or option.metavar
                words = plain_markdown(" ".join(option.help.split()))
                yield f"- `{flag}`: {words}"
            yield ""


def plain_markdown(text: str) -> str:
    """Return a text in which only the code between backticks is Markdown."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([<>|*_{}\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def api_page() -> Iterator[str]:
    """Yield the lines of the reference of the public names, each from where it is defined."""
    yield "# API\n"
    yield "The first names come from `import cotgrpo`, which needs jax, flax, optax and numpy alone.\n"
    for name in (*(f"cotgrpo.{name}" for name in cotgrpo.__all__), *MORE_NAMES):
        module, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(module), last)
        yield f"::: {found.__module__}.{last}\n"


def report_page(report: Path | None) -> Iterator[str]:
    """Yield the lines of the page that shows the report of the quick start."""
    yield "# A report\n"
    yield "Each stage writes `report.html`: one file, without a script or a network. `cotgrpo compare RUN RUN` puts the"
    yield "curves and replies of several runs side by side.\n"
    if report is None:
        yield "`cotgrpo quickstart` writes one. This site was built without it."
        return
    yield f"This one is of `cotgrpo quickstart`. [Open it alone]({REPORT}).\n"
    yield f'<iframe src="{REPORT}" title="The report of the quick start" style="{FRAME}"></iframe>'


def write_sources(folder: Path, report: Path | None = None) -> None:
    """Write the site's sources: the pages with their links, the reference, and a report if there is one."""
    folder.mkdir(parents=True)
    outer = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
    named = {page for section in PAGES.values() for page in section.values()}
    own = {path.name for path in DOCS.glob("*.md")}
    generated = {"index.md", "report.md", "settings.md", "api.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    if own - named or named - own - generated:
        raise SystemExit(f"PAGES misses {sorted(own - named)}, and names {sorted(named - own - generated)}.")
    for name in own:
        text = (DOCS / name).read_text(encoding="utf-8")
        (folder / name).write_text(out_of_site(text, f"docs/{name}", named), encoding="utf-8")
    for name, page in outer.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        (folder / page).write_text(out_of_site(text, name, named), encoding="utf-8")
    for picture in DOCS.glob("*.svg"):
        shutil.copy(picture, folder)
    if report is not None:
        shutil.copy(report, folder / REPORT)
    made = {"settings.md": settings_page(read_index()), "api.md": api_page(), "report.md": report_page(report)}
    for name, lines in made.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_text(out: Path) -> str:
    """Return Zensical's settings."""
    sections = [f'{{ "{title}" = [{pages_text(pages)}] }}' for title, pages in PAGES.items()]
    return f"""[project]
site_name = "cotgrpo"
site_description = "Teach small language models to reason, in JAX"
docs_dir = "sources"
site_dir = "{out}"
use_directory_urls = false
nav = [{", ".join(sections)}]

[project.theme]
language = "en"
features = ["content.code.copy", "navigation.footer", "navigation.sections", "navigation.top", "search.highlight"]
font = false

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"

[project.plugins.offline]

[project.plugins.mkdocstrings.handlers.python]
paths = ["{ROOT}"]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
show_root_heading = true
show_root_full_path = true
show_source = false
members_order = "source"
heading_level = 2
filters = ["!^_"]
docstring_options = {{ warnings = false }}
"""


def pages_text(pages: dict[str, str]) -> str:
    """Return the pages of a section as TOML."""
    return ", ".join(f'{{ "{title}" = "{page}" }}' for title, page in pages.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder of the site; it is replaced")
    parser.add_argument(
        "--report", type=Path, help="report of the quick start (default: quickstart_run/report.html, if there)"
    )
    given = parser.parse_args(arguments)
    out, report = given.out.resolve(), given.report or Path("quickstart_run", "report.html")
    if given.report and not report.is_file():
        parser.error(f"--report must be a file, and {report} is none. `cotgrpo quickstart` writes one.")
    with tempfile.TemporaryDirectory() as work:
        write_sources(Path(work) / "sources", report if report.is_file() else None)
        Path(work, "zensical.toml").write_text(config_text(Path("built")), encoding="utf-8")
        built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=False)
        if built.returncode:
            return built.returncode
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(work) / "built", out)
    print(f"written: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
