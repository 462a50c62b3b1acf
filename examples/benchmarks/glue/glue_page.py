"""Make a page of the GLUE benchmark's records: means over seeds with standard deviations.

python examples/benchmarks/glue/glue_page.py docs/results/glue_small.json docs/results/glue_small.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from glue_data import SPLITS, TASKS
from glue_methods import ABLATIONS, MAIN, METHODS, SCALES, UPPER

Record = dict[str, Any]


def scores(records: list[Record], method: str, task: str, metric: str | None = None) -> dict[int, float]:
    """Return a task's score by seed, in percent, its first metric unless told otherwise."""
    metric = metric or TASKS[task].metrics[0]
    return {
        r["seed"]: 100 * r["value"] for r in records if (r["method"], r["task"], r["metric"]) == (method, task, metric)
    }


def spread(values: list[float]) -> str:
    """Write a mean, with the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def row(records: list[Record], method: str, tasks: list[str]) -> str:
    by_task = [scores(records, method, task) for task in tasks]
    # The mean over tasks is taken within a seed, so that its deviation is that of whole runs.
    complete = set.intersection(*(set(found) for found in by_task))
    means = [statistics.fmean(found[seed] for found in by_task) for seed in sorted(complete)]
    own = [r for r in records if r["method"] == method]
    active = statistics.fmean(r["active_parameters"] for r in own)
    seconds = statistics.fmean({(r["seed"]): r["seconds"] for r in own}.values())
    cells = [method, spread(means), *(spread(list(found.values())) for found in by_task)]
    cells += [str(len(complete)), f"{own[0]['trainable_parameters'] / 1e6:.2f} M", f"{active / 1e6:.2f} M"]
    return f"| {' | '.join([*cells, f'{seconds:.0f} s'])} |"


def table(records: list[Record], methods: list[str], tasks: list[str]) -> list[str]:
    header = ["method", "mean", *tasks, "seeds", "trained", "active", "a run"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [row(records, method, tasks) for method in methods if any(r["method"] == method for r in records)]


def variants(explored: list[Record], tasks: list[str]) -> list[str]:
    """Return the table of what was compared on held-out examples: most seeds first, best first."""
    runs: dict[str, dict[int, Record]] = {}
    for run in explored:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    seeds = sorted({run["seed"] for run in explored})

    def mean(method: str) -> float:
        return statistics.fmean(run["dev_mean"] for run in runs[method].values())

    columns = ["variant", "mean", *(f"seed {number}" for number in range(len(seeds))), *tasks]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for method in sorted(runs, key=lambda method: (-len(runs[method]), -mean(method))):
        own = runs[method]
        cells = [f"{100 * own[seed]['dev_mean']:.1f}" if seed in own else "–" for seed in seeds]
        cells += [f"{100 * statistics.fmean(run['dev'][task] for run in own.values()):.1f}" for task in tasks]
        lines.append(f"| {method} | {100 * mean(method):.1f} | {' | '.join(cells)} |")
    return lines


def identified(records: list[Record], tasks: list[str]) -> list[str]:
    """Return the table of how many inputs' tasks were named."""
    methods = [m for m in METHODS if any((r["method"], r["metric"]) == (m, "identified") for r in records)]
    lines = [f"| {' | '.join(['method', 'mean', *tasks])} |", "|" + "---|" * (len(tasks) + 2)]
    for method in methods:
        shares = [statistics.fmean(scores(records, method, task, "identified").values()) for task in tasks]
        lines.append(f"| {method} | {' | '.join(f'{share:.0f}' for share in [statistics.fmean(shares), *shares])} |")
    return lines if methods else []


def page(records: list[Record], search: list[Record], explored: list[Record]) -> str:
    """Return the page as Markdown."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    settings = sorted({(r["steps"], r["device"], r["dtype"]) for r in records})
    metrics = ", ".join(f"{task} {TASKS[task].metrics[0]}" for task in tasks)
    lines = ["# One adapter for several GLUE tasks", ""]
    sizes = sorted({(found["batch_size"], found["max_length"]) for found in search if "batch_size" in found})
    batches = "".join(f" of {size} examples of up to {length} tokens" for size, length in sizes)
    for steps, device, dtype in settings:
        clock = "processor seconds" if device == "cpu" else "seconds"
        lines.append(f"{steps:,} steps{batches} a run, on {device}, {dtype}; times are {clock} of training.")
    lines += [
        "",
        f"Scores in percent, {metrics}; mean and standard deviation over seeds. 'Trained' and 'active' count the "
        "adapter without the heads, which are the same for all; a LoRA per task counts all of its adapters as trained.",
        "",
        "Trained on, and reported on, where the small data folder is used: "
        + "; ".join(f"{task}: {SPLITS[task][0][0]}, {SPLITS[task][1][0]}" for task in tasks)
        + ". QNLI and SST-2 split their validation file by idx % 5. "
        "These figures do not compare with the leaderboard's.",
    ]
    for title, group in (("Methods", MAIN | SCALES | UPPER), ("Ablations", ABLATIONS)):
        if any(r["method"] in group for r in records):
            lines += ["", f"## {title}", "", *table(records, list(group), tasks)]
    if rows := identified(records, tasks):
        about = f"Of 100 inputs without a task, how many `identify_task` gave theirs; by chance {100 / len(tasks):.0f}."
        lines += ["", "## Named tasks", "", about, "", *rows]
    if search:
        rates = sorted({found["learning_rate"] for found in search})
        lines += ["", "## Learning rates", "", "Mean on examples held out of the training data, one seed.", ""]
        lines += [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|" + "---|" * (len(rates) + 1)]
        for method in METHODS:
            found = {s["learning_rate"]: s["dev_mean"] for s in search if s["method"] == method}
            if found:
                cells = [f"{100 * found[rate]:.1f}" if rate in found else "–" for rate in rates]
                lines.append(f"| {method} | {' | '.join(cells)} |")
    if explored:
        settings = sorted({(run["steps"], run["learning_rate"]) for run in explored})
        text = "; ".join(f"{steps} steps at a learning rate of {rate:g}" for steps, rate in settings)
        about = f"Mean on examples held out of the training data, {text}; what each is, `glue_methods.py` says. "
        about += "Only means over the same seeds compare."
        lines += ["", "## Variants", "", about, "", *variants(explored, tasks)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args(argv)
    beside = []
    for kind in ("search", "explored"):
        file = args.records.with_name(f"{args.records.stem}_{kind}.json")
        beside.append(json.loads(file.read_text()) if file.exists() else [])
    args.page.write_text(page(json.loads(args.records.read_text()), *beside), encoding="utf-8")


if __name__ == "__main__":
    main()
