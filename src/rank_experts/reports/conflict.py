"""The page of a diagnosis: the verdict, what each task pays for sharing, which tasks and layers pull apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..routing.statistics import MOST_COMPARED
from . import charts
from .findings import Finding
from .style import figures, page, section

_FIRST = 10  # layers that are shown at once


def conflict_page(
    verdict: str,
    advice: str,
    facts: Mapping[str, str],
    task_rows: Sequence[Sequence[str]],
    tasks: Sequence[str],
    cosines: Sequence[Sequence[float]],
    layer_rows: Sequence[Sequence[str]],
) -> str:
    """Return one self-contained HTML page.

    Args:
        verdict: "conflict", "none" or "unclear".
        advice: What follows from it.
        facts: Name to value.
        task_rows: The table of tasks; the first row names the columns.
        tasks: Names, of the rows and columns of `cosines`.
        cosines: (T, T) between the tasks' gradients, in the mean over layers; NaN where nothing is known.
        layer_rows: The table of layers, those first that pull tasks apart most; the first row names the columns.
    """
    level = "note" if verdict == "none" else "warning"
    sections = [
        section(
            "Tasks",
            "Held-out losses: untrained, with one adapter for all tasks, with one for each. The room is what an "
            "adapter of its own wins.",
            charts.table(task_rows),
        ),
        _heatmap(tasks, cosines),
        _layers(layer_rows),
    ]
    return page("Do the tasks conflict?", facts, [Finding(level, f"{verdict}: {advice}")], sections)


def _heatmap(tasks: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    names = list(tasks[:MOST_COMPARED])
    # A task agrees with itself.
    shown = [[math.nan if i == j else cosines[i][j] for j in range(len(names))] for i in range(len(names))]
    classes = [["none" if math.isnan(value) else charts.signed(-value) for value in row] for row in shown]
    texts = [["" if math.isnan(value) else f"{value:+.2f}" for value in row] for row in shown]
    return section(
        "Which tasks pull apart",
        "Cosines between the tasks' gradients at the end of the shared training, in the mean over layers. They tell "
        "where tasks pull apart and decide nothing: after a good compromise T tasks in full conflict are at −1/(T−1).",
        charts.legend([("pull apart", ["o10", "o7", "o4"]), ("neither", ["n"]), ("agree", ["b4", "b7", "b10"])]),
        figures({"cosine of the gradients": charts.matrix(names, names, classes, texts)}, "cards loose"),
    )


def _layers(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2:
        return ""
    rest = ""
    if len(rows) > 1 + _FIRST:
        rest = f"<details><summary>All {len(rows) - 1} layers</summary>{charts.table(rows)}</details>"
    return section(
        "Which layers pull tasks apart",
        "Those first where two tasks' gradients point apart most. In common is the share of the tasks' gradient energy "
        "among the input directions that the other tasks want to change most: where it is small, tasks do not meet.",
        charts.table(rows[: 1 + _FIRST]),
        rest,
    )
