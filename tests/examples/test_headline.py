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


def pages(root: Path) -> list[str]:
    return [(root / name).read_text() for name in ("README.md", "docs/results.md", "docs/export.md")]


def record(method: str, seed: int, task: str, metric: str, value: float) -> dict:
    costs = {"steps": 10, "trainable_parameters": 1000, "active_parameters": 500, "seconds": 2.0}
    return dict(method=method, seed=seed, task=task, metric=metric, value=value, device="cpu", dtype="float32", **costs)


def test_the_pages_say_what_the_results_say(headline, copy):
    before = pages(copy)
    headline.main(copy)
    assert pages(copy) == before, "run python examples/benchmarks/pages/headline.py"


def test_new_results_reach_both_pages(headline, copy):
    results = copy / "docs/results"
    rows = [
        {"method": "majority class", "accuracy": {"one": 0.5, "two": 0.25}},
        {"method": "SMoRA", "accuracy": {"one": 0.75, "two": 0.5}, "trainable": 9000, "active": 1234, "seconds": 3.0},
    ]
    (results / "demo.json").write_text(json.dumps({"rows": rows}))
    records = [
        record(method, seed, task, metric, value + 0.1 * seed)
        for method, value in (("lora_r8", 0.4), ("smora_r64_k8", 0.5))
        for seed in (0, 1)
        for task, metric in (("rte", "accuracy"), ("cola", "matthews"))
    ]
    (results / "glue_small.json").write_text(json.dumps(records))
    (results / "glue_small.md").write_text("# All\n")
    headline.main(copy)
    for page, folder in zip(pages(copy)[:2], ("docs/results", "results"), strict=True):
        assert "| SMoRA | 0.750 | 0.500 | 0.625 | 1,234 |" in page
        assert "| smora_r64_k8 | 55.0 ± 7.1 |" in page
        assert f"]({folder}/glue_small.svg)" in page
        assert f"]({folder}/glue_small.md)" in page
    assert (results / "glue_small.svg").read_text().count("<svg") == 1
    again = pages(copy)
    headline.main(copy)
    assert pages(copy) == again


def test_a_page_without_its_marks_is_refused(headline):
    with pytest.raises(ValueError, match="no <!-- demo"):
        headline.replaced("nothing here", "demo", "content")
