"""What the pages have in common: tables in Markdown, and plots that can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

INK = "#7a7a7a"
"""Of text and axes: as far from white as from black."""

STYLES: dict[str, dict[str, Any]] = {
    "lora_8": {"color": "#6a9fd4", "marker": "v"},
    "lora_64": {"color": "#2f74c0", "marker": "s"},
    "lora_96": {"color": "#3aa0a8", "marker": "D"},
    "blocks_8x8_top2": {"color": "#8a9a3b", "marker": "<"},
    "blocks_32x2_top4": {"color": "#2e9e5b", "marker": "^"},
    "smora_64_8": {"color": "#e0672f", "marker": "o"},
    "more_8": {"color": "#b05cc9", "marker": "P"},
    "lora_8_per_task": {"color": "#9a8266", "marker": "x"},
}
"""How each method is drawn, on every plot alike."""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def canvas(columns: int, width: float = 7.5, height: float = 4.0) -> tuple[Any, list[Axes]]:
    """Return a figure without a background, and its axes side by side."""
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    matplotlib.rcParams.update(dict.fromkeys(colours, INK))
    matplotlib.rcParams["svg.hashsalt"] = "rank_experts"  # The same results give the same file.
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False)
    for each in axes[0]:
        each.grid(color=INK, alpha=0.2)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    """Write the figure as SVG, its text as text of the reader's font."""
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)
