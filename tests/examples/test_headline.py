"""The README's figures: written from results by a script, and up to date."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def headline():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "examples/benchmarks/pages"))
        yield importlib.import_module("headline")


@pytest.fixture
def copy(tmp_path):
    """The pages and results, to be written to."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


PAGES = ("README.md", "docs/results.md", "docs/export.md", "docs/index.md")


def pages(root: Path) -> list[str]:
    return [(root / name).read_text() for name in PAGES]


def test_the_pages_say_what_the_results_say(headline, copy):
    before = pages(copy)
    headline.main(copy)
    assert pages(copy) == before, "run python examples/benchmarks/pages/headline.py"


def test_new_results_reach_all_pages(headline, copy):
    results = copy / "docs/results"
    found = json.loads((results / "languages.json").read_text())
    found["250 steps"]["smora_64_8"]["accuracy"] = [0.5, 0.25, 5]
    (results / "languages.json").write_text(json.dumps(found))
    layers = json.loads((results / "layer.json").read_text())
    for row in layers["rows"]:
        row["total"]["value"]["smora native"] = 7.0
    (results / "layer.json").write_text(json.dumps(layers))
    headline.main(copy)
    readme, results_page, _, home = pages(copy)
    for page in (readme, results_page, home):
        assert "| one head for all, 250 steps | 64.6" in page
        assert "| 50.0 ± 25.0 |" in page
    assert "takes 7.00 to 7.00 times as long" in readme
    assert "([performance](docs/performance.md))" in readme
    assert "([performance](performance.md))" in home
    again = pages(copy)
    headline.main(copy)
    assert pages(copy) == again


def test_the_home_page_names_what_lies_outside_of_the_site(headline):
    text = (
        '![a](docs/a.svg) [b](docs/b.md#c) [notebook](examples/n.ipynb) <img src="docs/d.svg"> [e](https://e.org/docs/)'
    )
    home = '![a](a.svg) [b](b.md#c) notebook (`examples/n.ipynb`) <img src="d.svg"> [e](https://e.org/docs/)'
    assert headline.home(text) == home


def test_a_page_without_its_marks_is_refused(headline):
    with pytest.raises(ValueError, match="no <!-- demo"):
        headline.replaced("nothing here", "demo", "content")
