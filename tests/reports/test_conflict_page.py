"""The page of a diagnosis: what it says, and that nobody's names speak to the browser."""

from __future__ import annotations

import math
import re

import pytest

from rank_experts.reports.conflict import conflict_page
from rank_experts.routing.statistics import MOST_COMPARED

TASKS = ["cola", "<b>rte</b>"]
COSINES = [[1.0, -0.62], [-0.62, math.nan]]
LAYERS = [["layer", "cosine", "in common"], *([f"h.{i}.q", f"{i / 20 - 0.5:+.2f}", f"{i}%"] for i in range(12))]


def page(verdict="conflict", tasks=TASKS, cosines=COSINES, layers=LAYERS):
    rows = [["task", "room"], *([task, "+0.1000"] for task in tasks)]
    return conflict_page(verdict, "Route & rest.", {"room": "+0.1 ± 0.0"}, rows, tasks, cosines, layers)


def test_it_says_what_was_found():
    text = page()
    assert '<li class="warning"><span>!</span>conflict: Route &amp; rest.</li>' in text
    assert "<dt>room</dt><dd>+0.1 ± 0.0</dd>" in text
    # Orange where tasks pull apart; a task beside itself says nothing.
    assert re.findall(r'<td class="cell (\w+)">([^<]*)</td>', text) == [
        ("none", ""),
        ("o6", "-0.62"),
        ("o6", "-0.62"),
        ("none", ""),
    ]
    first, rest = text.split("<summary>All 12 layers</summary>")
    assert first.count("h.9.q") == 1
    assert "h.10.q" not in first
    assert "h.11.q" in rest


@pytest.mark.parametrize(("verdict", "level"), [("none", "note"), ("unclear", "warning")])
def test_no_conflict_is_no_warning(verdict, level):
    assert f'<li class="{level}">' in page(verdict)


def test_it_is_one_file_without_scripts_and_with_names_as_text():
    text = page()
    assert "<b>rte" not in text
    assert "&lt;b&gt;rte" in text
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text


def test_of_many_tasks_the_first_are_compared():
    count = MOST_COMPARED + 2
    text = page(tasks=[f"t{i}" for i in range(count)], cosines=[[0.5] * count] * count, layers=LAYERS[:1])
    assert text.count('<td class="cell') == MOST_COMPARED**2
    assert "Which layers" not in text
