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
from glue_methods import MAIN, SCALES, UPPER

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


def reading(records: list[Record], tasks: list[str]) -> str:
    """Say in a paragraph what the table shows: how far apart the shared adapters are, and what sharing gives."""

    def mean(method: str) -> float:
        found = [scores(records, method, task) for task in tasks]
        return statistics.fmean(statistics.fmean(each.values()) for each in found)

    present = {r["method"] for r in records}
    shared = {method: mean(method) for method in MAIN | SCALES if method in present}
    lowest, highest = min(shared, key=shared.__getitem__), max(shared, key=shared.__getitem__)
    text = (
        f"The adapters that all tasks share lie between {shared[lowest]:.1f} ({lowest}) and {shared[highest]:.1f} "
        f"({highest}), few points apart and often within a standard deviation of each other: with a head each, tasks "
        "do not conflict, and there is nothing for a router to remove."
    )
    for own in UPPER.keys() & present:
        if (one := own.removesuffix("_per_task")) not in present:
            continue
        verdict = "help one another" if mean(own) < mean(one) else "lose by sharing"
        text += f" A LoRA for each task has {mean(own):.1f}, one for all ({one}) {mean(one):.1f}: the tasks {verdict}."
    return text


def page(records: list[Record], search: list[Record]) -> str:
    """Return the page as Markdown."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    metrics = ", ".join(f"{task} {TASKS[task].metrics[0]}" for task in tasks)
    sizes = sorted({(found["batch_size"], found["max_length"]) for found in search if "batch_size" in found})
    batches = "".join(f" of {size} examples of up to {length} tokens" for size, length in sizes)
    lines = ["# Seven GLUE tasks, a head each", ""]
    lines += [
        "The control of the experiments in which tasks conflict: here each task has a head of its own. `glue_small.py` "
        "makes the records, `glue_page.py` this page. Learning rates were chosen on examples held out of the training "
        "data, and so were the scales of the rows that name an alpha; the alpha of smora_r64_k8, 4, was settled on the "
        "reported examples, which flatters it. These searches, and ablations, are in the records beside this page.",
        "",
    ]
    for steps, device, dtype in sorted({(r["steps"], r["device"], r["dtype"]) for r in records}):
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
        "",
        *table(records, list(MAIN | SCALES | UPPER), tasks),
        "",
        reading(records, tasks),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args(argv)
    search = args.records.with_name(f"{args.records.stem}_search.json")
    found = json.loads(search.read_text()) if search.exists() else []
    args.page.write_text(page(json.loads(args.records.read_text()), found), encoding="utf-8")


if __name__ == "__main__":
    main()
