"""The routing report as one HTML page: no scripts, no links, nothing loaded from anywhere; light and dark.

A section is a function that returns its HTML, or nothing where the report has not what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..routing.statistics import MOST_COMPARED, LayerStatistics, mean_similarity
from . import charts
from .contents import Contents
from .style import figures, page, section
from .tables import layer_rows

_OTHER = "other layers"
_FIRST = 3
_MOST = 24


def render(report: Contents) -> str:
    """Return the page."""
    compared = [layer.first_tasks(MOST_COMPARED) for layer in report.layers]
    sections = [
        _load(report.layers),
        *(part(compared, report.tasks[:MOST_COMPARED]) for part in (_ranks, _usage, _sharing, _map)),
        _history(report.history),
        _bias(report.layers),
        _updates(report.layers),
        _all_layers(report.layers),
    ]
    return page(report.title, report.facts, report.findings, sections)


def _all_layers(layers: Sequence[LayerStatistics]) -> str:
    rows = layer_rows(layers)
    return f"<details><summary>All layers as a table</summary>{charts.table(rows)}</details>" if rows else ""


def group_by_kind(paths: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """Group layers that are the same module of different blocks.

    Args:
        paths: Of the layers.

    Returns:
        Kind to (name within it, place in `paths`). Layers without a block's number are one group, "other layers".

    Example:
        >>> group_by_kind(["h.0.attn.q", "h.1.attn.q", "head"])
        {'attn.q': [('0', 0), ('1', 1)], 'other layers': [('head', 2)]}
    """
    split = []
    for path in paths:
        parts = path.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        split.append((parts, number))
    stacks = {tuple(parts[:number]) for parts, number in split if number is not None}
    groups: dict[str, list[tuple[str, int]]] = {}
    for i, (parts, number) in enumerate(split):
        if number is None:
            groups.setdefault(_OTHER, []).append((paths[i], i))
            continue
        # "encoder" and "decoder" stay in the name where both have blocks.
        stack = ".".join(parts[:number]) + " " if len(stacks) > 1 else ""
        groups.setdefault(stack + (".".join(parts[number + 1 :]) or "block"), []).append((parts[number], i))
    other = groups.pop(_OTHER, None)
    return groups if other is None else groups | {_OTHER: other}


def _layer_cards(
    layers: Sequence[LayerStatistics], row: Callable[[LayerStatistics], tuple[list[str], str]], value: str, noun: str
) -> str:
    cards = {}
    for kind, members in group_by_kind([layer.path for layer in layers]).items():
        rows = []
        widest = 1
        for name, i in members:
            classes, number = row(layers[i])
            widest = max(widest, len(classes))
            rows.append((name, charts.strip(classes, f"{layers[i].path}: {value} {number}"), number))
        start = int(noun == "rank")  # experts are counted from 0, as in the code; ranks from 1, as in r_t
        cards[kind] = charts.strips(rows, (f"{noun} {start}", str(widest - 1 + start)), value)
    return figures(cards)


def _load(layers: Sequence[LayerStatistics]) -> str:
    recorded = [layer for layer in layers if layer.router == "token" and layer.load is not None]
    if not recorded:
        return ""

    def row(layer: LayerStatistics) -> tuple[list[str], str]:
        load = layer.relative_load
        return [charts.load_class(value) for value in ([] if load is None else load.tolist())], f"{layer.load_cv:.2f}"

    scale = [f"b{i}" for i in (10, 7, 4)] + ["n"] + [f"o{i}" for i in (4, 7, 10)]
    return section(
        "Load of the experts",
        "A row is a layer, a cell an expert. Grey is the fair share of the tokens; the number is the load's standard "
        "deviation over its mean (cv), 0 where the load is even.",
        charts.legend([("¼ … fair share … 4×", scale), ("never chosen", ["x"])]),
        _layer_cards(recorded, row, "cv", "expert"),
    )


def _bias(layers: Sequence[LayerStatistics]) -> str:
    biased = [layer for layer in layers if layer.balance_bias is not None and layer.balance_bias.any()]
    if not biased:
        return ""
    largest = max(float(layer.balance_bias.abs().max()) for layer in biased if layer.balance_bias is not None)

    def row(layer: LayerStatistics) -> tuple[list[str], str]:
        bias = torch.zeros(1) if layer.balance_bias is None else layer.balance_bias
        return [charts.signed(-value / largest) for value in bias.tolist()], f"{float(bias.abs().max()):.3f}"

    return section(
        "Balancing bias",
        "What balancing added to an expert's score. Experts that it had to lift would be chosen too rarely without "
        "it, those that it holds back too often. The number is the layer's largest.",
        charts.legend([(f"lifted, up to {largest:.3f}", ["b4", "b7", "b10"]), ("held back", ["o4", "o7", "o10"])]),
        _layer_cards(biased, row, "largest", "expert"),
    )


def _updates(layers: Sequence[LayerStatistics]) -> str:
    def row(layer: LayerStatistics) -> tuple[list[str], str]:
        norm = layer.update_norm
        largest = max(float(norm.max()), 1e-300)
        return [charts.amount(value / largest) for value in norm.tolist()], f"{float(norm.max()):.2g}"

    if not any(layer.update_norm.any() for layer in layers):
        return ""
    return section(
        "Size of each rank's update",
        "‖A‖ · ‖B‖ of every rank, relative to the layer's largest, which is the number. Faint ranks hardly change what "
        "the model does, however often they are chosen.",
        charts.legend([("none … the layer's largest", ["q0", "q3", "q6", "q10"])]),
        _layer_cards(layers, row, "largest", "rank"),
    )


def _ranks(layers: Sequence[LayerStatistics], tasks: Sequence[str]) -> str:
    routed = [layer for layer in layers if layer.chosen_rank is not None]
    if not routed:
        return ""
    r = max(layer.sizes[0] for layer in routed)
    rows = []
    for i, task in enumerate(tasks):
        chosen = torch.stack([layer.chosen_rank[i] for layer in routed if layer.chosen_rank is not None])
        # Of the layers, those whose chosen rank is above 0, 1, …
        share = (1 - chosen.bincount(minlength=r + 1)[:r].cumsum(0) / len(chosen)).tolist()
        mean = f"{float(chosen.double().mean()):.1f}"
        rows.append((task, charts.strip([charts.amount(value) for value in share], f"{task}: mean rank {mean}"), mean))
    cards = {}
    for kind, members in group_by_kind([layer.path for layer in routed]).items():
        chosen_rows = [routed[i].chosen_rank for _, i in members]
        numbers = [[] if ranks is None else ranks.tolist() for ranks in chosen_rows]
        classes = [
            [charts.amount(number / routed[i].sizes[0]) for number in row] for (_, i), row in zip(members, numbers)
        ]
        texts = [[str(number) for number in row] for row in numbers]
        cards[kind] = charts.matrix([name for name, _ in members], tasks, classes, texts)
    return section(
        "Tasks and ranks",
        "A task uses its first ranks. Above, the share of the layers in which it uses each rank, and the mean rank "
        "that it chose; below, what it chose in each layer.",
        charts.legend([("in no layer … in all layers", ["q0", "q3", "q6", "q10"])]),
        f'<div class="wide">{charts.strips(rows, ("rank 1", str(r)), "mean")}</div>',
        figures(cards, "cards loose"),
    )


def _usage(layers: Sequence[LayerStatistics], tasks: Sequence[str]) -> str:
    # By task, for token routers: which experts a task's tokens go to, where the tasks differ most.
    seen = [layer for layer in layers if layer.router == "token" and layer.task_usage is not None]
    # A layer that sees one token an example (a pooler) differs by chance alone.
    most = max((int(layer.counts.tokens.sum()) for layer in seen if layer.counts is not None), default=0)
    known = [(x, x.task_overlap) for x in seen if x.counts is not None and 2 * int(x.counts.tokens.sum()) > most]
    if len(tasks) < 2 or not known:
        return ""
    ordered = sorted(((float(_mean_of_pairs(overlap)), layer) for layer, overlap in known), key=lambda pair: pair[0])
    cards = {}
    for overlap, layer in ordered[:_MOST]:
        usage = torch.zeros(0) if layer.task_usage is None else layer.task_usage
        largest = max(float(usage.nan_to_num().max()), 1e-300)
        rows = [
            (task, charts.strip([charts.amount(value / largest) for value in values], f"{task} in {layer.path}"), "")
            for task, values in zip(tasks, usage.tolist())
        ]
        caption = f"{layer.path} · {overlap:.0%} in common"
        cards[caption] = charts.strips(rows, ("expert 0", str(layer.num_experts - 1)))
    first = dict(list(cards.items())[:_FIRST])
    rest = dict(list(cards.items())[_FIRST:])
    more = f"<details><summary>{len(rest)} more layers</summary>{figures(rest)}</details>" if rest else ""
    return section(
        "Tasks and experts",
        "How often a task's tokens choose each expert, in the layers where the tasks differ most. Where two rows have "
        "their strong cells apart, the tasks use experts of their own.",
        charts.legend([("never … most often in this layer", ["q0", "q3", "q6", "q10"])]),
        figures(first),
        more,
    )


def _mean_of_pairs(overlap: Tensor | None) -> Tensor:
    if overlap is None:
        return torch.tensor(torch.nan)
    return overlap[~torch.eye(len(overlap), dtype=torch.bool)].nanmean()


def _sharing(layers: Sequence[LayerStatistics], tasks: Sequence[str]) -> str:
    overlaps = [layer.task_overlap for layer in layers if layer.task_overlap is not None]
    if len(tasks) < 2 or not overlaps:
        return ""
    cards = {"experts in common": _square(torch.stack(overlaps).nanmean(0), tasks, 0.0)}
    if (similarity := mean_similarity(layers)) is not None:
        cards["cosine of the task embeddings"] = _square(similarity, tasks, -1.0)
    kinds = group_by_kind([layer.path for layer in layers])
    rows = []
    for kind, members in kinds.items():
        if kind == _OTHER:
            continue
        values = [float(_mean_of_pairs(layers[i].task_overlap)) for _, i in members]
        mean = sum(values) / len(values)
        rows.append(
            (kind, charts.strip([charts.amount(value) for value in values], f"{kind}: {mean:.0%}"), f"{mean:.0%}")
        )
    if rows:
        cards["by depth, mean over pairs of tasks"] = charts.strips(rows, ("first block", "last"), "mean")
    return section(
        "Experts shared between tasks",
        "What two tasks' use of the experts has in common, in the mean over layers: 100 % where they use the same "
        "experts equally often, 0 where they share none.",
        figures(cards),
    )


def _square(values: Tensor, tasks: Sequence[str], low: float) -> str:
    classes = [[charts.amount((value - low) / (1 - low)) for value in row] for row in values.tolist()]
    texts = [[f"{round(value, 2) + 0.0:.2f}" if low else f"{value:.0%}" for value in row] for row in values.tolist()]
    return charts.matrix(tasks, tasks, classes, texts)


def _map(layers: Sequence[LayerStatistics], tasks: Sequence[str]) -> str:
    embedded = [layer.task_embedding for layer in layers if layer.task_embedding is not None]
    used = [usage for layer in layers if layer.router == "token" and (usage := layer.task_usage) is not None]
    if len(tasks) < 2 or not (embedded or used):
        return ""
    if embedded:
        # Layers have embeddings of different widths and lengths: each layer counts the same.
        points = torch.cat([torch.nn.functional.normalize(e.double(), dim=-1) for e in embedded], -1)
        what = "embeddings"
    else:
        points = torch.cat([usage.nan_to_num() for usage in used], -1)
        what = "use of the experts"
    places, share = charts.principal_plane(points)
    return section(
        "Map of the tasks",
        f"The tasks' {what} in all layers, projected onto the plane that keeps most of their spread (PCA). Near tasks "
        "are alike.",
        figures({f"by {what}": charts.scatter(tasks, places, (f"{share[0]:.0%} of spread →", f"↑ {share[1]:.0%}"))}),
    )


_CURVES = {
    "load_cv": "load: standard deviation over mean",
    "load_max": "load: largest over mean",
    "load_idle": "share of experts never chosen",
    "auxiliary_loss": "auxiliary loss",
    "loss": "training loss",
}


def _history(history: Sequence[Mapping[str, Any]]) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for i, entry in enumerate(history):
        for name, value in entry.items():
            if isinstance(value, (int, float)) and (name in _CURVES or name.startswith("rank_")):
                curves.setdefault(name, []).append((float(entry.get("step", i)), float(value)))
    cards = {text: charts.lines({text: curves[name]}) for name, text in _CURVES.items() if name in curves}
    if ranks := {name.removeprefix("rank_"): curve for name, curve in curves.items() if name.startswith("rank_")}:
        cards["mean rank by task"] = charts.lines(ranks)
    if not cards:
        return ""
    return section(
        "During the training", "From the trainer's log history; loads are means over the layers.", figures(cards)
    )
