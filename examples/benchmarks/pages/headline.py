"""Write the figures of the README, docs/results.md and docs/export.md, with their plot, from docs/results.

    python examples/benchmarks/pages/headline.py

Results that are not there leave their part of a page as it is; beside each table stands the command that makes them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
sys.path.append(str(Path(__file__).resolve().parents[1] / "glue"))
from matplotlib import pyplot

from glue_data import TASKS
from glue_methods import MAIN, SCALES, UPPER
from glue_page import scores
from glue_page import table as glue_table

ROOT = Path(__file__).resolve().parents[3]
TOKENS = 4096  # of the layers that the README's table of speed shows

Records = list[dict[str, Any]]


def replaced(text: str, part: str, content: str) -> str:
    """Put content between the marks of a part of a page.

    Raises:
        ValueError: The page has no such marks.
    """
    start, end = f"<!-- {part}: written by examples/benchmarks/pages/headline.py -->", f"<!-- end of {part} -->"
    if start not in text or end not in text:
        raise ValueError(f"no {start} … {end} in the page")
    before, rest = text.split(start, 1)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def demo(result: dict[str, Any]) -> str:
    """Write the demo's table."""
    tasks = list(result["rows"][0]["accuracy"])
    rows = []
    for found in result["rows"]:
        values = [found["accuracy"][task] for task in tasks]
        values.append(sum(values) / len(values))
        cost = f"{found['active']:,}" if "active" in found else ""
        rows.append([found["method"], *(f"{value:.3f}" for value in values), cost])
    return markdown(["accuracy", *tasks, "mean", "active parameters a token"], rows)


def compared(records: Records) -> tuple[list[str], list[str]]:
    """Return the tasks and the main methods that the records hold."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    return tasks, [method for method in MAIN | SCALES | UPPER if any(r["method"] == method for r in records)]


def glue(records: Records) -> str:
    """Write the table of the GLUE benchmark's main methods."""
    tasks, methods = compared(records)
    steps = sorted({r["steps"] for r in records})
    intro = (
        f"One adapter for {len(tasks)} GLUE tasks, {' or '.join(map(str, steps))} steps: scores in percent, with the "
        "standard deviation where a method ran with several seeds (`examples/benchmarks/glue/glue_small.py`)."
    )
    picture = "![Mean score of each method, a point a seed](results/glue_small.svg)"
    return "\n\n".join([intro, picture, "\n".join(glue_table(records, methods, tasks))])


def glue_plot(records: Records, file: Path) -> None:
    """Draw each method's mean over tasks, with the runs of all seeds as points."""
    tasks, methods = compared(records)
    matplotlib.rcParams["svg.hashsalt"] = "rank_experts"  # The same results give the same file.
    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.45 * len(methods)))
    for place, method in enumerate(methods):
        found = [scores(records, method, task) for task in tasks]
        seeds = set.intersection(*(set(each) for each in found))
        means = [sum(each[seed] for each in found) / len(tasks) for seed in sorted(seeds)]
        axes.barh(place, sum(means) / len(means), color="tab:orange" if "lora" in method else "tab:blue", alpha=0.6)
        axes.plot(means, [place] * len(means), "k.", markersize=6)
    axes.set(
        yticks=range(len(methods)), yticklabels=methods, xlabel=f"mean score of {len(tasks)} GLUE tasks, a point a seed"
    )
    axes.invert_yaxis()
    lowest = min(patch.get_width() for patch in axes.patches)
    axes.set_xlim(left=max(0.0, lowest - 10))
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def speed(result: dict[str, Any]) -> str:
    """Write what an adapted layer costs beside PEFT's LoRA of the same rank."""
    rows = []
    for found in result["rows"]:
        if found["tokens"] == TOKENS:
            kept = found["saved_bytes"]["smora"] / found["saved_bytes"]["lora64"]
            values = [found[of]["value"] for of in ("total", "overhead")]
            ratios = [f"{value[kind]:.2f}" for value in values for kind in ("smora native", "smora")]
            rows.append([str(found["width"]), found["dtype"], *ratios, f"{kept:.2f}"])
    head = ["width", "dtype", "time, native kernel", "time, PyTorch", "time beyond the frozen layer's, native kernel"]
    return markdown([*head, "the same, PyTorch", "bytes kept for backward"], rows)


def static_forms(records: Records) -> str:
    """Write how well static LoRAs stand for a token-routed adapter, a table for each set of data."""
    tables = []
    for data, title in {"demo": "On the demo:", "glue": "On GLUE, seven tasks:"}.items():
        if not (own := [record for record in records if record["data"] == data]):
            continue
        rows = []
        for record in own:
            share = "" if record["explained"] is None else f"{record['explained']:.1%}"
            loss = "" if record["loss"] is None else f"{record['loss']:.3f}"
            values = [f"{100 * value:.1f}" for value in (record["mean"], *record["scores"].values())]
            rows.append([record["form"], str(record["r"] or ""), share, loss, *values])
        head = ["static form", "ranks", "energy explained", "loss", "mean score", *own[0]["scores"]]
        tables += [title, markdown(head, rows)]
    return "\n\n".join(tables)


def fuzz(result: dict[str, Any]) -> str:
    """Write what became of the damaged adapters."""
    names = ("folders", "accepted wrongly", "crashed", "model changed by a refusal")
    return markdown(["", ""], [[name, f"{result[name]:,}"] for name in names])


def main(root: Path = ROOT) -> None:
    """Rewrite the pages' parts."""
    results = root / "docs/results"
    parts = {}
    for name, write in {
        "demo": demo,
        "glue_small": glue,
        "layer": speed,
        "fuzz": fuzz,
        "static_export": static_forms,
    }.items():
        if (file := results / f"{name}.json").exists():
            parts[name] = write(json.loads(file.read_text()))
    if "glue_small" in parts:
        glue_plot(json.loads((results / "glue_small.json").read_text()), results / "glue_small.svg")
        if (results / "glue_small.md").exists():
            parts["glue_small"] += "\n\n[All figures, ablations and learning rates](results/glue_small.md)."
    pages = {"README.md": "docs/results/", "docs/results.md": "results/", "docs/export.md": "results/"}
    for page, folder in ((root / name, folder) for name, folder in pages.items()):
        text = page.read_text(encoding="utf-8")
        for part, content in parts.items():
            if f"<!-- {part}: " in text:
                text = replaced(text, part, content.replace("](results/", f"]({folder}"))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
