"""Write the figures of the README, docs/results.md and docs/export.md, and the home page from the README.

    python examples/benchmarks/pages/headline.py

Results that are not there leave their part of a page as it is; beside each table stands the command that makes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
    rows = [
        [row["method"], f"{row['trained']:,}", *(f"{row['accuracy'][case]:.1%}" for case in ("one", "each"))]
        for row in result["rows"]
    ]
    return markdown(["accuracy, one seed", "trained parameters", "one head", "a head each"], rows)


def languages(result: dict[str, Any]) -> str:
    """Write the accuracies of the languages' main methods, by training length and where there is no conflict."""
    methods = {"lora_64": "LoRA r=64", "lora_96": "LoRA r=96", "smora_64_8": "SMoRA 64/8", "more_8": "MoRE r=8"}
    cases = {f"one head for all, {steps}": steps for steps in ("250 steps", "1,000 steps", "2,000 steps")}
    rows, seeds = [], set()
    for case, name in (cases | {"a head each, 250 steps": "a head each"}).items():
        cells = []
        for method in methods:
            mean, half, count = result[name].get(method, {}).get("accuracy", (None, None, None))
            cells.append("–" if count is None else f"{100 * mean:.1f} ± {100 * half:.1f}")
            seeds |= {count} - {None}
        rows.append([case, *cells])
    about = (
        f"Accuracy on unseen texts in percent, mean over {' or '.join(map(str, sorted(seeds)))} seeds ± half of the "
        "95 % interval. LoRA r=96 trains as many parameters as SMoRA, MoRE a sixth of that."
    )
    return f"{about}\n\n{markdown(['eight languages', *methods.values()], rows)}"


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


def cost(result: dict[str, Any]) -> str:
    """Say in a sentence what an adapted layer costs beside PEFT's LoRA of the same rank."""

    def span(tokens: int) -> str:
        found = [row["total"]["value"]["smora native"] for row in result["rows"] if row["tokens"] == tokens]
        return f"{min(found):.2f} to {max(found):.2f}"

    return (
        f"SMoRA with 8 of 64 ranks takes {span(TOKENS)} times as long as PEFT's LoRA with 64, a layer forward and "
        f"backward on {TOKENS:,} tokens, on two CPU cores; on a single token {span(1)} "
        "([performance](performance.md))."
    )


def home(readme: str) -> str:
    """Return the site's first page: the README, where links start in docs and files outside of it are named."""
    text = re.sub(r'(\]\(|src=")docs/', r"\1", readme)
    return re.sub(r"\[([^\]]+)\]\(((?:examples|\.github)/[^)]+)\)", r"\1 (`\2`)", text)


def static_forms(records: Records) -> str:
    """Write how well static LoRAs stand for a token-routed adapter, a table for each set of data."""
    tables = []
    for data, title in {
        "demo": "Eight languages behind one head, the demo's adapter:",
        "glue": "GLUE, seven tasks, a head each:",
    }.items():
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
    for part, (name, write) in {
        "demo": ("demo", demo),
        "languages": ("languages", languages),
        "layer": ("layer", speed),
        "cost": ("layer", cost),
        "fuzz": ("fuzz", fuzz),
        "static_export": ("static_export", static_forms),
    }.items():
        if (file := results / f"{name}.json").exists():
            parts[part] = write(json.loads(file.read_text()))
    pages = {"README.md": "docs/", "docs/results.md": "", "docs/export.md": ""}
    for page, folder in ((root / name, folder) for name, folder in pages.items()):
        text = page.read_text(encoding="utf-8")
        for part, content in parts.items():
            if f"<!-- {part}: " in text:
                content = re.sub(r"\]\((\w+\.md|results/)", rf"]({folder}\1", content)
                text = replaced(text, part, content)
        page.write_text(text, encoding="utf-8")
    (root / "docs/index.md").write_text(home((root / "README.md").read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
