"""Write the table of docs/serving.md from docs/results/vllm.json.

python examples/benchmarks/pages/vllm_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[3] / "docs"
START, END = "<!-- vllm: written by examples/benchmarks/pages/vllm_page.py -->", "<!-- end of vllm -->"


def text(result: dict[str, Any]) -> str:
    """Write what was measured, a row a number of requests."""
    rows, machine = result["rows"], result["machine"]
    kinds = list(rows[0]["times"])
    first = rows[0]
    lines = [
        f"Tokens a second, and the time over that of a LoRA in a vLLM without the plugin, with its range; rank "
        f"{first['rank']}, every linear layer of a Llama of {first['layers']} layers and width {first['hidden']} in "
        f"{first['dtype']}, prompts of {first['prompt']} tokens, {first['tokens']} generated, {first['rounds']} rounds "
        f"in turn, {machine['threads']} threads, load average {machine['load_average'][0]}.",
        "",
        "| requests | " + " | ".join(kinds) + " |",
        "| --- |" + " --- |" * len(kinds),
    ]
    for row in rows:
        cells = []
        for kind in kinds:
            (low, high), value = row["total"]["range"][kind], row["total"]["value"][kind]
            ratio = "" if kind == "lora" else f", {value:.2f} ({low:.2f} – {high:.2f})"
            cells.append(f"{row['tokens_per_second'][kind]}{ratio}")
        lines.append(f"| {row['requests']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Put the table between its marks."""
    page = DOCS / "serving.md"
    before, rest = page.read_text().split(START)
    after = rest.split(END)[1]
    result = json.loads((DOCS / "results" / "vllm.json").read_text())
    page.write_text(f"{before}{START}\n\n{text(result)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
