"""The README and docs/: every code block runs, every link leads somewhere, every public name is documented.

Blocks of a page run in order, in an empty folder, and Python blocks share their names. A block that cannot run here
has a comment in front that says why: `<!-- skip: next "needs a GPU" -->`. Languages:

- python: runs.
- bash: `rank-experts` runs in this process, which spares an import of torch each time; `make` must name a target; any
  other block goes to a shell, with a port that is free in place of the one that it names.
- yaml: a recipe for `rank-experts train`, which must be valid. One that begins with `# name.yaml` becomes that file.
- text: formulas and output, not run.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
from markdown_it import MarkdownIt
from sybil import Sybil
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import rank_experts
from rank_experts_cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if page != ROOT / "docs/index.md"]  # That one is the README again.
RUN, SHOWN = {"python", "bash", "yaml"}, {"text"}
MOST_SKIPPED = 18
SKIP = re.compile(r'<!-- skip: next "([^"]+)" -->')


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def on_a_free_port(source: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return re.sub(r"(--port |localhost:)\d+", rf"\g<1>{probe.getsockname()[1]}", source)


def run_bash(example) -> None:
    source = str(example.parsed)
    lines = [line for line in source.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
    own = [shlex.split(line, comments=True) for line in lines if line.startswith(("rank-experts ", "make "))]
    for command, *arguments in own:
        if command == "make":
            assert set(arguments) <= targets(), f"the Makefile has no target {arguments}"
        else:
            assert main(arguments) == 0, f"rank-experts {shlex.join(arguments)} failed"
    if own:
        assert len(own) == len(lines), "a block with rank-experts or make holds nothing else"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", on_a_free_port(source)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr


def check_recipe(example) -> None:
    from rank_experts.recipes.recipe import read_recipe

    source = str(example.parsed)
    title = re.match(r"# ([\w-]+\.yaml)$", source, re.MULTILINE)
    file = Path(title[1] if title else "unnamed.yaml")
    file.write_text(source)
    read_recipe(file)


PARSERS = [
    PythonCodeBlockParser(),
    CodeBlockParser("bash", run_bash),
    CodeBlockParser("yaml", check_recipe),
    SkipParser(),
]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    document = Sybil(PARSERS).parse(page)
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest:
            continue


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_code_escapes(page):
    """What Markdown takes for code is what was run, in a language that is known here."""
    tokens = MarkdownIt().parse(page.read_text())
    assert not [token.map for token in tokens if token.type == "code_block"], "indented code has no language"
    languages = [token.info.strip() for token in tokens if token.type == "fence"]
    assert set(languages) <= RUN | SHOWN
    regions = [each for each in Sybil(PARSERS).parse(page) if not isinstance(each.region.evaluator, Skipper)]
    assert len(regions) == sum(language in RUN for language in languages)


def test_skips_are_few_and_have_reasons():
    directives, reasons = [], []
    for page in WITH_CODE:
        text = page.read_text()
        directives += re.findall(r"<!-+ *;? *skip", text)
        reasons += SKIP.findall(text)
    assert len(directives) == len(reasons), 'a skip is written <!-- skip: next "why" -->'
    assert all(len(reason.split()) >= 2 for reason in reasons)
    assert len(reasons) <= MOST_SKIPPED


def links(page: Path) -> list[str]:
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    inside = [child for token in tokens for child in token.children or ()]
    return [str(child.attrs[key]) for child in inside for key in ("href", "src") if key in child.attrs]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    # `make docs` checks pages and anchors; it does not check pictures, or the README.
    local = [link.partition("#")[0] for link in links(page) if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in local if link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_names_are_there(page):
    named = re.findall(r"\btests/[\w/]+\.py", page.read_text())
    assert not [test for test in named if "NAME" not in test and not (ROOT / test).exists()]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r'= "([\w/-]+\.md)"', (ROOT / ".zensical.toml").read_text())
    there = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert sorted(listed) == sorted(there)


DOORS = ("convert", "layers", "reports", "routing", "training")


def public_names() -> set[str]:
    """What the package's top offers, and each room's door beyond it."""
    names = {f"rank_experts.{each}" for each in rank_experts.__all__ if each != "__version__"}
    for room in DOORS:
        door = importlib.import_module(f"rank_experts.{room}")
        names |= {f"rank_experts.{room}.{each}" for each in door.__all__ if each not in rank_experts.__all__}
    return names


def test_every_public_name_is_documented():
    """Once, and nothing else is."""
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    assert sorted(re.findall(r"^::: ([\w.]+)", pages, re.M)) == sorted(public_names())


def imported(file: Path) -> set[str]:
    """The names that a file imports from this library."""
    found = re.findall(r"^ *from (rank_experts[\w.]*) import (\([^)]*\)|.*)", file.read_text(), re.M)
    names = [
        (room, each.split(" as ")[0].strip()) for room, each_of in found for each in each_of.strip("()").split(",")
    ]
    return {f"{room}.{name}" for room, name in names if name and name != "*"}


EXAMPLES = [path for path in (ROOT / "examples").rglob("*.py") if "benchmarks" not in path.parts]


@pytest.mark.parametrize("file", [*PAGES, *EXAMPLES], ids=name)
def test_pages_and_examples_use_public_names(file):
    """The benchmarks, which measure what lies behind the doors, may go further."""
    known = public_names() | {f"rank_experts.{room}.{each}" for room in DOORS for each in rank_experts.__all__}
    assert imported(file) <= known


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_map_of_the_code_names_every_room():
    listed = re.findall(r"^  (\w+)/ ", (ROOT / "docs/contributing.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.parent.name for path in (ROOT / "src/rank_experts").glob("*/__init__.py"))


def test_what_the_contributors_page_names_is_there():
    """Files and folders; NAME stands for a new one, and site/ is what `make docs` makes."""
    page = (ROOT / "docs/contributing.md").read_text()
    roots = (
        ROOT,
        ROOT / "src/rank_experts",
        ROOT / "tests",
        ROOT / "tests/ops/backends",
        ROOT / "src/rank_experts/ops/backends",
        ROOT / "examples/benchmarks",
    )
    for path in re.findall(r"`([\w/.-]*(?:/|\.py))`", page):
        assert "NAME" in path or path == "site/" or any((root / path).exists() for root in roots), path
