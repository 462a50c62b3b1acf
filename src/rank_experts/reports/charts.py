"""Pieces of the report's page: heatmap strips, matrices, a scatter plot, lines. Each returns HTML with inline SVG.

Colours are classes, which the page's style sheet defines for light and dark: q0 … q10 from nothing to much; b1 … b10
(below) and o1 … o10 (above) around n (even); x for what was never used. Nothing refers to anything outside the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

STEPS = 10


def amount(value: float) -> str:
    """Return the class of a value from 0 (nothing) to 1 (much)."""
    return f"q{min(max(round(value * STEPS), 0), STEPS)}" if math.isfinite(value) else "none"


def signed(value: float) -> str:
    """Return the class of a value from −1 (below) over 0 (even) to 1 (above)."""
    step = min(round(abs(value) * STEPS), STEPS) if math.isfinite(value) else 0
    return "n" if step == 0 else f"{'o' if value > 0 else 'b'}{step}"


def load_class(relative: float) -> str:
    """Return the class of a load relative to the fair share: from a quarter to four times of it."""
    return "x" if relative == 0 else signed(math.log2(relative) / 2)


def strip(classes: Sequence[str], label: str) -> str:
    """Return a row of equal cells that fills its width.

    Args:
        classes: A cell's colour each.
        label: What a reader without the picture is told, and the tooltip.
    """
    cells = []
    start = 0
    for i in range(1, len(classes) + 1):
        if i == len(classes) or classes[i] != classes[start]:
            cells.append(f'<rect x="{start}" width="{i - start}" height="1" class="{classes[start]}"/>')
            start = i
    return (
        f'<svg class="strip" viewBox="0 0 {len(classes)} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(cells)}</svg>'
    )


def strips(rows: Sequence[tuple[str, str, str]], columns: tuple[str, str], value: str = "") -> str:
    """Return strips below each other.

    Args:
        rows: (name, strip, number) each.
        columns: What stands below the first and below the last cell.
        value: What the numbers are.
    """
    head = f'<tr><th></th><td class="axis"></td><td class="num">{escape(value)}</td></tr>' if value else ""
    body = "".join(
        f'<tr><th title="{escape(name)}"><span>{escape(name)}</span></th><td>{cells}</td>'
        f'<td class="num">{escape(number)}</td></tr>'
        for name, cells, number in rows
    )
    ends = f"<span>{escape(columns[0])}</span><span>{escape(columns[1])}</span>"
    return (
        f'<table class="strips">{head}{body}<tr><th></th><td class="axis"><div>{ends}</div></td><td></td></tr></table>'
    )


def matrix(rows: Sequence[str], columns: Sequence[str], classes: Sequence[Sequence[str]], texts: Tensor | list) -> str:
    """Return a table of coloured cells with numbers.

    Args:
        rows: Names.
        columns: Names, set upright.
        classes: A colour a cell.
        texts: A text a cell.
    """
    head = "".join(f'<th class="up" title="{escape(name)}"><span>{escape(name)}</span></th>' for name in columns)
    body = "".join(
        f'<tr><th title="{escape(name)}"><span>{escape(name)}</span></th>'
        + "".join(f'<td class="cell {cls}">{escape(text)}</td>' for cls, text in zip(class_row, text_row))
        + "</tr>"
        for name, class_row, text_row in zip(rows, classes, texts)
    )
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{body}</table></div>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table; the first row names the columns."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows[1:]
    )
    return f'<div class="scroll"><table class="plain"><tr>{head}</tr>{body}</table></div>'


def legend(entries: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return colours with their names: (name, classes) each."""
    items = []
    for name, classes in entries:
        cells = "".join(f'<i class="{cls}"></i>' for cls in classes)
        items.append(f"<span><b>{cells}</b>{escape(name)}</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def principal_plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """Project points onto the plane that keeps most of their spread (PCA).

    Args:
        points: (T, D).

    Returns:
        (T, 2) coordinates, and (2,) the share of the spread that each axis keeps.

    Example:
        >>> principal_plane(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))[1]
        tensor([1., 0.], dtype=torch.float64)
    """
    centred = points.double() - points.double().mean(0)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = torch.zeros(len(points), 2, dtype=torch.float64)
    share = torch.zeros(2, dtype=torch.float64)
    n = min(2, len(S))
    axes = (U * S)[:, :n]
    # The sign of an axis is arbitrary; the largest coordinate is made positive, so that pages do not flip.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    coordinates[:, :n] = axes * torch.where(largest < 0, -1.0, 1.0)
    share[:n] = S[:n].square() / S.square().sum().clamp(min=1e-300)
    return coordinates, share


def scatter(names: Sequence[str], points: Tensor, axes: tuple[str, str]) -> str:
    """Return a plot of named points (T, 2), both axes to the same scale."""
    width, height, margin = 360.0, 260.0, 36.0
    low, high = points.amin(0), points.amax(0)
    scale = min(
        (width - 2 * margin) / max(float(high[0] - low[0]), 1e-9),
        (height - 2 * margin) / max(float(high[1] - low[1]), 1e-9),
    )
    middle = (low + high) / 2
    places = []
    for i, point in enumerate((points - middle).tolist()):
        places.append((height / 2 - point[1] * scale, width / 2 + point[0] * scale, i))
    marks = []
    last = -math.inf
    for y, x, i in sorted(places):
        # Labels of near points are pushed apart; a thin line leads back to the point.
        at = max(y, last + 14)
        last = at
        left = x > width * 0.6
        dx, anchor = (-9, "end") if left else (9, "start")
        lead = f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{x + dx * 0.8:.1f}" y2="{at:.1f}"/>'
        marks.append(
            f'{lead}<circle class="s{i % 8}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(names[i])}</title></circle>'
            f'<text x="{x + dx:.1f}" y="{at + 4:.1f}" text-anchor="{anchor}">{escape(_short(names[i]))}</text>'
        )
    frame = f'<rect class="frame" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>'
    notes = (
        f'<text class="note" x="{width - 8}" y="{height - 8}" text-anchor="end">{escape(axes[0])}</text>'
        f'<text class="note" x="8" y="16">{escape(axes[1])}</text>'
    )
    return f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img">{frame}{"".join(marks)}{notes}</svg>'


def lines(series: Mapping[str, Sequence[tuple[float, float]]], zero: bool = True) -> str:
    """Return curves over the steps of a training.

    Args:
        series: Name to (step, value) pairs.
        zero: Let the axis begin at zero.
    """
    width, height, left, bottom, top = 360.0, 170.0, 40.0, 22.0, 10.0
    points = [point for curve in series.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(0.0, *values) if zero else min(values), max(values)
    high = low + _round_up(high - low if high > low else 1.0)
    last = max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (step - min(steps)) / (last - min(steps)) * (width - left - 12)
        return x, top + (high - value) / (high - low) * (height - bottom - top)

    parts = []
    for value in (low, (low + high) / 2, high):
        y = place(min(steps), value)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="note" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((min(steps), "start"), (last, "end")):
        x = place(step, low)[0]
        parts.append(f'<text class="note" x="{x:.1f}" y="{height - 5}" text-anchor="{anchor}">step {step:g}</text>')
    for i, (name, curve) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve if math.isfinite(point[1])))
        parts.append(f'<polyline class="s{i % 8}" points="{path}"><title>{escape(name)}</title></polyline>')
    keys = ""
    if len(series) > 1:
        keys = "".join(f'<span><i class="s{i % 8}"></i>{escape(name)}</span>' for i, name in enumerate(series))
        keys = f'<p class="legend">{keys}</p>'
    return f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>{keys}'


def _round_up(span: float) -> float:
    # To a number that reads well on an axis, and so does its half.
    unit = 10.0 ** math.floor(math.log10(span))
    return next(step * unit for step in (1, 2, 3, 4, 6, 8, 10) if step * unit >= span * (1 - 1e-9))


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
