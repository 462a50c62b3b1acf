"""The tables of a report as rows of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routing.statistics import MOST_COMPARED, LayerStatistics, mean_similarity


def layer_rows(layers: Sequence[LayerStatistics]) -> list[list[str]]:
    """Return the table of layers as text: the column names, then one row a layer; nothing where there is no layer.

    Empty columns are left out.
    """
    if not layers:
        return []
    tasks = max((layer.tasks for layer in layers if layer.chosen_rank is not None), key=len, default=())
    rows = [
        {
            "layer": layer.path,
            "r": str(layer.sizes[0]),
            "experts": str(layer.num_experts) if layer.router == "token" else "",
            "tokens": "" if layer.load is None or layer.counts is None else f"{int(layer.counts.tokens.sum()):,}",
            **({} if layer.router == "task" else _load_columns(layer)),
            "entropy": _number(layer.routing_entropy),
            "bias": "" if layer.balance_bias is None else _span(layer.balance_bias),
            **{f"r({task})": _rank(layer, i) for i, task in enumerate(tasks[:MOST_COMPARED])},
            "update": _number(float(layer.update_norm.square().sum().sqrt())),
        }
        for layer in layers
    ]
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)
    ]
    return [columns, *([row.get(name, "") for name in columns] for row in rows)]


def _load_columns(layer: LayerStatistics) -> dict[str, str]:
    dead = layer.dead_experts
    return {
        "load cv": _number(layer.load_cv),
        "max load": _number(layer.load_max),
        "evenness": _number(layer.load_entropy),
        "dead": "" if dead is None else str(len(dead)),
    }


def _rank(layer: LayerStatistics, task: int) -> str:
    return "" if layer.chosen_rank is None or task >= len(layer.chosen_rank) else str(int(layer.chosen_rank[task]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _span(values: Tensor) -> str:
    return f"{float(values.min()):+.3f} … {float(values.max()):+.3f}"


def text_table(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def task_rows(layers: Sequence[LayerStatistics]) -> list[list[str]]:
    """Return the table of tasks as text: the column names, then one row a task.

    The ranks that a task's gates chose, and the cosine of its embedding to each task's, averaged over layers; of more
    than `MOST_COMPARED` tasks the ranks alone. Empty where no layer routes by task.
    """
    chosen = [layer.chosen_rank for layer in layers if layer.chosen_rank is not None]
    if not chosen:
        return []
    tasks = max((layer.tasks for layer in layers), key=len)
    similarity = mean_similarity(layers) if len(tasks) <= MOST_COMPARED else None
    like = [] if similarity is None else [f"like {task}" for task in tasks]
    rows = [["task", "mean rank", "least", "most", *like]]
    for i, (task, ranks) in enumerate(zip(tasks, torch.stack(chosen).T)):
        spread = [f"{float(ranks.double().mean()):.1f}", str(int(ranks.min())), str(int(ranks.max()))]
        similar = [] if similarity is None else [f"{value:.2f}" for value in similarity[i].tolist()]
        rows.append([task, *spread, *similar])
    return rows
