"""The notebook runs from its first cell to its last, and what it shows is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the cells leave behind; they run in order and share their names."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("notebook"))
        matplotlib.use("svg")
        names: dict = {}
        for source in cells():
            exec(compile(source, "quickstart.ipynb", "exec"), names)
        yield names


def test_both_adapters_learn_and_the_exact_forms_are_exact(shown):
    assert shown["smora_accuracy"] > 0.8
    assert shown["more_accuracy"] > 0.6
    assert shown["accuracy"](shown["more"], task_ids=shown["test_ids"]) == shown["more_accuracy"]
    assert (shown["routed"] - shown["merged"]).abs().max() < 1e-4
    assert 0 < shown["report"].explained < 1
    assert shown["ranks"].shape == (12, 4)


def test_it_was_run_before_it_was_saved():
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in found if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 400_000
