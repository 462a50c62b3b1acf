"""Write the tables of docs/performance.md, and its plot, from the results in docs/results.

python examples/benchmarks/page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[2] / "docs"
START, END = "<!-- tables: written by examples/benchmarks/page.py -->", "<!-- end of tables -->"
KINDS = ["smora", "dense64", "more8 one task", "more8 mixed", "published"]


def read(name: str) -> dict[str, Any]:
    """Read docs/results/<name>.json."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def layers(result: dict[str, Any]) -> str:
    """Write one table of time and one of memory."""
    times, memory = [], []
    for row in result["rows"]:
        size = [row["tokens"], row["width"], row["dtype"]]
        spread = row["times"]["smora"]
        milliseconds = f"{spread['median_ms']:.2f} ({spread['low_ms']:.2f} – {spread['high_ms']:.2f})"
        overheads = [row["overhead"].get(kind, "") for kind in KINDS]
        times.append([*size, *overheads, row["total"]["smora"], milliseconds])
        peak, saved = row["peak_bytes"], row["saved_bytes"]
        peaks = [round(peak["smora"] / peak["lora64"], 2), round(peak["more8 one task"] / peak["lora8"], 2)]
        published = round(saved["published"] / saved["smora"]) if "published" in saved else ""
        memory.append([*size, *peaks, round(saved["smora"] / saved["lora64"], 3), published])
    size = ["tokens", "width", "dtype"]
    return "\n\n".join(
        [
            "### One layer, time\n\nOverhead by kind, the total of SMoRA, and its time with quartiles.",
            table([*size, *KINDS, "total, smora", "smora, ms"], times),
            "### One layer, memory\n\nPeak of a step and bytes saved for backward beyond the input, relative to LoRA's "
            "of the same rank; the last column: the published algorithm's relative to ours.",
            table([*size, "peak, smora", "peak, more8 one task", "saved, smora", "published / ours"], memory),
        ]
    )


def whole(name: str, title: str, keys: list[str], unit: str) -> str:
    """Write a table of whole models."""
    rows = read(name)["rows"]
    kinds = list(rows[0]["times"])
    cells = [
        [
            *(row[key] for key in keys),
            *(row.get("tokens_per_second", {}).get(k) or row["times"][k]["median_ms"] for k in kinds),
        ]
        for row in rows
    ]
    return f"### {title}\n\n{unit}\n\n" + table([*keys, *kinds], cells)


def plot(result: dict[str, Any]) -> None:
    """Draw overhead over tokens."""
    matplotlib.rcParams["svg.hashsalt"] = "rank_experts"  # The same results give the same file.
    figure, axes = pyplot.subplots(figsize=(7, 4))
    sizes = sorted({(row["width"], row["dtype"]) for row in result["rows"]})
    for width, dtype in sizes:
        rows = [row for row in result["rows"] if (row["width"], row["dtype"]) == (width, dtype)]
        points = [(row["tokens"], row["overhead"]["smora"]) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"d = {width}, {dtype}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="overhead of SMoRA, PEFT LoRA r=64 is 1")
    axes.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "results" / "overhead.svg", metadata={"Date": None})


def main() -> None:
    """Replace what lies between the page's marks."""
    layer = read("layer")
    described = "\n".join(f"- {name}: {value}" for name, value in layer["machine"].items())
    parts = [
        f"Measured on:\n\n{described}",
        layers(layer),
        "![Overhead over tokens](results/overhead.svg)",
        whole(
            "training_step", "Training step", ["shape", "layers", "hidden", "batch", "length"], "Milliseconds a step."
        ),
        whole("decode", "Decoding", ["batch", "hidden", "layers"], "Tokens a second."),
    ]
    plot(layer)
    page = DOCS / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(before + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
