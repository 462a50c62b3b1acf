"""Write docs/performance.md's table and plot, and docs/results/speed.md with all tables, from docs/results.

python examples/benchmarks/pages/page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "evidence"))
from figures import canvas, save, table
from goals import verdicts

DOCS = Path(__file__).resolve().parents[3] / "docs"
START, END = "<!-- table: written by examples/benchmarks/pages/page.py -->", "<!-- end of table -->"
RESULTS = ["layer", "training_step", "decode", "compiled", "growth", "loading", "gpu"]
KINDS = ["smora", "smora native", "dense64", "published"]
TASK_KINDS = ["more8 one task", "more8 one task native", "more8 mixed", "more8 mixed native"]


def read() -> dict[str, dict[str, Any]]:
    """Read docs/results/<name>.json, those that are there."""
    files = {name: DOCS / "results" / f"{name}.json" for name in RESULTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def ratio(found: dict[str, Any], kind: str) -> str:
    """Write a ratio with its range."""
    if kind not in found["value"]:
        return ""
    low, high = found["range"][kind]
    return f"{found['value'][kind]:.2f} ({low:.2f} – {high:.2f})"


def layers(result: dict[str, Any]) -> str:
    """Write tables of time and memory."""
    times, task_times, memory = [], [], []
    for row in result["rows"]:
        size = [row["tokens"], row["width"], row["dtype"]]
        spread = row["times"]["smora"]
        milliseconds = f"{spread['median_ms']:.2f} ({spread['low_ms']:.2f} – {spread['high_ms']:.2f})"
        total = ratio(row["total"], "smora")
        times.append([*size, row["rounds"], *(ratio(row["overhead"], kind) for kind in KINDS), total, milliseconds])
        task_times.append([*size, *(ratio(row["overhead"], kind) for kind in TASK_KINDS)])
        peak, saved = row["peak_bytes"], row["saved_bytes"]
        peaks = [round(peak["smora"] / peak["lora64"], 2), round(peak["more8 one task"] / peak["lora8"], 2)]
        published = round(saved["published"] / saved["smora"]) if "published" in saved else ""
        memory.append([*size, *peaks, round(saved["smora"] / saved["lora64"], 3), published])
    size = ["tokens", "width", "dtype"]
    return "\n\n".join(
        [
            "## One layer, time\n\nOverhead by kind and the total of SMoRA, each with its range, and its time with "
            "quartiles.",
            table([*size, "rounds", *KINDS, "total, smora", "smora, ms"], times),
            "The task gate's overhead, over LoRA r = 8's.",
            table([*size, *TASK_KINDS], task_times),
            "## One layer, memory\n\nPeak of a step and bytes saved for backward beyond the input, relative to LoRA's "
            "of the same rank; the last column: the published algorithm's relative to ours.",
            table([*size, "peak, smora", "peak, more8 one task", "saved, smora", "published / ours"], memory),
        ]
    )


def whole(rows: list[dict[str, Any]], title: str, keys: list[str], unit: str) -> str:
    """Write a table of whole models."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["times"]))
    cells = [[*(row[key] for key in keys), *(_rate(row, kind) for kind in kinds)] for row in rows]
    totals = [[*(row[key] for key in keys), *(ratio(row["total"], kind) for kind in kinds)] for row in rows]
    parts = [f"## {title}", unit, table([*keys, *kinds], cells), "Time over that of LoRA r = 64, with its range."]
    return "\n\n".join([*parts, table([*keys, *kinds], totals)])


def _rate(row: dict[str, Any], kind: str) -> Any:
    if kind not in row["times"]:
        return ""
    return row.get("tokens_per_second", {}).get(kind) or round(row["times"][kind]["median_ms"], 1)


def overheads(rows: list[dict[str, Any]], title: str, text: str) -> str:
    """Write a table of overheads by kind."""
    kinds = [kind for kind in rows[0]["overhead"]["value"] if kind not in ("base", "lora64")]
    cells = [
        [row["tokens"], row["width"], row["dtype"], *(ratio(row["overhead"], kind) for kind in kinds)] for row in rows
    ]
    return f"## {title}\n\n{text}\n\n" + table(["tokens", "width", "dtype", *kinds], cells)


def gpu(result: dict[str, Any]) -> str:
    """Write a table of a GPU's overheads."""
    kinds = list(dict.fromkeys(kind for row in result["rows"] for kind in row["overhead"]["value"]))
    kinds = [kind for kind in kinds if kind not in ("base", "lora64")]
    keys = ["of", "tokens", "width", "dtype", "eager"]
    cells = [[*(row[key] for key in keys), *(ratio(row["overhead"], kind) for kind in kinds)] for row in result["rows"]]
    return f"## On a GPU\n\nOverheads on {result['machine']['gpu']}.\n\n" + table([*keys, *kinds], cells)


def growth(rows: list[dict[str, Any]]) -> str:
    """Write a table for each thing that the cost grows with."""
    parts = ["## How the cost grows\n\nMilliseconds a step, base included; with tokens and width: the first table."]
    for of in dict.fromkeys(row["of"] for row in rows):
        own = [row for row in rows if row["of"] == of]
        values = list(dict.fromkeys(row["value"] for row in own))
        kinds = list(dict.fromkeys(row["kind"] for row in own))
        by = {(row["kind"], row["value"]): round(row["median_ms"], 2) for row in own}
        parts.append(table([of, *kinds], [[value, *(by[kind, value] for kind in kinds)] for value in values]))
    return "\n\n".join(parts)


def loading(rows: list[dict[str, Any]]) -> str:
    """Write a table of seconds."""
    cells = [
        [f"{row['of']}, {kind}", round(found["median_ms"] / 1e3, 2), ratio(row["total"], kind)]
        for row in rows
        for kind, found in row["times"].items()
    ]
    text = "Adapters on every linear layer of a model of 7-billion-parameter shape on the meta device; importing in "
    text += "processor seconds. The ratio is to PEFT's."
    return f"## Importing, adapting, loading\n\n{text}\n\n" + table(["what", "seconds", "ratio"], cells)


def summary(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Write a dozen rows that say what an adapter costs."""
    sizes = [(4096, 768, "float32"), (4096, 2048, "float32"), (512, 768, "float32"), (1, 768, "float32")]
    sizes += [(4096, 768, "bfloat16"), (4096, 2048, "bfloat16"), (512, 768, "bfloat16")]
    by_size = {(row["tokens"], row["width"], row["dtype"]): row for row in rows["layer"]}
    found = []
    for tokens, width, dtype in sizes:
        many = "1 token" if tokens == 1 else f"{tokens:,} tokens"
        name = f"a layer, forward and backward, {many}, d = {width:,}, {dtype}"
        total = by_size[tokens, width, dtype]["total"]["value"]
        found.append([name, *(f"{total[kind]:.2f}" for kind in ("smora native", "smora", "more8 mixed native"))])
    wholes = [(row, f"a training step, {row['shape']}-shaped") for row in rows.get("training_step", [])]
    wholes += [(row, f"a decoded token, batch {row['batch']}") for row in rows.get("decode", [])]
    for row, name in wholes:
        total = row["total"]["value"]  # Over that of LoRA r = 64, all of them.
        task = total["more8 native"] / total["lora8"]
        found.append([name, *(f"{total[kind]:.2f}" for kind in ("smora native", "smora")), f"{task:.2f}"])
    kept, peak = (by_size[sizes[0]][of] for of in ("saved_bytes", "peak_bytes"))
    found.append(["bytes kept for backward, the first row's layer", "", f"{kept['smora'] / kept['lora64']:.2f}", ""])
    found.append(["peak memory of its step", "", f"{peak['smora'] / peak['lora64']:.2f}", ""])
    head = ["time, or bytes, over PEFT's LoRA of the same rank", "SMoRA 64/8, native kernel", "SMoRA 64/8, PyTorch"]
    return table([*head, "MoRE r = 8, native, mixed tasks"], found)


def plot(result: dict[str, Any]) -> None:
    """Draw the time over LoRA's over tokens."""
    figure, (axes,) = canvas(1, 7, 3.6)
    sizes = sorted({(row["width"], row["dtype"]) for row in result["rows"]})
    colours = ["#6a9fd4", "#2f74c0", "#8a9a3b", "#2e9e5b", "#e0672f", "#b05cc9"]
    for (width, dtype), colour in zip(sizes, colours, strict=True):
        rows = [row for row in result["rows"] if (row["width"], row["dtype"]) == (width, dtype)]
        points = [(row["tokens"], row["total"]["value"]["smora native"]) for row in rows]
        axes.plot(*zip(*points, strict=True), label=f"d = {width:,}, {dtype}", color=colour, marker="o")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="time of SMoRA 64/8, LoRA r = 64 is 1")
    axes.legend(frameon=False, fontsize=8)
    save(figure, DOCS / "results" / "overhead.svg")


def main() -> None:
    """Write the page of all tables, and replace what lies between the marks of docs/performance.md."""
    results = read()
    rows = {name: result["rows"] for name, result in results.items()}
    described = "\n".join(f"- {name}: {value}" for name, value in results["layer"]["machine"].items())
    parts = [
        "# Speed and memory, all tables",
        "Written by `examples/benchmarks/pages/page.py` from the records of `make bench`. How it is measured, and what "
        "follows from it: [performance](../performance.md).",
        f"Measured on:\n\n{described}",
        "## Goals\n\nThe worst of the sizes measured decides: missed where its whole range lies beyond the bound, met "
        "where no range reaches over it.\n\n" + table(["goal", "at", "measured", ""], verdicts(results)),
        layers(results["layer"]),
    ]
    if "training_step" in rows:
        keys = ["shape", "layers", "hidden", "batch", "length"]
        parts.append(whole(rows["training_step"], "Training step", keys, "Milliseconds a step."))
    if "decode" in rows:
        parts.append(whole(rows["decode"], "Decoding", ["batch", "hidden", "layers"], "Tokens a second."))
    if "compiled" in rows:
        text = "Overhead, all compiled by inductor: our node, and the plain formula, which inductor fuses."
        parts.append(overheads(rows["compiled"], "Under torch.compile", text))
    if "growth" in rows:
        parts.append(growth(rows["growth"]))
    if "loading" in rows:
        parts.append(loading(rows["loading"]))
    if "gpu" in rows:
        parts.append(gpu(results["gpu"]))
    (DOCS / "results/speed.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot(results["layer"])
    page = DOCS / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(before + START + "\n\n" + summary(rows) + "\n\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
