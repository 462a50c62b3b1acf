"""Write docs/results/conflict.md, .svg and .json from the records of `conflict`.

python examples/benchmarks/evidence/conflict_page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
from conflict import (
    DEVELOPMENT_SEED,
    HELD_OUT,
    METHODS_HERE,
    POINT,
    RATES,
    SEEDS,
    SWEEPS,
    best_rate,
    errors_of,
    plan,
    points,
    settings_of,
)
from figures import table
from intervals import Mean, mean, paired
from methods import ALL, COSTS
from records import Record, Records, Settings, key
from runner import RESULTS, status
from teacher import Teacher

NOT_RUN = "not run"
DRAWN = ["lora_8", "lora_64", "blocks_8x8_top2", "blocks_32x2_top4", "smora_64_8", "more_8", "lora_8_per_task"]
SHOWN = {"tasks": "T", "visible": "size of the code", "rank": "ρ", "steps": "steps", "overlap": "overlap"}


class Found:
    """The records, asked by point and method."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.errors = errors_of(records)

    def by_seed(self, point: Settings, method: str) -> dict[int, float]:
        """Return the error of each reported seed at the best rate."""
        rate = best_rate(self.errors, point, method)
        if rate is None:
            return {}
        keys = {seed: key(settings_of(point, method, rate, seed)) for seed in SEEDS}
        return {seed: self.errors[name] for seed, name in keys.items() if name in self.errors}

    def mean(self, point: Settings, method: str) -> Mean | None:
        """Return the mean over seeds, or None before the first."""
        found = self.by_seed(point, method)
        return mean(list(found.values())) if found else None

    def cell(self, point: Settings, method: str) -> str:
        """Write the mean, or that it was not run."""
        found = self.mean(point, method)
        return found.text(3) if found else NOT_RUN

    def against(self, point: Settings, method: str, other: str) -> Mean | None:
        """Return the difference in error, paired by seed."""
        return paired(self.by_seed(point, method), self.by_seed(point, other))


def theory(point: Settings, rank: int | None) -> float:
    """Return what the best single matrix of a rank leaves, over the reported seeds' tasks."""
    names = ("tasks", "rank", "overlap", "visible", "noise", "width")
    left = []
    for seed in SEEDS:
        teacher = Teacher(point["teacher"], **{name: point[name] for name in names}, seed=seed)
        left.append(float(teacher.error_left(teacher.best_matrix(rank))))
    return mean(left).value


def sweep_table(found: Found, name: str) -> str:
    """Write a sweep: a row a method, a column a point."""
    values = sorted([each for each in points(name) if each != POINT] + [POINT], key=lambda point: point[name])
    rows = [[ALL[method].label, *(found.cell(point, method) for point in values)] for method in SWEEPS[name][1]]
    for rank in (8, 64):
        rows.append([f"*best single matrix, rank {rank}*", *(f"{theory(point, rank):.3f}" for point in values)])
    return table([f"{SHOWN[name]} =", *(f"{point[name]:g}" for point in values)], rows)


def winning(found: Found) -> str:
    """Say at which overlaps SMoRA is ahead of LoRA 64, by the interval of the paired difference."""
    ahead, level, behind, unknown = [], [], [], []
    for point in sorted(points("overlap"), key=lambda point: point["overlap"]):
        difference = found.against(point, "smora_64_8", "lora_64")
        if difference is None or difference.half is None:
            unknown.append(point["overlap"])
        else:
            group = ahead if difference.high < 0 else behind if difference.low > 0 else level
            group.append(point["overlap"])
    named = {"ahead": ahead, "level": level, "behind": behind, NOT_RUN: unknown}
    parts = [f"{name} at {', '.join(f'{share:g}' for share in shares)}" for name, shares in named.items() if shares]
    return "SMoRA 64/8 against LoRA r=64 by overlap: " + "; ".join(parts) + "."


def differences(found: Found) -> str:
    """Write the paired differences in error from LoRA 64's, by overlap."""
    values = sorted(points("overlap"), key=lambda point: point["overlap"])
    rows = []
    for method in METHODS_HERE:
        if method != "lora_64":
            cells = [found.against(point, method, "lora_64") for point in values]
            rows.append([ALL[method].label, *(cell.text(3, sign=True) if cell else NOT_RUN for cell in cells)])
    return table(["overlap =", *(f"{point['overlap']:g}" for point in values)], rows)


def one_point(found: Found, point: Settings, methods: Sequence[str]) -> str:
    """Write one point: a row a method."""
    rows = []
    for method in methods:
        rate = best_rate(found.errors, point, method)
        rows.append([ALL[method].label, found.cell(point, method), NOT_RUN if rate is None else f"{rate:g}"])
    return table(["method", "error left", "rate"], rows)


def plot(found: Found, path: Path) -> None:
    """Draw the error left over the overlap."""
    figure, (axes,) = figures.canvas(1)
    values = sorted(points("overlap"), key=lambda point: point["overlap"])
    for method in DRAWN:
        drawn = [(point["overlap"], each) for point in values if (each := found.mean(point, method))]
        if drawn:
            x = [share for share, _ in drawn]
            axes.plot(x, [each.value for _, each in drawn], label=ALL[method].label, **figures.STYLES[method])
            low, high = ([each.value + sign * (each.half or 0) for _, each in drawn] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=figures.STYLES[method]["color"], alpha=0.2, linewidth=0)
    x = [point["overlap"] for point in values]
    for rank, style in ((8, ":"), (64, "--")):
        limit = [theory(point, rank) for point in values]
        axes.plot(x, limit, color=figures.INK, linestyle=style, label=f"best single matrix, rank {rank}")
    axes.set(xlabel="overlap: share of the input directions in conflict", ylabel="error left", ylim=(-0.02, 1.0))
    axes.legend(fontsize="small", framealpha=0, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.save(figure, path)


def page(records: Sequence[Record]) -> str:
    """Return the page as Markdown."""
    found = Found(records)
    nested = points("nested")[0]
    return f"""# One layer, tasks in conflict

Written by `examples/benchmarks/evidence/conflict_page.py` from `conflict.jsonl`; `conflict.py` there makes the records.

T tasks, each an update of rank ρ of one linear layer (d = {POINT["width"]}), to be learnt by one adapter of that layer;
an input carries a code that tells its task. The overlap is the share of a task's ρ input directions that all tasks have
in common; there, tasks want different outputs for one input. Unless a table says otherwise: T = {POINT["tasks"]},
ρ = {POINT["rank"]}, overlap 1, a code of size {POINT["visible"]:g} (the task's own part has size √ρ), noise
{POINT["noise"]:g} in every direction, {POINT["steps"]} steps of Adam with {POINT["batch"]} fresh inputs each, scale 1
for every method.

The error left is the mean square error on {HELD_OUT:,} fresh inputs over that of no adapter: 0 is best, 1 is nothing
learnt. Each method at the best of the rates {", ".join(f"{rate:g}" for rate in RATES)}, which was chosen on tasks (seed
{DEVELOPMENT_SEED}) that are not reported. Mean over seeds ± half of the 95 % interval (t), the number of seeds in
brackets. *Best single matrix* is computed, not trained: what no LoRA of that rank can beat, however it is trained.

## Overlap

![Error left over the overlap of the tasks' input directions](conflict.svg)

{sweep_table(found, "overlap")}

Difference in error from LoRA r=64, paired by seed; below 0 is better.

{differences(found)}

{winning(found)}

## What top_k, blocks, balancing and the router's rate cost

{one_point(found, POINT, ["smora_64_8", *COSTS])}

## What nested ranks hold

Here T = {nested["tasks"]} tasks have all of ρ = {nested["rank"]} input and output directions in common, and task t uses
the first ρ_t of them, from 1 to {nested["rank"]}: they differ in how much of the same directions they use. That is what
MoRE's ranks 1 … r_t can say; tasks that use the same input directions for different outputs, as in every other table,
they cannot.

{one_point(found, nested, METHODS_HERE)}

## Number of tasks

{sweep_table(found, "tasks")}

## How visible the task is

{sweep_table(found, "visible")}

## Rank of a task's update

{sweep_table(found, "rank")}

## Budget

{sweep_table(found, "steps")}

## What has been run

```text
{status(plan, records)}
```

`python examples/benchmarks/evidence/conflict.py` goes on with what is left.
"""


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return the overlap's means as data: method to [overlap, error, half of its interval, seeds]."""
    found = Found(records)
    lines: dict[str, list[list[Any]]] = {}
    for point in sorted(points("overlap"), key=lambda point: point["overlap"]):
        for method in METHODS_HERE:
            if each := found.mean(point, method):
                lines.setdefault(method, []).append([point["overlap"], each.value, each.half, each.count])
    return {"point": POINT, "error_left_by_overlap": lines}


def main(argv: list[str] | None = None) -> None:
    """Write the page, its plot and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS / "conflict.jsonl")
    parser.add_argument("--page", type=Path, default=RESULTS / "conflict.md")
    args = parser.parse_args(argv)
    records = Records(args.records).read()
    args.page.write_text(page(records), encoding="utf-8")
    args.page.with_suffix(".json").write_text(json.dumps(summary(records), indent=1) + "\n", encoding="utf-8")
    plot(Found(records), args.page.with_suffix(".svg"))


if __name__ == "__main__":
    main()
